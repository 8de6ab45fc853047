"""chunk_gdn2 on the fused kernels: checks, and the registered operators that autograd and torch.compile see.

The kernels are opaque to torch.compile, which takes each operator as one node of its graph, so that a block compiles
whole. What the backward pass needs beside the inputs are results of the forward operator, after o and the final state.
Without torch.compile the same functions run in an autograd function of their own: going through the registration takes
the host as long as the kernels take the device at small sizes.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.interpreter import InterpretedFunction

from lit_gpt.errors import UserError

from .config import Config, config_for
from .launch import RECOMPUTE, Options, Scores, backward, chunks_of, number_of_chunks, padded, prepare, scan_forward
from .prepare import block_scores_kernel


def _configuration(q: Tensor, v: Tensor, flat: Optional[list[int]]) -> tuple[Config, torch.dtype]:
    """The configuration, and the type of the dots' operands.

    The interpreter computes bf16 dots wrongly; fp16 would overflow where the state grows, so it runs in tf32 like fp32.
    """
    dot = torch.bfloat16 if v.dtype == torch.bfloat16 and v.is_cuda else torch.float32
    if flat is not None:
        return Config.from_flat(flat), dot
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return config_for(dot, padded(q.shape[-1]), capability), dot


def _options(
    q, v, cu_seqlens, B, scale, output_final_state, l2norm, gate, lower_bound, b_range, w_range, recompute, flat
) -> Options:
    config, dot = _configuration(q, v, flat)
    chunks = chunks_of(q.shape[0], B, cu_seqlens, config.chunk, q.device)
    return Options(
        scale, output_final_state, l2norm, gate, lower_bound, b_range, w_range, chunks, config, dot, recompute
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    B: int,
    scale: float,
    output_final_state: bool,
    l2norm: bool,
    gate: int,
    lower_bound: float,
    b_range: float,
    w_range: float,
    recompute: str,
    config: Optional[list[int]],
    keep: bool,
) -> list[Tensor]:
    """o [T, HV, V], the final state [N, HV, K, V] (empty unless asked for) and, with `keep`, what the backward pass
    wants beside the inputs: S, R and the scores, as far as `recompute` keeps them.

    q, k [T, H, K]; v, w [T, HV, V]; g, b [T, HV, K]; A_log [HV]; dt_bias [HV, K]; initial_state [N, HV, K, V]: B
    sequences of equal length, or packed. gate: as in Options.
    """
    options = _options(
        q, v, cu_seqlens, B, scale, output_final_state, l2norm, gate, lower_bound, b_range, w_range,
        recompute, config,
    )  # fmt: skip
    const = options.constants(q, v)
    scores = prepare(q, k, g, b, A_log, dt_bias, v.shape[-2], const, options, keep and recompute == "none")
    save = keep and recompute != "all"
    o, final_state, S, R = scan_forward(scores, v, w, initial_state, const, options, save)
    kept = [S, R] if save else []
    if keep and recompute == "none":
        kept += scores
    return [o, q.new_empty(0) if final_state is None else final_state, *kept]


chunk_gdn2_forward = torch.library.custom_op("lit_gpt::chunk_gdn2", _forward, mutates_args=())


@chunk_gdn2_forward.register_fake
def _(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, B, scale, output_final_state, l2norm, gate,
    lower_bound, b_range, w_range, recompute, config, keep,
):  # fmt: skip
    (tokens, HV, V), K = v.shape, q.shape[-1]
    config, dot = _configuration(q, v, config)
    chunks, C = number_of_chunks(tokens, B, cu_seqlens, config.chunk), config.chunk
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    KP, VP = padded(K), padded(V)
    final_state = q.new_empty((sequences, HV, K, V), dtype=torch.float32) if output_final_state else q.new_empty(0)
    new = lambda *shape, dtype=dot: q.new_empty((chunks, HV, *shape), dtype=dtype)
    kept = []
    if keep and recompute != "all":
        kept += [new(KP, VP), new(C, VP)]
    if keep and recompute == "none":
        kept += [new(3, C // 2, KP), new(C // 16 + 1, KP, dtype=torch.float32), new(2, C, dtype=torch.float32)]
        kept += [*(new(C, KP) for _ in range(3)), new(C, C), new(C, C)]
    return [v.new_empty(v.shape), final_state, *kept]


def _backward(
    do: Optional[Tensor],
    dfinal_state: Optional[Tensor],
    o: Tensor,
    kept: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Optional[Tensor],
    dt_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    B: int,
    scale: float,
    output_final_state: bool,
    l2norm: bool,
    gate: int,
    lower_bound: float,
    b_range: float,
    w_range: float,
    recompute: str,
    config: Optional[list[int]],
) -> list[Tensor]:
    """Gradients of q, k, v, g, b, w and of those of A_log, dt_bias and initial_state that there are."""
    options = _options(
        q, v, cu_seqlens, B, scale, output_final_state, l2norm, gate, lower_bound, b_range, w_range,
        recompute, config,
    )  # fmt: skip
    const = options.constants(q, v)
    S, R, *scores = kept or (None, None)
    scores = Scores(*scores) if scores else prepare(q, k, g, b, A_log, dt_bias, v.shape[-2], const, options, True)
    if S is None:
        _, _, S, R = scan_forward(scores, v, w, initial_state, const, options, save=True)
    do = torch.zeros_like(o) if do is None else do.contiguous()
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    grads = backward(*inputs, o, scores, S, R, do, dfinal_state, const, options)
    return [grad for grad in grads if grad is not None]


chunk_gdn2_backward = torch.library.custom_op("lit_gpt::chunk_gdn2_backward", _backward, mutates_args=())


@chunk_gdn2_backward.register_fake
def _(do, dfinal_state, o, kept, q, k, v, g, b, w, A_log, dt_bias, initial_state, *options):
    inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    return [x.new_empty(x.shape) for x in inputs if x is not None]


def _save(ctx, inputs, output):
    o, _, *kept = output
    *tensors, ctx.options = *inputs[:10], inputs[10:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, o, *kept)


def _gradients(ctx, grads, operator=chunk_gdn2_backward):
    saved = ctx.saved_tensors  # only once: activation checkpointing computes them anew on the first access
    tensors, (o, *kept) = saved[:10], saved[10:]
    do, dfinal_state, *_ = grads
    if not ctx.options[2]:  # no final state was asked for, so the gradient is of nothing
        dfinal_state = None
    found = iter(operator(do, dfinal_state, o, kept, *tensors, *ctx.options))
    return *(None if x is None else next(found) for x in tensors[:9]), None, *[None] * len(ctx.options), None


chunk_gdn2_forward.register_autograd(_gradients, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator without its registration."""

    @staticmethod
    def forward(ctx, *inputs):
        output = tuple(_forward(*inputs))
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _gradients(ctx, grads, _backward)


