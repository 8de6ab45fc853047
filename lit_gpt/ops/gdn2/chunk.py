"""Chunked GDN-2: forward and hand-written backward, exact for every decay from 0 to -inf.

One chunk of C tokens has rows q (times scale), k, e = b*k [C, K] and z = w*v [C, V]; S [K, V] is the state before it.

    Aqk_ij = sum_d q_id decay_d(i, j) k_jd  (i >= j),   T_ij = sum_d e_id decay_d(i, j) k_jd  (i > j),   A = (I + T)^-1
    R = A (z - eg S),   O = qg S + Aqk R,   S' = total*S + kt^T R

decay(i, j) is the product of exp g over j < s <= i, total that of the whole chunk; qg, eg are q, e decayed from the
chunk's start to their row, kt is k decayed from its row to the chunk's end. Backward, from dO and dS':

    dR = Aqk^T dO + kt dS',   dz = A^T dR,   dS = total*dS' + qg^T dO - eg^T dz
    dAqk = dO R^T,   dT = -dz R^T,   dqg = dO S^T,   deg = -dz S^T,   dkt = R dS'^T

Scores go by levels. Every pair i > j lies in one couple (odd block i, even block j) of h rows, for one h of 1, 2, 4,
... C/2. The decay between them is (start of the odd block to i) x (j to the end of the even block), so one matmul per
level gives them all; going from h to 2h multiplies q, e in odd blocks by the total of the even block, and k in even
blocks by the total of the odd block. All factors are products of exp g <= 1, never a quotient or a difference of sums:
nothing overflows, g = -inf is legal, and the gradient of g, the reverse of those products, is free of cancellation.

Shapes: M = chunks x heads. q and e always meet the same matrices: their rows alternate in one tensor qe [M, C, 2, K].
"""

from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

CHUNK = 64


class Scores(NamedTuple):
    """What the scan reads of a chunk besides its values."""

    qe: Tensor  # [M, C, 2, K]: rows of qg and eg
    kt: Tensor  # [M, C, K]
    total: Tensor  # [M, K]
    Aqk: Tensor  # [M, C, C]
    A: Tensor  # [M, C, C]


def levels(C: int) -> Iterator[int]:
    """Block sizes 1, 2, 4, ... C/2."""
    h = 1
    while h < C:
        yield h
        h *= 2


