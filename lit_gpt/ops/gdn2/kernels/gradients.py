"""Backward, second half: dq, dk, db, dg of every chunk, all chunks in parallel.

score_gradients_kernel, one program per (chunk, value head), from do, dz, R:

    dAqk = tril(do R^T)      dT = -stril(dz R^T)

stored as symmetric matrices Wq, Wt (the lower triangle mirrored, the diagonal left out), the diagonal of dAqk apart.
For the L2 norms it adds the two row sums that take out what points along q and k:

    sum_K q dq = sum_V o do      sum_K k dk = sum_V dz (2 R - w v)

state_gradients_kernel, one program per (tile of K, chunk, value head), S before and dS' after the chunk:

    dQg = do S^T      dEg = -dz S^T      dKt = R dS'^T

and what reaches dg of a whole half at once: through the chunk's decay, through the heads of the later half, through
the tails of the earlier half.

input_gradients_kernel, one program per (tile of K and half of a chunk, value head), tiles [BK, N], channel by row: the
rest, across the halves and, within a half, from its ends to its rows and level by level. Each step has a factor f, and
takes rows decayed by it, q and e in the later part (odd blocks), k in the earlier (even ones) (Yq: q or k, Ye: e or k),
and those of Wq and Wt that belong to it:

    P = Yq Wq     R = Ye Wt     later rows: dq += f P, de += f R     earlier rows: dk += f (P + R)
    every row: f df = Yq P + Ye R

dg sums f df of every factor over its span (decay.py). Then db = k de, dk += b de, and the chain through the L2 norm
and the gate.
"""

import triton
import triton.language as tl

from .decay import (
    dot_split,
    gate,
    gate_backward,
    log_decay,
    log_decay_backward,
    span_factor_transposed,
    span_sum_transposed,
    split_log2,
)