def _check(q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens, use_gate, lower_bound):
    """One clear line for every argument that does not fit."""
    if q.dim() != 4 or v.dim() != 4:
        raise UserError(
            f"chunk_gdn2 takes q [B, T, H, K] and v [B, T, HV, V]; got {tuple(q.shape)} and {tuple(v.shape)}."
        )
    if not (q.is_cuda or isinstance(block_scores_kernel, InterpretedFunction)):
        raise UserError(f"chunk_gdn2: the fused kernels run on a GPU and q is on {q.device}; use the plain path there.")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if T == 0:
        raise UserError("chunk_gdn2: q holds no token (T = 0); give it at least one.")
    keys, values, gates = (B, T, H, K), (B, T, HV, V), (B, T, HV, K)
    for name, x, shape in (("k", k, keys), ("v", v, values), ("w", w, values), ("g", g, gates), ("b", b, gates)):
        if tuple(x.shape) != shape:
            raise UserError(
                f"chunk_gdn2: {name} must be {list(shape)} to go with q {list(q.shape)} and v {list(v.shape)}; "
                f"got {list(x.shape)}."
            )
    if HV % H:
        raise UserError(f"chunk_gdn2: {HV} value heads do not split over {H} query heads; use a multiple.")
    if not (16 <= K <= 256 and 16 <= V <= 256):
        raise UserError(f"chunk_gdn2: the fused kernels take head sizes from 16 to 256; got K={K}, V={V}.")
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("b", b), ("w", w)):
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UserError(
                f"chunk_gdn2: the fused kernels take bf16, fp16 or fp32; {name} is {x.dtype}. "
                "The plain path takes fp64."
            )
        if x.device != q.device:
            raise UserError(f"chunk_gdn2: {name} is on {x.device} while q is on {q.device}; move them to one device.")
    if cu_seqlens is not None and B != 1:
        raise UserError(f"chunk_gdn2: with cu_seqlens the sequences are packed into one row, B = 1; got B = {B}.")
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is not None and tuple(initial_state.shape) != (N, HV, K, V):
        raise UserError(
            f"chunk_gdn2: initial_state must be {[N, HV, K, V]}, one per sequence; got {list(initial_state.shape)}."
        )
    if use_gate and A_log is None and lower_bound is None:
        raise UserError("chunk_gdn2: use_gate_in_kernel needs A_log, one per value head (or lower_bound).")
    if use_gate and A_log is not None and A_log.numel() != HV:
        raise UserError(f"chunk_gdn2: A_log must hold one value per value head, {HV}; got {A_log.numel()}.")
    if use_gate and dt_bias is not None and dt_bias.numel() != HV * K:
        raise UserError(f"chunk_gdn2: dt_bias must hold {HV} x {K} values; got {dt_bias.numel()}.")


