"""chunk_gdn2 by fused kernels: checks, chunk index, launches, autograd.

Two launches forward (prepare, forward scan), four backward (backward scan, score, state and input gradients).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.runtime.interpreter import InterpretedFunction

from lit_gpt.errors import UserError

from .config import TILE, Config, Launch, config_for
from .decay import span_table, span_table_transposed
from .gradients import input_gradients_kernel, score_gradients_kernel, state_gradients_kernel
from .prepare import prepare_kernel
from .scan import backward_scan_kernel, forward_scan_kernel

RECOMPUTE = ("none", "scores", "all")
"""From fastest to smallest: keep everything, recompute the scores, or keep only inputs and output."""


def padded(size: int) -> int:
    """The power of two, at least one tile, that holds a head size."""
    return max(TILE, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie: no chunk crosses a sequence. Built on the device without a host sync, so spare chunks, of
    0 rows, may follow the last."""

    seqlens: torch.Tensor
    """[N + 1] first token of each sequence."""
    first: torch.Tensor
    """[N + 1] first chunk of each sequence."""
    start: torch.Tensor
    """[chunks] first token of each chunk."""
    rows: torch.Tensor
    """[chunks] tokens in each chunk."""


def index_chunks(seqlens: torch.Tensor, chunks: int, C: int) -> Chunks:
    """The chunks of C rows of packed sequences, sequence n being tokens seqlens[n] : seqlens[n + 1]; `chunks` is at
    least their number."""
    seqlens = seqlens.to(torch.int64)
    first = torch.nn.functional.pad(((seqlens.diff() + C - 1) // C).cumsum(0), (1, 0))
    chunk = torch.arange(chunks, device=seqlens.device)
    sequence = (torch.searchsorted(first, chunk, right=True) - 1).clamp(max=seqlens.numel() - 2)
    start = seqlens[sequence] + (chunk - first[sequence]) * C
    rows = (seqlens[sequence + 1] - start).clamp(0, C)
    return Chunks(seqlens.int(), first.int(), start.int(), rows.int())


@functools.lru_cache(maxsize=64)
def index_equal_chunks(B: int, T: int, C: int, device: torch.device) -> Chunks:
    """The chunks of B sequences of T tokens each."""
    return index_chunks(torch.arange(B + 1, device=device) * T, B * triton.cdiv(T, C), C)


@dataclass(frozen=True)
class Options:
    """What carries no gradient."""

    scale: float
    output_final_state: bool
    l2norm: bool
    gate: int
    """0: g is the log-decay. 1: g becomes -exp(A_log) softplus(g + dt_bias). 2: g becomes lower_bound
    sigmoid(exp(A_log) (g + dt_bias))."""
    lower_bound: float
    chunks: Chunks
    config: Config
    dot: torch.dtype
    """Type of the dots' operands; they accumulate in fp32."""

    recompute: str
    """What the backward pass computes again instead of keeping: see RECOMPUTE."""

    def constants(self, q: torch.Tensor, v: torch.Tensor) -> dict:
        """What the kernels know at compile time."""
        K, V = q.shape[-1], v.shape[-1]
        return {
            "H": q.shape[-2],
            "HV": v.shape[-2],
            "K": K,
            "KP": padded(K),
            "V": V,
            "VP": padded(V),
            "BV": TILE,
            "C": self.config.chunk,
            "LEVELS": self.config.chunk.bit_length() - 2,
            "WIDE": self.config.chunk.bit_length() - 5,
            "L2NORM": self.l2norm,
            "GATE": self.gate,
            "DOT": tl.bfloat16 if self.dot == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32",
        }


def _launch(kernel, grid: tuple, launch: Launch, constants: dict, *tensors, **more):
    """Launch with those of the constants that the kernel names."""
    constants = {"BK": launch.tile, "STAGES": launch.stages, **constants, **more}
    named = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kernel[grid](*tensors, **named, num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers)


class Scores(NamedTuple):
    """What prepare.py makes of the chunks; shapes there."""

    Qg: torch.Tensor
    Eg: torch.Tensor
    Kt: torch.Tensor
    A: torch.Tensor
    Aqk: torch.Tensor
    totals: torch.Tensor
    row_scales: torch.Tensor


def prepare(q, k, g, b, A_log, dt_bias, HV: int, const: dict, options: Options) -> Scores:
    """Everything of the chunks that does not need the state."""
    KP, C, at = const["KP"], const["C"], options.chunks
    chunks = len(at.start)
    new, exact = functools.partial(q.new_empty, dtype=options.dot), functools.partial(q.new_empty, dtype=torch.float32)
    Qg, Eg, Kt = (new((chunks, HV, C, KP)) for _ in range(3))
    A, Aqk = (new((chunks, HV, C, C)) for _ in range(2))
    totals, row_scales = exact((chunks, HV, 2, KP)), exact((chunks, HV, 2, C))
    _launch(
        prepare_kernel, (chunks, HV), options.config.prepare, const,
        q, k, b, g, A_log, dt_bias, span_table(C, torch.float16, q.device), at.start, at.rows,
        Qg, Eg, Kt, A, Aqk, totals, row_scales, options.scale, options.lower_bound,
    )  # fmt: skip
    return Scores(Qg, Eg, Kt, A, Aqk, totals, row_scales)


def scan_forward(scores: Scores, v, w, initial_state, const: dict, options: Options, save: bool):
    """o [T, HV, V], the final state if asked for, and if saved the state before each chunk S and R; shapes in
    scan.py."""
    HV, K, KP, V, VP, C = (const[name] for name in ("HV", "K", "KP", "V", "VP", "C"))
    at = options.chunks
    chunks, sequences = len(at.start), len(at.seqlens) - 1
    o = torch.empty_like(v)
    final_state = v.new_empty((sequences, HV, K, V), dtype=torch.float32) if options.output_final_state else None
    S = v.new_empty((chunks, HV, KP, VP), dtype=options.dot) if save else None
    R = v.new_empty((chunks, HV, C, VP), dtype=options.dot) if save else None
    Qg, Eg, Kt, A, Aqk, totals, _ = scores
    _launch(
        forward_scan_kernel, (VP // TILE, sequences * HV), options.config.forward_scan, const,
        Qg, Eg, Kt, A, Aqk, totals, v, w, initial_state, at.seqlens, at.first, o, final_state, S, R,
        HAS_INITIAL=initial_state is not None, WANT_FINAL=final_state is not None, SAVE=save,
    )  # fmt: skip
    return o, final_state, S, R


def backward(q, k, v, g, b, w, A_log, dt_bias, initial_state, o, scores, S, R, do, dfinal_state, const, options):
    """The gradients of q, k, v, g, b, w, A_log, dt_bias and initial_state, None where there is none."""
    H, HV, K, KP, VP, C = (const[name] for name in ("H", "HV", "K", "KP", "VP", "C"))
    at = options.chunks
    chunks, sequences = len(at.start), len(at.seqlens) - 1
    new, exact = functools.partial(q.new_empty, dtype=options.dot), functools.partial(q.new_empty, dtype=torch.float32)
    Qg, Eg, Kt, A, Aqk, totals, row_scales = scores

    dv, dw = torch.empty_like(v), torch.empty_like(w)
    dinitial_state = torch.empty_like(initial_state) if initial_state is not None else None
    dS, dZ = new((chunks, HV, KP, VP)), new((chunks, HV, C, VP))
    _launch(
        backward_scan_kernel, (VP // TILE, sequences * HV), options.config.backward_scan, const,
        Qg, Eg, Kt, A, Aqk, totals, v, w, do, dfinal_state, at.seqlens, at.first, dv, dw, dinitial_state, dS, dZ,
        HAS_FINAL=dfinal_state is not None, WANT_INITIAL=initial_state is not None,
    )  # fmt: skip

    Wq, Wt = (new((chunks, HV, C, C)) for _ in range(2))
    row_sums = exact((chunks, HV, 3, C))
    _launch(
        score_gradients_kernel, (chunks, HV), options.config.score_gradients, const,
        o, do, v, w, dZ, R, at.start, at.rows, Wq, Wt, row_sums,
    )  # fmt: skip

    dQg, dEg, dKt = (new((chunks, HV, C, KP)) for _ in range(3))
    dg_halves = exact((chunks, HV, 2, KP))
    _launch(
        state_gradients_kernel, (KP // TILE, chunks, HV), options.config.state_gradients, const,
        do, dZ, R, S, dS, Qg, Eg, Kt, totals, at.start, at.rows, dQg, dEg, dKt, dg_halves,
    )  # fmt: skip
    del dZ, dS

    # Heads that share a query and key add their gradients in fp32.
    dq, dk = (b.new_empty(b.shape, dtype=x.dtype if HV == H else torch.float32) for x in (q, k))
    db, dg = torch.empty_like(b), torch.empty_like(g)
    dA_log = dbias = None
    if options.gate:  # one sum per program; spare chunks leave theirs at zero
        dA_log = q.new_zeros((chunks, HV, 2 * KP // TILE), dtype=torch.float32)
        dbias = q.new_zeros((chunks, HV, 2, KP), dtype=torch.float32)
    _launch(
        input_gradients_kernel, (2 * KP // TILE, chunks, HV), options.config.input_gradients, const,
        q, k, b, g, A_log, dt_bias, dQg, dEg, dKt, dg_halves, Wq, Wt, row_sums, totals, row_scales,
        span_table(C // 2, torch.float16, q.device), span_table_transposed(C // 2, options.dot, q.device),
        at.start, at.rows,
        dq, dk, db, dg, dA_log, dbias, options.scale, options.lower_bound,
    )  # fmt: skip
    if HV != H:
        dq, dk = (d.view(-1, H, HV // H, K).sum(2).to(x.dtype) for d, x in ((dq, q), (dk, k)))
    if options.gate:
        dA_log = dA_log.sum((0, 2)).to(A_log.dtype)
        dbias = dbias.sum((0, 2))[:, :K].to(dt_bias.dtype)
    return dq, dk, dv, dg, db, dw, dA_log, dbias, dinitial_state


class _ChunkGDN2(torch.autograd.Function):
    """q, k [T, H, K]; v, w [T, HV, V]; g, b [T, HV, K]; A_log [HV]; dt_bias [HV, K]; initial_state [N, HV, K, V] -> o
    [T, HV, V], final_state."""

    @staticmethod
    def forward(ctx, q, k, v, g, b, w, A_log, dt_bias, initial_state, options: Options):
        const = options.constants(q, v)
        train = any(ctx.needs_input_grad)
        scores = prepare(q, k, g, b, A_log, dt_bias, v.shape[-2], const, options)
        save = train and options.recompute != "all"
        o, final_state, S, R = scan_forward(scores, v, w, initial_state, const, options, save)
        if train:
            kept = () if options.recompute != "none" else scores
            ctx.options = options
            ctx.save_for_backward(q, k, v, g, b, w, A_log, dt_bias, initial_state, o, S, R, *kept)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_state):
        q, k, v, g, b, w, A_log, dt_bias, initial_state, o, S, R, *kept = ctx.saved_tensors
        options = ctx.options
        const = options.constants(q, v)
        scores = Scores(*kept) if kept else prepare(q, k, g, b, A_log, dt_bias, v.shape[-2], const, options)
        if S is None:
            _, _, S, R = scan_forward(scores, v, w, initial_state, const, options, save=True)
        do = do.contiguous()
        dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
        inputs = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
        return *backward(*inputs, o, scores, S, R, do, dfinal_state, const, options), None


def _check(q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens, use_gate, lower_bound):
    """One clear line for every argument that does not fit."""
    if q.dim() != 4 or v.dim() != 4:
        raise UserError(
            f"chunk_gdn2 takes q [B, T, H, K] and v [B, T, HV, V]; got {tuple(q.shape)} and {tuple(v.shape)}."
        )
    if not (q.is_cuda or isinstance(prepare_kernel, InterpretedFunction)):
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
    A_log [HV], dt_bias [HV * K]. recompute: what the backward pass computes again rather than
    keeping, "none", "scores" or "all", from fastest to smallest. `config` replaces the fixed configuration, for tuning.

    Returns o [B, T, HV, V] in v's type and the final state [N, HV, K, V] fp32, or None. Raises UserError for
    arguments that do not fit.
    """
    _check(q, k, v, g, b, w, initial_state, A_log, dt_bias, cu_seqlens, use_gate_in_kernel, lower_bound)
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    # The interpreter computes bf16 dots wrongly; fp16 would overflow where the state grows, so it runs in tf32 like
    # fp32.
    dot = torch.bfloat16 if v.dtype == torch.bfloat16 and v.is_cuda else torch.float32
    if recompute not in RECOMPUTE:
        raise UserError(f"chunk_gdn2: recompute is one of {', '.join(RECOMPUTE)}; got {recompute!r}.")
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    config = config or config_for(dot, padded(K), capability)
    if cu_seqlens is None:
        chunks = index_equal_chunks(B, T, config.chunk, q.device)
    else:
        chunks = index_chunks(cu_seqlens, triton.cdiv(T, config.chunk) + cu_seqlens.numel() - 2, config.chunk)
    gate = 0 if not use_gate_in_kernel else 1 if lower_bound is None else 2
    if gate:
        A_log = q.new_zeros(HV, dtype=torch.float32) if A_log is None else A_log.reshape(HV)
        dt_bias = q.new_zeros(HV, K, dtype=torch.float32) if dt_bias is None else dt_bias.reshape(HV, K)
    else:
        A_log = dt_bias = None
    options = Options(
        scale=K**-0.5 if scale is None else float(scale),
        output_final_state=output_final_state,
        l2norm=use_qk_l2norm_in_kernel,
        gate=gate,
        lower_bound=0.0 if lower_bound is None else float(lower_bound),
        chunks=chunks,
        config=config,
        dot=dot,
        recompute=recompute,
    )
    tokens = (x.reshape(B * T, *x.shape[2:]).contiguous() for x in (q, k, v, g, b, w))
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    o, final_state = _ChunkGDN2.apply(*tokens, A_log, dt_bias, initial_state, options)
    return o.view(B, T, HV, V), final_state