def couples(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Even and odd blocks of h tokens: views [M * C / 2h, h, D] of x [M, C, D]; with 2h rows of x [M, C, 2, D]."""
    rows = h if x.ndim == 3 else 2 * h
    return x.view(-1, 2, rows, x.shape[-1]).unbind(1)


def lower_blocks(x: Tensor, h: int) -> Tensor:
    """The h x h blocks of x [M, C, C] between the odd and the even block of each couple: a view [M, C / 2h, h, h]."""
    M, C, _ = x.shape
    n = C // (2 * h)
    return x.view(M, n, 2, h, n, 2, h)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def scores(qe: Tensor, k: Tensor, decay: Tensor) -> Scores:
    """Scores, inverse and decayed q, e, k of all chunks. decay = exp g [M, C, K]; qe and k are overwritten."""
    M, C, K = k.shape
    Aqk = k.new_zeros(M, C, C)
    torch.sum(qe[:, :, 0] * k, -1, out=Aqk.diagonal(dim1=1, dim2=2))
    A, total = k.new_ones(M * C, 1, 1), decay
    qe *= decay[:, :, None]
    for h in levels(C):
        (_, qe_odd), (k_even, _), (total_even, total_odd) = couples(qe, h), couples(k, h), couples(total, 1)
        qk, T = torch.bmm(qe_odd, k_even.mT).view(-1, h, 2, h).unbind(2)
        lower_blocks(Aqk, h).copy_(qk.view(M, -1, h, h))
        A = merge_inverses(A, T)
        qe_odd *= total_even
        k_even *= total_odd
        total = (total_even * total_odd).view(M, -1, K)
    return Scores(qe, k, total[:, 0], Aqk, A)


def merge_inverses(A: Tensor, T: Tensor) -> Tensor:
    """From the inverses A [2n, h, h] of the diagonal blocks and T [n, h, h] below them, the inverses [n, 2h, 2h]."""
    n, h, _ = T.shape
    even, odd = A.view(n, 2, h, h).unbind(1)
    merged = A.new_zeros(n, 2 * h, 2 * h)
    merged[:, :h, :h] = even
    merged[:, h:, h:] = odd
    merged[:, h:, :h] = torch.bmm(odd, torch.bmm(T, even)).neg_()
    return merged


def forward(s: Scores, z: Tensor, S: Tensor, steps: list[slice]) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: O, R [M, C, V] and the state before each chunk [M, K, V]. S: first states in, last states out."""
    R, states = torch.empty_like(z), z.new_empty(len(z), *S.shape[1:])
    eg = s.qe[:, :, 1]
    for rows in steps:
        running = S[: rows.stop - rows.start]
        states[rows] = running
        torch.bmm(s.A[rows], torch.baddbmm(z[rows], eg[rows], running, alpha=-1), out=R[rows])
        running.mul_(s.total[rows, :, None]).baddbmm_(s.kt[rows].mT, R[rows])
    O = torch.bmm(s.qe[:, :, 0], states).baddbmm_(s.Aqk, R)
    return O, R, states


def backward(s: Scores, R: Tensor, states: Tensor, D: Tensor, dS: Tensor, steps: list[slice]) -> tuple[Tensor, ...]:
    """The reverse scan: gradients of z, qe, kt and log total. dS: those of the last states in, of the first states out.

    D [M, C, 2, V] holds rows of dO and -dz, the two that meet the rows of qe; dO is given, -dz is filled in.
    """
    M, C, V = R.shape
    dR, dz, dstates = torch.bmm(s.Aqk.mT, D[:, :, 0]), torch.empty_like(R), torch.empty_like(states)
    qe, D_rows = s.qe.view(M, 2 * C, -1), D.view(M, 2 * C, V)
    for rows in reversed(steps):
        running = dS[: rows.stop - rows.start]
        dstates[rows] = running
        torch.bmm(s.A[rows].mT, dR[rows].baddbmm_(s.kt[rows], running), out=dz[rows])
        torch.neg(dz[rows], out=D[rows, :, 1])
        running.mul_(s.total[rows, :, None]).baddbmm_(qe[rows].mT, D_rows[rows])
    dqe = torch.bmm(D_rows, states.mT).view_as(s.qe)
    return dz, dqe, torch.bmm(R, dstates.mT), s.total * (states * dstates).sum(-1)


def scores_backward(
    s: Scores, qe: Tensor, k: Tensor, decay: Tensor, D: Tensor, R: Tensor, dqe: Tensor, dk: Tensor, dtotal: Tensor
) -> Tensor:
    """The reverse of `scores`, with result s and inputs qe, k, decay; the gradient of its scores is D R^T.

    dqe, dk, dtotal: gradients of s.qe, s.kt, log s.total. dqe and dk become those of qe and k; returns dg [M, C, K].
    A factor's log gets x = q*dq + e*de, or y = k*dk, summed over the rows it multiplied: no subtraction anywhere.
    """
    M, C, K = k.shape
    x, y = pair_product(s.qe, dqe), s.kt * dk
    diagonal = (D[:, :, 0] * R).sum(-1, keepdim=True)
    dq_diagonal, dk_diagonal = k * diagonal, qe[:, :, 0] * diagonal

    qe *= decay[:, :, None]
    total, sweep = decay, []
    for h in levels(C):  # up: what each level's matmul gives back to its operands
        (_, qe_odd), (k_even, _), (total_even, total_odd) = couples(qe, h), couples(k, h), couples(total, 1)
        d = torch.bmm(couples(D, h)[1], couples(R, h)[0].mT)
        dqe_odd, dk_even = small_bmm(d, k_even), small_bmm(d.mT, qe_odd)
        x_odd = pair_product(qe_odd.unflatten(1, (h, 2)), dqe_odd.view(-1, h, 2, K))
        sweep.append((h, total_even, total_odd, dqe_odd, dk_even, x_odd, k_even * dk_even))
        qe_odd *= total_even
        k_even *= total_odd
        total = (total_even * total_odd).view(M, -1, K)

    dlog = dtotal
    for h, total_even, total_odd, dqe_odd, dk_even, x_odd, y_even in reversed(sweep):  # down: through the decays
        x_below, y_above = couples(x, h)[1], couples(y, h)[0]
        dlog_halves = dlog.new_empty(len(dlog), 2, K)
        torch.add(dlog, x_below.sum(1), out=dlog_halves[:, 0])
        torch.add(dlog, y_above.sum(1), out=dlog_halves[:, 1])
        dlog = dlog_halves.view(-1, K)
        x_below += x_odd
        y_above += y_even
        dqe_below, dk_above = couples(dqe, h)[1], couples(dk, h)[0]
        torch.addcmul(dqe_odd, dqe_below, total_even, out=dqe_below)
        torch.addcmul(dk_even, dk_above, total_odd, out=dk_above)
    dqe *= decay[:, :, None]
    dqe[:, :, 0] += dq_diagonal
    dk += dk_diagonal
    return x.add_(dlog.view_as(x))


def pair_product(x: Tensor, y: Tensor) -> Tensor:
    """x*y summed over the pair q, e: [..., 2, K] -> [..., K]."""
    return (x[..., 0, :] * y[..., 0, :]).addcmul_(x[..., 1, :], y[..., 1, :])


def small_bmm(x: Tensor, y: Tensor) -> Tensor:
    """x [n, a, c] @ y [n, c, d]; as c outer products where c is so small that matrix multiplication crawls."""
    if x.shape[-1] > 4:
        return torch.bmm(x, y)
    out = x[:, :, :1] * y[:, :1]
    for i in range(1, x.shape[-1]):
        out.addcmul_(x[:, :, i : i + 1], y[:, i : i + 1])
    return out


class ChunkGDN2(torch.autograd.Function):
    """q, k, g, b [B, T, H, K], v, w [B, T, H, V], first states [N, H, K, V] -> o in v's dtype, last states.

    Computes in the dtype of the states, under autocast too.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, b, w, initial_state, scale, layout):
        dtype, (H, K), V = initial_state.dtype, q.shape[2:], v.shape[3]
        with torch.autocast(q.device.type, enabled=False):
            s = scores(*keys_in_chunks(layout, dtype, q, k, g, b, scale))
            v_, w_ = layout.split(v.to(dtype)), layout.split(w.to(dtype))
            z = torch.mul(v_, w_, out=v_.new_empty(v_.shape))
            S = layout.to_scan_order(initial_state).reshape(-1, K, V)
            O, R, states = forward(s, z.view(-1, layout.chunk, V), S, layout.steps(H))
            ctx.save_for_backward(q, k, v, g, b, w, *s, R, states)
            ctx.scale, ctx.layout = scale, layout
            return layout.join(O.view(z.shape)).to(v.dtype), layout.from_scan_order(S.view(-1, H, K, V))

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_state):
        q, k, v, g, b, w, *s, R, states = ctx.saved_tensors
        s, layout, dtype, (H, K), V = Scores(*s), ctx.layout, states.dtype, q.shape[2:], v.shape[3]
        with torch.autocast(q.device.type, enabled=False):
            k_, b_, v_, w_ = (layout.split(x.to(dtype)) for x in (k, b, v, w))
            D = R.new_empty(*v_.shape[:-1], 2, V)
            D[..., 0, :] = layout.split(do)
            D = D.view(-1, layout.chunk, 2, V)
            dS = layout.to_scan_order(dfinal_state.to(dtype)).reshape(-1, K, V)
            dz, dqe, dk, dtotal = backward(s, R, states, D, dS, layout.steps(H))
            keys = keys_in_chunks(layout, dtype, q, k, g, b, ctx.scale)
            dg = scores_backward(s, *keys, D, R, dqe, dk, dtotal)
            dq, de = dqe.view(*k_.shape[:-1], 2, K).unbind(-2)
            dk, dg, dz = dk.view(k_.shape), dg.view(k_.shape), dz.view(v_.shape)
            grads = (dq * ctx.scale, b_ * de + dk, w_ * dz, dg, k_ * de, v_ * dz)
            grads = [layout.join(grad).to(x.dtype) for grad, x in zip(grads, (q, k, v, g, b, w))]
            return *grads, layout.from_scan_order(dS.view(-1, H, K, V)), None, None


def keys_in_chunks(layout: ChunkLayout, dtype, q, k, g, b, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """qe = (scale * q, b * k) [M, C, 2, K], k and exp g [M, C, K], in fresh memory."""
    q, k, g, b = (layout.split(x.to(dtype)) for x in (q, k, g, b))
    C, K = k.shape[-2:]
    qe, k_, decay = k.new_empty(*k.shape[:-1], 2, K), k.new_empty(k.shape), k.new_empty(k.shape)
    torch.mul(q, scale, out=qe[..., 0, :])
    torch.mul(b, k, out=qe[..., 1, :])
    torch.exp(g, out=decay)
    return qe.view(-1, C, 2, K), k_.copy_(k).view(-1, C, K), decay.view(-1, C, K)


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: Optional[float] = None,
    initial_state: Optional[Tensor] = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Optional[Tensor] = None,
    cu_seqlens_cpu: Optional[Tensor] = None,
    safe_gate: bool = False,
    lower_bound: Optional[float] = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: None = None,
    A_log: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    chunk_size: int = CHUNK,
    sigmoid_ranges: Optional[tuple[float, float]] = None,
    recompute: str = "none",
) -> tuple[Tensor, Optional[Tensor]]:
    """Gated Delta Rule-2 over whole sequences, chunk by chunk; differentiable once in every tensor.

    Any device, any floating dtypes, also mixed and under autocast; computed in float32 (float64 if an input is). CUDA
    tensors run the Triton kernels of lit_gpt/ops/gdn2/kernels, with float64 among them the plain path below.

    Args:
        q, k: [B, T, H, K].
        v, w: values and write gate [B, T, HV, V], HV a multiple of H (value head i reads query/key head i // (HV / H)).
        g, b: log-decay (<= 0, -inf allowed) and erase gate [B, T, HV, K]. b and w come after their sigmoid.
        scale: factor on q; K^-0.5 by default.
        initial_state: [N, HV, K, V], float32 or float64; zeros by default. N = B, or the number of packed sequences.
        output_final_state: return the state after the last token of each sequence.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum x^2 + 1e-6) over K first.
        use_gate_in_kernel: g is raw; the log-decay is -exp(A_log) softplus(g + dt_bias), or with lower_bound
            lower_bound * sigmoid(exp(A_log) (g + dt_bias)). A_log [HV] (or None, with lower_bound), dt_bias [HV * K].
        cu_seqlens: offsets [N+1] of sequences packed into B = 1.
        cu_seqlens_cpu: the same in host memory, sparing the plain path a wait for the device; the kernels never wait.
        safe_gate: the caller's word that g >= lower_bound. Any g is exact here, so the result is the same either way.
        disable_recompute: fla-core's word for recompute="none", which is the default here.
        state_v_first: initial and final state are [N, HV, V, K].
        chunk_size: 64, the only size there is.
        sigmoid_ranges: ranges of b and w, which are then raw: they become range * sigmoid(raw).
        recompute: what the kernels' backward pass computes again rather than keeping, from fastest to smallest: "none",
            "scores" (all of a chunk that does not need the state) or "all" (the states too).

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] (float32, float64 for float64) or None.

    Raises:
        UserError: shapes, devices or options that do not fit; cp_context or return_intermediate_states asked for.
    """
    if cp_context is not None:
        raise UserError(
            "chunk_gdn2 has no context parallelism; leave cp_context out and give each rank whole sequences."
        )
    if return_intermediate_states:
        raise UserError(
            "chunk_gdn2 returns no states in between; call it piece by piece with initial_state, output_final_state."
        )
    if chunk_size != CHUNK:
        raise UserError(f"chunk_size must be {CHUNK}, got {chunk_size}.")
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    check_gate(use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias, g)
    if runs_fused(q, k, v, g, b, w):
        from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused  # imports Triton, which CPU builds of PyTorch lack

        gate = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound} if use_gate_in_kernel else {}
        options = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel, "use_gate_in_kernel": use_gate_in_kernel, **gate}
        options |= {"sigmoid_ranges": sigmoid_ranges, "recompute": recompute}
        o, state = chunk_gdn2_fused(
            q, k, v, g, b, w, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **options
        )
        return o, state.transpose(-1, -2).contiguous() if state_v_first and output_final_state else state
    offsets = sequence_offsets(cu_seqlens, cu_seqlens_cpu)
    check_inputs(q, k, v, g, b, w, initial_state, offsets)
    HV, K, V = v.shape[2], q.shape[3], v.shape[3]
    if use_gate_in_kernel:
        g = activate_gate(g, A_log, dt_bias, lower_bound)
    if sigmoid_ranges is not None:
        b, w = (limit * torch.sigmoid(x.to(accumulation_dtype(x))) for limit, x in zip(sigmoid_ranges, (b, w)))
    if use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    layout = ChunkLayout(q.shape[:2], CHUNK, offsets, q.device)
    dtype = accumulation_dtype(q, k, v, g, b, w)
    state = q.new_zeros(layout.sequences, HV, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    scale = K**-0.5 if scale is None else scale
    o, state = ChunkGDN2.apply(repeat_heads(q, HV), repeat_heads(k, HV), v, g, b, w, state, scale, layout)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2).contiguous() if state_v_first else state