def chunk_gdn2_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[torch.Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Optional[torch.Tensor] = None,
    A_log: Optional[torch.Tensor] = None,
    dt_bias: Optional[torch.Tensor] = None,
    lower_bound: Optional[float] = None,
    sigmoid_ranges: Optional[tuple[float, float]] = None,
    recompute: str = "none",
    config: Optional[Config] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Gated DeltaNet-2 over whole sequences (arXiv 2605.22791, eq. 10), forward and backward in fused Triton kernels.

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T        o_t = scale S_t^T q_t

    q, k [B, T, H, K]; v, w [B, T, HV, V]; g, b [B, T, HV, K], HV a multiple of H; 16 <= K, V <= 256; bf16 runs bf16
    dots, fp16 and fp32 run tf32 dots; the state and every sum are fp32. g is a log-decay in [-inf, 0]; b, w come
    after their sigmoid. scale defaults to K ** -0.5. initial_state [N, HV, K, V] fp32; cu_seqlens [N + 1] packs N
    sequences into B = 1, without a host sync. use_qk_l2norm_in_kernel: q and k become x / sqrt(sum x^2 + 1e-6).
    use_gate_in_kernel: g becomes -exp(A_log) softplus(g + dt_bias), or lower_bound sigmoid(exp(A_log) (g + dt_bias));
    A_log [HV], dt_bias [HV * K]. sigmoid_ranges: ranges of b and w, which are then raw and become range *
    sigmoid(raw). recompute: what the backward pass computes again rather than keeping, "none", "scores" or "all", from
    fastest to smallest. `config` replaces the fixed configuration, for tuning.

    Returns o [B, T, HV, V] in v's type and the final state [N, HV, K, V] fp32, or None. Raises UserError for
    arguments that do not fit.
    """
    _check(q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens, use_gate_in_kernel, lower_bound)
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    if recompute not in RECOMPUTE:
        raise UserError(f"chunk_gdn2: recompute is one of {', '.join(RECOMPUTE)}; got {recompute!r}.")
    gate = 0 if not use_gate_in_kernel else 1 if lower_bound is None else 2
    if gate:
        A_log = q.new_zeros(HV, dtype=torch.float32) if A_log is None else A_log.reshape(HV)
        dt_bias = q.new_zeros(HV, K, dtype=torch.float32) if dt_bias is None else dt_bias.reshape(HV, K).contiguous()
    else:
        A_log = dt_bias = None
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    tensors = [x.reshape(B * T, *x.shape[2:]).contiguous() for x in (q, k, v, g, b, w)]
    tensors += [A_log, dt_bias, initial_state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    operator = chunk_gdn2_forward if torch.compiler.is_compiling() else _Eager.apply
    o, final_state, *_ = operator(
        *tensors, cu_seqlens, B, K**-0.5 if scale is None else float(scale), output_final_state,
        use_qk_l2norm_in_kernel, gate, 0.0 if lower_bound is None else float(lower_bound),
        *(float(limit) for limit in sigmoid_ranges or (0.0, 0.0)), recompute,
        None if config is None else config.flat(), keep,
    )  # fmt: skip
    return o.view(B, T, HV, V), final_state if output_final_state else None
