"""The GDN-2 recurrence token by token, in one launch: for decoding and short inputs. One program per (tile of V,
sequence, value head) keeps its state [K, BV] in registers, in fp32.

    S~ = exp(g) * S      r = w * v - S~^T (b * k)      o = scale (S~^T q + (q . k) r)      S' = S~ + k r^T

Both sums over K are of S~, so a token needs one reduction across threads. Nothing but o is allocated and nothing waits
for the host: a CUDA graph can capture it. For one token the traffic is the state, read and written: 8 K V bytes per
sequence and head; q, k, v, g, b, w and o add less than 1/20 of that.
"""

from typing import Optional

import torch
import triton
import triton.language as tl

from .decay import log_decay

ZEROS, GIVEN, IN_PLACE = 0, 1, 2  # where the state starts from


@triton.jit(do_not_specialize=["T"])
def decode_kernel(
    q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, o, state,
    T, scale, lower_bound, b_range, w_range,
    q_b, q_t, q_h, q_d, k_b, k_t, k_h, k_d, v_b, v_t, v_h, v_d,
    g_b, g_t, g_h, g_d, b_b, b_t, b_h, b_d, w_b, w_t, w_h, w_d,
    bias_h, bias_d, i_n, i_h, i_k: tl.constexpr, i_v: tl.constexpr, s_n, s_h, s_k: tl.constexpr, s_v: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    START: tl.constexpr, WANT_STATE: tl.constexpr, PACKED: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Reads q, k [B, T, H, K], v, w [B, T, HV, V], g, b [B, T, HV, K] of any strides, A_log [HV], dt_bias [HV, K],
    the first states [N, HV, K, V]. Writes o [B, T, HV, V], contiguous, and the last states into `state`."""
    n, hv = (tl.program_id(1) // HV).to(tl.int64), tl.program_id(1) % HV
    h = hv // (HV // H)
    d, c = tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    in_k, in_v = d < K, c < V
    in_state = in_k[:, None] & in_v[None, :]
    if PACKED:
        row, begin, end = 0, tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)
    else:
        row, begin, end = n, 0, T

    at_state = n * s_n + hv * s_h + d[:, None] * s_k + c[None, :] * s_v
    S = tl.zeros([KP, BV], tl.float32)
    if START == 1:
        S += tl.load(initial_state + n * i_n + hv * i_h + d[:, None] * i_k + c[None, :] * i_v, in_state, 0.0)
    elif START == 2:
        S += tl.load(state + at_state, in_state, 0.0)
    a_log, bias = 0.0, 0.0
    if GATE > 0:
        a_log = tl.load(A_log + hv).to(tl.float32)
        bias = tl.load(dt_bias + hv * bias_h + d * bias_d, in_k, 0.0).to(tl.float32)

    for t in range(begin, end):
        q_ = tl.load(q + row * q_b + t * q_t + h * q_h + d * q_d, in_k, 0.0).to(tl.float32)
        k_ = tl.load(k + row * k_b + t * k_t + h * k_h + d * k_d, in_k, 0.0).to(tl.float32)
        g_ = tl.load(g + row * g_b + t * g_t + hv * g_h + d * g_d, in_k, 0.0).to(tl.float32)
        b_ = tl.load(b + row * b_b + t * b_t + hv * b_h + d * b_d, in_k, 0.0).to(tl.float32)
        v_ = tl.load(v + row * v_b + t * v_t + hv * v_h + c * v_d, in_v, 0.0).to(tl.float32)
        w_ = tl.load(w + row * w_b + t * w_t + hv * w_h + c * w_d, in_v, 0.0).to(tl.float32)
        if L2NORM:
            q_ *= tl.rsqrt(tl.sum(q_ * q_) + 1e-6)
            k_ *= tl.rsqrt(tl.sum(k_ * k_) + 1e-6)
        if SIGMOID:
            b_, w_ = b_range * tl.sigmoid(b_), w_range * tl.sigmoid(w_)
        S *= tl.exp(log_decay(g_, a_log, bias, lower_bound, GATE))[:, None]
        r = w_ * v_ - tl.sum((b_ * k_)[:, None] * S, 0)
        out = scale * (tl.sum(q_[:, None] * S, 0) + tl.sum(q_ * k_) * r)
        S += k_[:, None] * r[None, :]
        tl.store(o + ((row * T + t) * HV + hv) * V + c, out.to(o.dtype.element_ty), in_v)
    if WANT_STATE:
        tl.store(state + at_state, S, in_state)


@torch.library.custom_op("lit_gpt::recurrent_gdn2", mutates_args=("o", "state"))
def recurrent_gdn2_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    A_log: Optional[torch.Tensor],
    dt_bias: Optional[torch.Tensor],
    initial_state: Optional[torch.Tensor],
    cu_seqlens: Optional[torch.Tensor],
    o: torch.Tensor,
    state: Optional[torch.Tensor],
    scale: float,
    in_place: bool,
    l2norm: bool,
    use_gate: bool,
    lower_bound: Optional[float],
    sigmoid_ranges: Optional[list[float]],
) -> None:
    """Fill o [B, T, HV, V], and `state` [N, HV, K, V] with the last states; in place: `state` holds the first ones.

    The arguments are those of `fused_recurrent_gdn2`, checked, and may have any strides, but o must be contiguous.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    KP = triton.next_power_of_2(K)
    # One warp has no barriers to wait at. Narrow tiles keep the device busy where states are few, wide ones share the
    # work on q, k, g and b; a thread's registers allow 32 of 128 rows.
    columns = sequences * HV * V
    BV = min(8 if columns < 8192 else 16 if columns < 65536 else 32, max(4096 // KP, 8))
    start = IN_PLACE if in_place else ZEROS if initial_state is None else GIVEN
    gate = 0 if not use_gate else 1 if lower_bound is None else 2
    if gate:
        A_log = q.new_zeros(HV, dtype=torch.float32) if A_log is None else A_log
        dt_bias = q.new_zeros(1, 1).expand(HV, K) if dt_bias is None else dt_bias.reshape(HV, K)
    b_range, w_range = (1.0, 1.0) if sigmoid_ranges is None else sigmoid_ranges
    strides = [stride for x in (q, k, v, g, b, w) for stride in x.stride()]
    strides += dt_bias.stride() if gate else (0, 0)
    for x in (initial_state, state):
        strides += (0, 0, 0, 0) if x is None else x.stride()
    decode_kernel[(triton.cdiv(V, BV), sequences * HV)](
        q, k, v, g, b, w, A_log, dt_bias, initial_state, cu_seqlens, o, state,
        T, scale, lower_bound or 0.0, b_range, w_range, *strides,
        H=H, HV=HV, K=K, KP=KP, V=V, BV=BV, START=start, WANT_STATE=state is not None, PACKED=cu_seqlens is not None,
        L2NORM=l2norm, GATE=gate, SIGMOID=sigmoid_ranges is not None,
        num_warps=max(1, KP // 256),
    )  # fmt: skip