@triton.jit
def score_gradients_kernel(
    o, do, v, w, dZ, R, chunk_start, chunk_rows,
    Wq, Wt, row_sums,
    HV: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    L2NORM: tl.constexpr, W_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads do [T, HV, V], dZ, R [chunks, HV, C, VP] (o, v, w too with L2NORM). Writes Wq, Wt [chunks, HV, C, C] and
    row_sums [chunks, HV, 3, C] fp32: diagonal of dAqk, sum_K q dq, sum_K k dk."""
    n, hv = tl.program_id(0), tl.program_id(1)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if rows == 0:
        return
    i = tl.arange(0, C)
    row, col = i[:, None], i[None, :]
    base = n.to(tl.int64) * HV + hv
    first = (start * HV + hv) * V
    o += first
    do += first
    v += first
    w += first
    dZ += base * C * VP
    R += base * C * VP
    Wq += base * C * C
    Wt += base * C * C
    row_sums += base * 3 * C
    dAqk, dAqk_t = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dT, dT_t = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    diagonal, q_dq, k_dk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for s in range(0, VP, BV):
        c = s + tl.arange(0, BV)
        mask = (i < rows)[:, None] & (c < V)[None, :]
        at = row * (HV * V) + c[None, :]
        local = row * VP + c[None, :]
        dout = tl.load(do + at, mask, 0.0).to(DOT)
        r, dz = tl.load(R + local), tl.load(dZ + local)
        dAqk = tl.dot(dout, tl.trans(r), dAqk, input_precision=PRECISION)
        dAqk_t = tl.dot(r, tl.trans(dout), dAqk_t, input_precision=PRECISION)
        dT = tl.dot(dz, tl.trans(r), dT, input_precision=PRECISION)
        dT_t = tl.dot(r, tl.trans(dz), dT_t, input_precision=PRECISION)
        r32, dz32, do32 = r.to(tl.float32), dz.to(tl.float32), dout.to(tl.float32)
        diagonal += tl.sum(do32 * r32, 1)
        if L2NORM:
            ws = gate(tl.load(w + at, mask, 0.0), W_RANGE).to(tl.float32)
            z = tl.load(v + at, mask, 0.0).to(tl.float32) * ws
            q_dq += tl.sum(do32 * tl.load(o + at, mask, 0.0).to(tl.float32), 1)
            k_dk += tl.sum(dz32 * (2.0 * r32 - z), 1)
    at = row * C + col
    tl.store(Wq + at, tl.where(row > col, dAqk, tl.where(row < col, dAqk_t, 0.0)).to(DOT))
    tl.store(Wt + at, tl.where(row > col, -dT, tl.where(row < col, -dT_t, 0.0)).to(DOT))
    tl.store(row_sums + i, diagonal)
    if L2NORM:
        tl.store(row_sums + C + i, q_dq)
        tl.store(row_sums + 2 * C + i, k_dk)


@triton.jit
def state_gradients_kernel(
    do, dZ, R, S, dS, Qg, Eg, Kt, decays, chunk_start, chunk_rows,
    dQg, dEg, dKt, dg_halves,
    HV: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads do [T, HV, V] and, per chunk, dZ, R, S, dS, Qg, Eg, Kt, decays. Writes dQg, dEg, dKt [chunks, HV, C, KP]
    and dg_halves [chunks, HV, 2, KP] fp32."""
    tile, n, hv = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if rows == 0:
        return
    base = n.to(tl.int64) * HV + hv
    do += (start * HV + hv) * V
    dZ += base * C * VP
    R += base * C * VP
    S += base * KP * VP
    dS += base * KP * VP
    i, d = tl.arange(0, C), tile * BK + tl.arange(0, BK)
    dq, de, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    S_dS = tl.zeros([BK], tl.float32)
    for s in range(0, VP, BV):
        c = s + tl.arange(0, BV)
        local = i[:, None] * VP + c[None, :]
        dout = tl.load(do + i[:, None] * (HV * V) + c[None, :], (i < rows)[:, None] & (c < V)[None, :], 0.0).to(DOT)
        dz, r = tl.load(dZ + local), tl.load(R + local)
        s0, ds1 = tl.load(S + d[:, None] * VP + c[None, :]), tl.load(dS + d[:, None] * VP + c[None, :])
        dq = tl.dot(dout, tl.trans(s0), dq, input_precision=PRECISION)
        de = tl.dot(dz, tl.trans(s0), de, input_precision=PRECISION)
        dk = tl.dot(r, tl.trans(ds1), dk, input_precision=PRECISION)
        S_dS += tl.sum(s0.to(tl.float32) * ds1.to(tl.float32), 1)
    first = base * C * KP
    at = i[:, None] * KP + d[None, :]
    tl.store(dQg + first + at, dq.to(DOT))
    tl.store(dEg + first + at, (-de).to(DOT))
    tl.store(dKt + first + at, dk.to(DOT))
    later = (i >= C // 2)[:, None]
    heads = tl.load(Qg + first + at).to(tl.float32) * dq - tl.load(Eg + first + at).to(tl.float32) * de
    tails = tl.load(Kt + first + at).to(tl.float32) * dk
    whole = tl.load(decays + (base * (C // 16 + 1) + C // 16) * KP + d) * S_dS
    tl.store(dg_halves + base * 2 * KP + d, whole + tl.sum(tl.where(later, heads, 0.0), 0))
    tl.store(dg_halves + base * 2 * KP + KP + d, whole + tl.sum(tl.where(later, 0.0, tails), 0))


@triton.jit
def input_gradients_kernel(
    q, k, b, g, A_log, dt_bias, across, decays, dQg, dEg, dKt, dg_halves, Wq, Wt, row_sums, row_scales,
    spans, spans_transposed, chunk_start, chunk_rows,
    dq, dk, db, dg, dA_log, dbias,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, B_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads q, k [T, H, K], b, g [T, HV, K], and what prepare.py and the kernels above wrote of each chunk. Writes
    dq, dk, db, dg [T, HV, K], and with a gate partial sums dA_log [chunks, HV, 2, KP / BK], dbias [chunks, HV, 2,
    KP]."""
    N: tl.constexpr = C // 2
    LEVELS: tl.constexpr = 5 if N == 32 else 4
    tile, half, n, hv = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1), tl.program_id(2)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if half * N >= rows:
        return
    h = hv // (HV // H)
    base = n.to(tl.int64) * HV + hv
    own, other = half * N, N - half * N
    i, d = tl.arange(0, N), (tile * BK + tl.arange(0, BK))[:, None]
    row, col = i[:, None], i[None, :]
    mask = (own + col < rows) & (d < K)
    at, at_hv, local = d + col * (H * K), d + col * (HV * K), d + col * KP
    q += ((start + own) * H + h) * K
    k += ((start + own) * H + h) * K
    b += ((start + own) * HV + hv) * K
    g += ((start + own) * HV + hv) * K
    row_scales += base * 2 * C + i
    row_sums += base * 3 * C + own
    across += base * 3 * N * KP
    decays += (base * (C // 16 + 1) + (1 - half) * (N // 16)) * KP + d
    square = base * C * C + own * C + row * C + col
    at_kp = base * C * KP + own * KP + local

    # Everything is asked for before anything is waited for. A row of the later half meets k of the earlier; one of the
    # earlier half q and e of the later.
    gs, b_raw = tl.load(g + at_hv, mask, 0.0), tl.load(b + at_hv, mask, 0.0)
    q_raw, k_raw = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0)
    dQ_raw, dE_raw, dK_raw = tl.load(dQg + at_kp), tl.load(dEg + at_kp), tl.load(dKt + at_kp)
    q_across = tl.load(across + (1 - half) * N * KP + local)
    e_across = tl.load(across + 2 * (1 - half) * N * KP + local)
    wq_across, wt_across = tl.load(Wq + other + square), tl.load(Wt + other + square)
    q_scale, k_scale = tl.load(row_scales + own)[None, :], tl.load(row_scales + C + own)[None, :]
    other_decay = tl.load(decays)
    if N == 32:
        other_decay *= tl.load(decays + KP)
    dgs = tl.zeros([BK, N], tl.float32) + tl.load(dg_halves + base * 2 * KP + half * KP + d)
    a_log, bias = 0.0, 0.0
    if GATE:
        a_log = tl.load(A_log + hv).to(tl.float32)
        bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)

    P = tl.dot(q_across, tl.trans(wq_across), input_precision=PRECISION)
    R = tl.dot(e_across, tl.trans(wt_across), input_precision=PRECISION)
    dqs, des, dks = dQ_raw.to(tl.float32), dE_raw.to(tl.float32), dK_raw.to(tl.float32)
    if half == 1:
        dqs = dqs * other_decay + P
        des = des * other_decay + R
    else:
        dks = dks * other_decay + (P + R)
    hi, lo = split_log2(tl.where(mask, log_decay(gs.to(tl.float32), a_log, bias, lower_bound, GATE), 0.0))
    qs, ks = q_raw.to(tl.float32) * q_scale, k_raw.to(tl.float32) * k_scale
    es = ks * gate(b_raw, B_RANGE).to(tl.float32)
    f = span_factor_transposed(spans, 0, hi, lo, N)
    dqs, des = dqs * f, des * f
    dgs = span_sum_transposed(spans_transposed, 0, qs * dqs + es * des, dgs, N, PRECISION)
    f = span_factor_transposed(spans, 1, hi, lo, N)
    dks = dks * f
    dgs = span_sum_transposed(spans_transposed, 1, ks * dks, dgs, N, PRECISION)

    Wq += own + square
    Wt += own + square
    zero = tl.zeros([BK, N], tl.float32)
    for level in range(LEVELS):
        block = N >> (level + 1)
        f = span_factor_transposed(spans, 2 + level, hi, lo, N)
        odd = (col & block) != 0
        couple = ((row ^ col) & -block) == block
        wq = tl.where(couple, tl.load(Wq), 0.0)
        wt = tl.where(couple, tl.load(Wt), 0.0)
        f_odd, f_even = tl.where(odd, f, 0.0), tl.where(odd, 0.0, f)
        kf = ks * f_even
        yq, ye = qs * f_odd + kf, es * f_odd + kf
        P = dot_split(yq, tl.trans(wq), zero, PRECISION)
        R = tl.dot(ye.to(DOT), tl.trans(wt), input_precision=PRECISION)
        dgs = span_sum_transposed(spans_transposed, 2 + level, yq * P + ye * R, dgs, N, PRECISION)
        dqs += P * f_odd
        des += R * f_odd
        dks += (P + R) * f_even

    # Loaded anew rather than kept: registers are what this kernel is short of.
    tl.debug_barrier()
    db += ((start + own) * HV + hv) * K
    dq += ((start + own) * HV + hv) * K
    dk += ((start + own) * HV + hv) * K
    dg += ((start + own) * HV + hv) * K
    q_raw, k_raw, b_raw = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0), tl.load(b + at_hv, mask, 0.0)
    q_scale, k_scale = tl.load(row_scales + own)[None, :], tl.load(row_scales + C + own)[None, :]
    diagonal, q_dq, k_dk = tl.load(row_sums + i)[None, :], 0.0, 0.0
    if L2NORM:
        q_dq, k_dk = tl.load(row_sums + C + i)[None, :], tl.load(row_sums + 2 * C + i)[None, :]
    qs = q_raw.to(tl.float32) * q_scale
    ks = k_raw.to(tl.float32) * k_scale
    bs = gate(b_raw, B_RANGE).to(tl.float32)
    tl.store(db + at_hv, gate_backward(bs, des * ks, B_RANGE).to(db.dtype.element_ty), mask)
    dks += diagonal * qs + des * bs
    dqs += diagonal * ks
    if L2NORM:  # what points along q and k changes nothing
        dqs -= qs * (q_dq / (scale * scale))
        dks -= ks * k_dk
    tl.store(dq + at_hv, (dqs * q_scale).to(dq.dtype.element_ty), mask)
    tl.store(dk + at_hv, (dks * k_scale).to(dk.dtype.element_ty), mask)
    if GATE:
        x = tl.load(g + at_hv, mask, 0.0).to(tl.float32)
        dgs, da = log_decay_backward(x, a_log, bias, lower_bound, tl.where(mask, dgs, 0.0), GATE)
        tl.store(dA_log + (base * 2 + half) * (KP // BK) + tile, tl.sum(tl.sum(tl.where(mask, da, 0.0), 1), 0))
        tl.store(dbias + (base * 2 + half) * KP + d, tl.sum(tl.where(mask, dgs, 0.0), 1)[:, None])
    tl.store(dg + at_hv, dgs.to(dg.dtype.element_ty), mask)
