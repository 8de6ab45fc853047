"""The GDN-2 recurrence token by token: its definition, and a form for decoding.

    S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = scale S_t^T q_t

This is eq. 10 of arXiv 2605.22791 with a scale on q.
"""

from itertools import pairwise
from typing import Optional

import torch

from lit_gpt.errors import UserError
from lit_gpt.ops.dispatch import runs_fused
from lit_gpt.ops.gdn2.inputs import (
    accumulation_dtype,
    activate_gate,
    check_gate,
    check_inputs,
    l2_normalize,
    repeat_heads,
    sequence_offsets,
)
from lit_gpt.ops.gdn2.layout import ChunkLayout


def naive_recurrent_gdn2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[torch.Tensor] = None,
    output_final_state: bool = False,
    cu_seqlens: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The definition of the operator, written to be read; differentiable by autograd. Slow: one step per token.

    q, k [B, T, H, K]; g, b [B, T, HV, K]; v, w [B, T, HV, V] with HV a multiple of H; states [N, HV, K, V]; scale
    defaults to K^-0.5; cu_seqlens [N+1] bounds N sequences packed into B = 1. Returns o [B, T, HV, V] in v's dtype and
    the final state (None unless asked for), computed in float32 (float64 for float64). Raises UserError where shapes do
    not fit.
    """
    offsets = sequence_offsets(cu_seqlens)
    check_inputs(q, k, v, g, b, w, initial_state, offsets)
    (B, T, HV, V), K, out_dtype = v.shape, q.shape[3], v.dtype
    spans = [(n, 0, T) for n in range(B)] if offsets is None else [(0, *span) for span in pairwise(offsets)]
    dtype = accumulation_dtype(q, k, v, g, b, w)
    q, k = repeat_heads(q, HV), repeat_heads(k, HV)
    q, k, v, g, b, w = (x.to(dtype) for x in (q, k, v, g, b, w))
    scale = K**-0.5 if scale is None else scale

    outputs, states = [], []
    for n, (row, start, end) in enumerate(spans):
        S = q.new_zeros(HV, K, V) if initial_state is None else initial_state[n].to(dtype)
        for t in range(start, end):
            q_t, k_t, v_t, g_t, b_t, w_t = (x[row, t, :, :, None] for x in (q, k, v, g, b, w))
            S = g_t.exp() * S
            erased = ((b_t * k_t) * S).sum(1)
            S = S + k_t * (w_t[..., 0] * v_t[..., 0] - erased)[:, None]
            outputs.append(scale * (q_t * S).sum(1))
        states.append(S)
    o = torch.stack(outputs).view(B, T, HV, V).to(out_dtype)
    return o, torch.stack(states) if output_final_state else None


def fused_recurrent_gdn2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    A_log: Optional[torch.Tensor] = None,
    dt_bias: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
    initial_state: Optional[torch.Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: Optional[float] = None,
    state_v_first: bool = False,
    cu_seqlens: Optional[torch.Tensor] = None,
    sigmoid_ranges: Optional[tuple[float, float]] = None,
    inplace_final_state: bool = False,
    out: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The recurrence for decoding: token by token, all sequences and heads at once. Inference only: it has no backward.

    Arguments, shapes and results are those of `chunk_gdn2`, and these:

    Args:
        sigmoid_ranges: ranges of b and w, which are then raw: they become range * sigmoid(raw).
        inplace_final_state: write the final state over initial_state, and return that.
        out: where to write o, contiguous, of the shape and dtype of v.

    CUDA tensors run one Triton kernel (kernels/decode.py), which reads strided inputs where they are; given `out` and
    a state in place it allocates nothing, and it never waits for the host. With float64 among the tensors, and on other
    devices, it is the plain code below. Raises UserError where shapes or options do not fit, and where a gradient would
    be needed.
    """
    tensors = (q, k, v, g, b, w, A_log, dt_bias, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise UserError(
            "fused_recurrent_gdn2 has no backward; train with chunk_gdn2, or call it under torch.no_grad()."
        )
    if inplace_final_state and initial_state is None:
        raise UserError("inplace_final_state=True writes over initial_state; pass one.")
    first = initial_state.transpose(-1, -2) if state_v_first and initial_state is not None else initial_state
    fused = runs_fused(*(x for x in tensors if x is not None))
    offsets = cu_seqlens if fused else sequence_offsets(cu_seqlens)
    check_inputs(q, k, v, g, b, w, first, offsets)
    check_gate(use_gate_in_kernel, False, lower_bound, A_log, dt_bias, g)
    if out is not None and (out.shape != v.shape or out.dtype != v.dtype or not out.is_contiguous()):
        raise UserError(f"out must be contiguous, {v.dtype} {list(v.shape)}; got {out.dtype} {list(out.shape)}.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not fused:
        if sigmoid_ranges is not None:
            b, w = (limit * torch.sigmoid(x.to(accumulation_dtype(x))) for limit, x in zip(sigmoid_ranges, (b, w)))
        if use_gate_in_kernel:
            g = activate_gate(g, A_log, dt_bias, lower_bound)
        if use_qk_l2norm_in_kernel:
            q, k = l2_normalize(q), l2_normalize(k)
        o, last = _recurrent(q, k, v, g, b, w, scale, first, offsets)
        if out is not None:
            o = out.copy_(o)
        if inplace_final_state:
            first.copy_(last)
            return o, initial_state
        if not output_final_state:
            return o, None
        return o, last.transpose(-1, -2).contiguous() if state_v_first else last

    from lit_gpt.ops.gdn2.kernels.decode import recurrent_gdn2_fused  # imports Triton, which CPU builds of PyTorch lack

    o = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    state = initial_state if inplace_final_state else None
    if output_final_state and state is None:
        sequences, (HV, V), K = q.shape[0] if offsets is None else len(offsets) - 1, v.shape[2:], q.shape[3]
        shape = (sequences, HV, V, K) if state_v_first else (sequences, HV, K, V)
        state = torch.empty(shape, dtype=torch.float32, device=v.device)
    last = state.transpose(-1, -2) if state_v_first and state is not None else state
    recurrent_gdn2_fused(
        q, k, v, g, b, w, A_log, dt_bias, None if inplace_final_state else first, cu_seqlens, o, last,
        scale, inplace_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound,
        None if sigmoid_ranges is None else list(sigmoid_ranges),
    )  # fmt: skip
    return o, state


def _recurrent(q, k, v, g, b, w, scale, initial_state, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence in plain PyTorch, gates and norms done: o [B, T, HV, V], last states [N, HV, K, V]."""
    (HV, V), K, out_dtype = v.shape[2:], q.shape[3], v.dtype
    dtype = accumulation_dtype(q, k, v, g, b, w)
    q, k = repeat_heads(q, HV), repeat_heads(k, HV)
    q, k, v, g, b, w = (x.to(dtype) for x in (q, k, v, g, b, w))
    layout = ChunkLayout(q.shape[:2], 1, offsets, q.device)
    rows_of = lambda x: layout.split(x).flatten(0, 2)
    q, k, e, z, decay = rows_of(q * scale), rows_of(k), rows_of(b * k), layout.split(w * v), rows_of(g.exp())
    chunks, z = z.shape, z.flatten(0, 2)
    S = q.new_zeros(layout.sequences, HV, K, V) if initial_state is None else initial_state.to(dtype)
    S, o = layout.to_scan_order(S).reshape(-1, K, V), torch.empty_like(z)
    with torch.autocast(q.device.type, enabled=False):
        for rows in layout.steps(HV):
            running = S[: rows.stop - rows.start]
            running.mul_(decay[rows].mT)
            running.baddbmm_(k[rows].mT, torch.baddbmm(z[rows], e[rows], running, alpha=-1))
            torch.bmm(q[rows], running, out=o[rows])
    return layout.join(o.view(chunks)).to(out_dtype), layout.from_scan_order(S.view(-1, HV, K, V))
