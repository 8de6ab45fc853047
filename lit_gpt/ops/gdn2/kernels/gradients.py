"""Backward, second half: dq, dk, db, dg of every chunk, all chunks in parallel.

score_gradients_kernel, one program per (chunk, value head), from do, dz, R:

    dAqk = tril(do R^T)      dT = -stril(dz R^T)

stored as symmetric matrices Wq, Wt (the lower triangle mirrored, the diagonal left out), the diagonal of dAqk apart.
For the L2 norms it adds the
two row sums that take out what points along q and k:  sum_K q dq = sum_V o do,   sum_K k dk = sum_V dz (2 R - w v).

chunk_gradients_kernel, one program per (tile of K, chunk, value head), S before and dS' after the chunk:

    dQg = do S^T      dEg = -dz S^T      dKt = R dS'^T

and from there back to Qb, Eb, Kb of prepare.py, through the decays of whole blocks and the scores between blocks. Those
of level h (couples of blocks of h rows), rows decayed as there (Yq: q in odd blocks, k in even ones; Ye: e and k), Wqh
and Wth the couples' parts of Wq and Wt:

    P = Wqh Yq     N = Wth Ye        odd rows: dq += P, de += N     even rows: dk += P + N

block_gradients_kernel, one program per (tile of K, L blocks of 16 rows, value head), is the rest, within blocks: from Qb, Eb, Kb back to q, e, k, and the scores within blocks, level by level with factors f:

    P = Wqh Yq     N = Wth Ye        odd rows: dq += f P, de += f N     even rows: dk += f (P + N)
    every row: f df = Yq P + Ye N

dg sums f df of every factor over its span (decay.py). Then db = k de, dk += b de, and the chain through the L2 norm
and the gate.
"""

import triton
import triton.language as tl

