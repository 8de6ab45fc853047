"""Forward, first half: everything of a chunk that does not need the state. One program per (chunk, value head), all
in parallel.

With e = b * k, q scaled (and q, k L2-normed on request), head and tail the decays from the chunk's start and to its
end (decay.py):

    Qg = q * head      Eg = e * head      Kt = k * tail
    Aqk = tril(q decay k^T)    T = stril(e decay k^T)        A = (I + T)^-1

The scores come level by level, each level one product and a mask, and the inverse doubles its blocks in the same
order, D_2h = D_h - D_h T_h D_h with T_h the part of T at level h. block_scores_kernel does what lies within blocks of
16 rows, as products of blocks [C / 16, 16, BK]: a warp holds its block in registers through all four levels.
chunk_scores_kernel does the rest.
"""

import triton
import triton.language as tl

from .decay import block_factor, coupled, factor, gate, level_span, log_decay, split_log2


@triton.jit
def block_scores_kernel(
    q, k, b, g, A_log, dt_bias, chunk_start, chunk_rows,
    Aqk, D, row_scales,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, B_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads q, k [T, H, K], b, g [T, HV, K]. Writes the blocks on the diagonal of Aqk [chunks, HV, C, C], the inverses
    D [chunks, HV, C / 16, 16, 16] fp32 of those of I + T, and row_scales [chunks, HV, 2, C]: scale / norm of q, 1 /
    norm of k."""
    L: tl.constexpr = C // 16
    n, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if rows == 0:
        return
    base = n.to(tl.int64) * HV + hv
    q += (start * H + h) * K
    k += (start * H + h) * K
    b += (start * HV + hv) * K
    g += (start * HV + hv) * K
    row_scales += base * 2 * C
    i, r = tl.arange(0, C), tl.arange(0, 16)
    block, row, col = tl.arange(0, L)[:, None, None], r[None, :, None], r[None, None, :]
    S, T = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    qq, kk, qk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        mask = (i[:, None] < rows) & (d < K)
        at, at_hv = i[:, None] * (H * K) + d, i[:, None] * (HV * K) + d
        gs = tl.load(g + at_hv, mask, 0.0)
        q_raw, k_raw = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0)
        b_raw = gate(tl.load(b + at_hv, mask, 0.0), B_RANGE)
        gs = gs.to(tl.float32)
        if GATE:
            a_log = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)
            gs = tl.where(mask, log_decay(gs, a_log, bias, lower_bound, GATE), 0.0)
        hi, lo = split_log2(gs)
        hi, lo = hi.reshape(L, 16, BK), lo.reshape(L, 16, BK)
        # The scores are of raw q and k; rows and columns are scaled at the end.
        qs, ks, bs = q_raw.reshape(L, 16, BK), k_raw.reshape(L, 16, BK), b_raw.reshape(L, 16, BK)
        for level in tl.static_range(4):
            f = block_factor(level_span(row, col, 8 >> level), hi, lo)
            kf = ks * f
            y = tl.permute(kf.to(DOT), (0, 2, 1))
            couple = coupled(row, col, 8 >> level)
            S += tl.where(couple, tl.dot((qs * f).to(DOT), y, input_precision=PRECISION), 0.0)
            T += tl.where(couple, tl.dot((bs * kf).to(DOT), y, input_precision=PRECISION), 0.0)
        q32, k32 = q_raw.to(tl.float32), k_raw.to(tl.float32)
        qk += tl.sum(q32 * k32, 1)
        if L2NORM:
            qq += tl.sum(q32 * q32, 1)
            kk += tl.sum(k32 * k32, 1)

    if L2NORM:
        q_scale, k_scale = tl.rsqrt(qq + 1e-6) * scale, tl.rsqrt(kk + 1e-6)
    else:
        q_scale, k_scale = tl.full([C], 1.0, tl.float32) * scale, tl.full([C], 1.0, tl.float32)
    tl.store(row_scales + i, q_scale)
    tl.store(row_scales + C + i, k_scale)
    q_scale, k_scale, diagonal = q_scale.reshape(L, 16), k_scale.reshape(L, 16), qk.reshape(L, 16)
    S = tl.where(row == col, diagonal[:, :, None], S) * q_scale[:, :, None] * k_scale[:, None, :]
    tl.store(Aqk + base * C * C + (block * 16 + row) * C + block * 16 + col, S.to(DOT))
    T *= k_scale[:, :, None] * k_scale[:, None, :]
    inverse = tl.where(row == col, 1.0, tl.where((row ^ col) == 1, -T, 0.0))
    for level in tl.static_range(1, 4):
        Th = tl.where(coupled(row, col, 1 << level), T, 0.0)
        inverse -= tl.dot(tl.dot(inverse, Th, input_precision=PRECISION), inverse, input_precision=PRECISION)
    tl.store(D + base * C * 16 + block * 256 + row * 16 + col, inverse)


@triton.jit
def chunk_scores_kernel(
    q, k, b, g, A_log, dt_bias, D, row_scales, spans, chunk_start, chunk_rows,
    Qg, Eg, Kt, A, Aqk, totals,
    lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, GATE: tl.constexpr, B_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads what block_scores_kernel reads and wrote. Writes Qg, Eg, Kt [chunks, HV, C, KP], A, the rest of Aqk
    [chunks, HV, C, C] and totals [chunks, HV, 2, KP] fp32, the sums of x over each half."""
    n, hv = tl.program_id(0), tl.program_id(1)
    h = hv // (HV // H)
    start = tl.load(chunk_start + n).to(tl.int64)
    rows = tl.load(chunk_rows + n)
    if rows == 0:
        return
    base = n.to(tl.int64) * HV + hv
    q += (start * H + h) * K
    k += (start * H + h) * K
    b += (start * HV + hv) * K
    g += (start * HV + hv) * K
    Qg += base * C * KP
    Eg += base * C * KP
    Kt += base * C * KP
    totals += base * 2 * KP
    row_scales += base * 2 * C
    i = tl.arange(0, C)
    row, col = i[:, None], i[None, :]
    square = row * C + col
    head_span, tail_span = tl.load(spans + square), tl.load(spans + C * C + square)
    half_span, quarter_span = tl.load(spans + 2 * C * C + square), tl.load(spans + (1 + WIDE) * C * C + square)
    q_scale, k_scale = tl.load(row_scales + i)[:, None], tl.load(row_scales + C + i)[:, None]
    S, T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        mask = (row < rows) & (d < K)
        at, at_hv, local = row * (H * K) + d, row * (HV * K) + d, row * KP + d
        gs = tl.load(g + at_hv, mask, 0.0)
        qs, ks = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0)
        bs = gate(tl.load(b + at_hv, mask, 0.0), B_RANGE)
        gs = gs.to(tl.float32)
        if GATE:
            a_log = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)
            gs = tl.where(mask, log_decay(gs, a_log, bias, lower_bound, GATE), 0.0)
        hi, lo = split_log2(gs)
        x = (hi.to(tl.float32) + lo.to(tl.float32)).reshape(2, C // 2, BK)
        tl.store(totals + tl.arange(0, 2)[:, None] * KP + d, tl.sum(x, 1))

        # The scores are of raw q and k; rows and columns are scaled at the end. Rows and columns that do not belong
        # to a level are set to 0, where what they would add is not above or on the diagonal anyway.
        f = factor(half_span, hi, lo)
        kf = ks * f
        y = tl.trans(tl.where(row < C // 2, kf, 0.0).to(DOT))
        S = tl.dot(tl.where(row < C // 2, 0.0, qs * f).to(DOT), y, S, input_precision=PRECISION)
        T = tl.dot(tl.where(row < C // 2, 0.0, bs * kf).to(DOT), y, T, input_precision=PRECISION)
        if WIDE == 2:
            f = factor(quarter_span, hi, lo)
            qf, kf = qs * f, ks * f
            ef = bs * kf
            y = tl.trans(kf.to(DOT))
            S = tl.dot(tl.where(row < C // 2, qf, 0.0).to(DOT), y, S, input_precision=PRECISION)
            T = tl.dot(tl.where(row < C // 2, ef, 0.0).to(DOT), y, T, input_precision=PRECISION)
            y = tl.trans(tl.where(row < C // 2, 0.0, kf).to(DOT))
            S = tl.dot(tl.where(row < C // 2, 0.0, qf).to(DOT), y, S, input_precision=PRECISION)
            T = tl.dot(tl.where(row < C // 2, 0.0, ef).to(DOT), y, T, input_precision=PRECISION)
        f = factor(head_span, hi, lo)
        tl.store(Qg + local, (qs * f * q_scale).to(DOT))
        tl.store(Eg + local, (bs * (ks * f) * k_scale).to(DOT))
        f = factor(tail_span, hi, lo)
        tl.store(Kt + local, (ks * f * k_scale).to(DOT))

    across = tl.load(row_scales + C + i)[None, :]
    block = (row // 16) == (col // 16)
    S = tl.where(row > col, S * q_scale * across, 0.0)
    tl.store(Aqk + base * C * C + square, S.to(DOT), row // 16 != col // 16)
    T *= k_scale * across
    inverse = tl.load(D + base * C * 16 + row * 16 + col % 16, block, 0.0)
    for level in tl.static_range(WIDE):
        Th = tl.where(coupled(row, col, 16 << level), T, 0.0)
        inverse -= tl.dot(tl.dot(inverse, Th, input_precision=PRECISION), inverse, input_precision=PRECISION)
    tl.store(A + base * C * C + square, inverse.to(DOT))