from .decay import (
    chunk_decay,
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
def chunk_gradients_kernel(
    do, dZ, R, S, dS, Qb, Eb, Kb, decays, row_scales, Wq, Wt, chunk_start, chunk_rows,
    dQb, dEb, dKb, dX,
    HV: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads do [T, HV, V] and, per chunk, dZ, R, S, dS, Qb, Eb, Kb, decays, row_scales, Wq, Wt. Writes dQb, dEb, dKb
    [chunks, HV, C, KP], of q, e, k normed and scaled, and dX [chunks, HV, C / 16, KP] fp32: what reaches dg of all rows
    of a block at once."""
    L: tl.constexpr = C // 16
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
    decays += base * L * KP
    row_scales += base * 2 * C
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
        de = tl.dot((-dz).to(DOT), tl.trans(s0), de, input_precision=PRECISION)
        dk = tl.dot(r, tl.trans(ds1), dk, input_precision=PRECISION)
        S_dS += tl.sum(s0.to(tl.float32) * ds1.to(tl.float32), 1)

    row, col = i[:, None], i[None, :]
    block = row // 16
    odd, later = (block & 1) == 1, block >= C // 32
    at, square = base * C * KP + row * KP + d[None, :], base * C * C + row * C + col
    q_scale, k_scale = tl.load(row_scales + i)[:, None], tl.load(row_scales + C + i)[:, None]
    qs, ks = tl.load(Qb + at).to(tl.float32) * q_scale, tl.load(Kb + at).to(tl.float32) * k_scale
    es = tl.load(Eb + at).to(tl.float32) * k_scale
    blocks = tl.arange(0, L)[:, None]
    dx = (chunk_decay(decays + d, KP, L) * S_dS)[None, :] + tl.zeros([L, BK], tl.float32)
    pair = tl.load(decays + (block ^ 1) * KP + d[None, :])  # decays of the other block of a row's couple
    before, after = tl.where(odd, pair, 1.0), tl.where(odd, 1.0, pair)
    qs, es, ks = qs * before, es * before, ks * after
    if WIDE == 2:
        other = (block & 2) ^ 2  # first block of the other half
        half = tl.load(decays + other * KP + d[None, :]) * tl.load(decays + (other + 1) * KP + d[None, :])
        to_head, to_tail = tl.where(later, half, 1.0), tl.where(later, 1.0, half)
        dq, de, dk = dq * to_head, de * to_head, dk * to_tail
        heads = tl.sum(tl.where(later, qs * dq + es * de, 0.0), 0)
        tails = tl.sum(tl.where(later, 0.0, ks * dk), 0)
        dx += tl.where(blocks < L // 2, heads[None, :], tails[None, :])
        across = (row // 32) != (col // 32)
        w = tl.where(across, tl.load(Wq + square), 0.0)
        P = tl.dot(w, tl.where(later, qs, ks).to(DOT), input_precision=PRECISION)
        dq += tl.where(later, P, 0.0)
        dk += tl.where(later, 0.0, P)
        w = tl.where(across, tl.load(Wt + square), 0.0)
        P = tl.dot(w, tl.where(later, es, ks).to(DOT), input_precision=PRECISION)
        de += tl.where(later, P, 0.0)
        dk += tl.where(later, 0.0, P)
    x = tl.where(odd, qs * dq + es * de, ks * dk)
    dx += tl.sum(x.reshape(L, 16, BK), 1)
    tl.store(dX + base * L * KP + (blocks ^ 1) * KP + d[None, :], dx)
    dq, de, dk = dq * before, de * before, dk * after

    couple = ((row // 16) ^ (col // 16)) == 1
    qs, ks = tl.load(Qb + at).to(tl.float32) * q_scale, tl.load(Kb + at).to(tl.float32) * k_scale
    es = tl.load(Eb + at).to(tl.float32) * k_scale
    w = tl.where(couple, tl.load(Wq + square), 0.0)
    P = tl.dot(w, tl.where(odd, qs, ks).to(DOT), input_precision=PRECISION)
    dq += tl.where(odd, P, 0.0)
    dk += tl.where(odd, 0.0, P)
    w = tl.where(couple, tl.load(Wt + square), 0.0)
    P = tl.dot(w, tl.where(odd, es, ks).to(DOT), input_precision=PRECISION)
    de += tl.where(odd, P, 0.0)
    dk += tl.where(odd, 0.0, P)
    tl.store(dQb + at, dq.to(DOT))
    tl.store(dEb + at, de.to(DOT))
    tl.store(dKb + at, dk.to(DOT))


@triton.jit
def block_gradients_kernel(
    q, k, b, g, A_log, dt_bias, dQb, dEb, dKb, dX, Wq, Wt, row_sums, row_scales, spans, spans_transposed,
    chunk_start, chunk_rows,
    dq, dk, db, dg, dA_log, dbias,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    L: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, B_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads q, k [T, H, K], b, g [T, HV, K], and what prepare.py and the kernels above wrote of each chunk. Writes
    dq, dk, db, dg [T, HV, K], and with a gate partial sums dA_log [chunks, HV, C / 16 / L, KP / BK],
    dbias [chunks, HV, C / 16 / L, KP]."""
    PARTS: tl.constexpr = C // 16 // L
    tile, n, part, hv = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(1) % PARTS, tl.program_id(2)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if part * L * 16 >= rows:
        return
    h = hv // (HV // H)
    base = n.to(tl.int64) * HV + hv
    # Tiles are [L, BK, 16], channel by row: what a product leaves in the registers of a warp is then what the next
    # one takes.
    r = tl.arange(0, 16)
    block, row, col = part * L + tl.arange(0, L)[:, None, None], r[None, :, None], r[None, None, :]
    i, d = block * 16 + col, tile * BK + tl.arange(0, BK)[None, :, None]
    mask = (i < rows) & (d < K)
    first, first_hv = (start * H + h) * K, (start * HV + hv) * K
    at, at_hv = i * (H * K) + d, i * (HV * K) + d
    local = base * C * KP + i * KP + d
    row_scales += base * 2 * C
    row_sums += base * 3 * C
    square = base * C * C + (block * 16 + row) * C + i

    # Everything is asked for before anything is waited for.
    gs = tl.load(g + first_hv + at_hv, mask, 0.0)
    q_raw, k_raw = tl.load(q + first + at, mask, 0.0), tl.load(k + first + at, mask, 0.0)
    b_raw = tl.load(b + first_hv + at_hv, mask, 0.0)
    dqs, des, dks = tl.load(dQb + local), tl.load(dEb + local), tl.load(dKb + local)
    wq, wt = tl.load(Wq + square), tl.load(Wt + square)
    q_scale, k_scale = tl.load(row_scales + i), tl.load(row_scales + C + i)
    dgs = tl.zeros([L, BK, 16], tl.float32) + tl.load(dX + base * (C // 16) * KP + block * KP + d)
    a_log, bias = 0.0, 0.0
    if GATE:
        a_log = tl.load(A_log + hv).to(tl.float32)
        bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)

    hi, lo = split_log2(tl.where(mask, log_decay(gs.to(tl.float32), a_log, bias, lower_bound, GATE), 0.0))
    qs, ks = q_raw.to(tl.float32) * q_scale, k_raw.to(tl.float32) * k_scale
    es = ks * gate(b_raw, B_RANGE).to(tl.float32)
    f = span_factor_transposed(spans_transposed, 0, hi, lo)
    dqs, des = f * dqs.to(tl.float32), f * des.to(tl.float32)
    dgs = span_sum_transposed(spans, 0, qs * dqs + es * des, dgs, PRECISION)
    f = span_factor_transposed(spans_transposed, 1, hi, lo)
    dks = f * dks.to(tl.float32)
    dgs = span_sum_transposed(spans, 1, ks * dks, dgs, PRECISION)
    for level in tl.static_range(4):
        f = span_factor_transposed(spans_transposed, 2 + level, hi, lo)
        odd = (col & (8 >> level)) != 0
        couple = ((row ^ col) & -(8 >> level)) == (8 >> level)
        f_odd, f_even = tl.where(odd, f, 0.0), tl.where(odd, 0.0, f)
        yk = ks * f_even
        yq, ye = qs * f_odd + yk, es * f_odd + yk
        P = tl.dot(yq.to(DOT), tl.where(couple, wq, 0.0), input_precision=PRECISION)
        N = tl.dot(ye.to(DOT), tl.where(couple, wt, 0.0), input_precision=PRECISION)
        dgs = span_sum_transposed(spans, 2 + level, yq * P + ye * N, dgs, PRECISION)
        dqs += P * f_odd
        des += N * f_odd
        dks += (P + N) * f_even

    diagonal, q_dq, k_dk = tl.load(row_sums + i), 0.0, 0.0
    if L2NORM:
        q_dq, k_dk = tl.load(row_sums + C + i), tl.load(row_sums + 2 * C + i)
    bs = gate(b_raw, B_RANGE).to(tl.float32)
    tl.store(db + first_hv + at_hv, gate_backward(bs, des * ks, B_RANGE).to(db.dtype.element_ty), mask)
    dks += diagonal * qs + des * bs
    dqs += diagonal * ks
    if L2NORM:  # what points along q and k changes nothing
        dqs -= qs * (q_dq / (scale * scale))
        dks -= ks * k_dk
    tl.store(dq + first_hv + at_hv, (dqs * q_scale).to(dq.dtype.element_ty), mask)
    tl.store(dk + first_hv + at_hv, (dks * k_scale).to(dk.dtype.element_ty), mask)
    if GATE:
        dgs, da = log_decay_backward(gs.to(tl.float32), a_log, bias, lower_bound, tl.where(mask, dgs, 0.0), GATE)
        base = base * PARTS + part
        tl.store(dA_log + base * (KP // BK) + tile, tl.sum(tl.where(mask, da, 0.0)))
        columns = tl.sum(tl.sum(tl.where(mask, dgs, 0.0), 2), 0)
        tl.store(dbias + base * KP + tile * BK + tl.arange(0, BK), columns)
    tl.store(dg + first_hv + at_hv, dgs.to(dg.dtype.element_ty), mask)
