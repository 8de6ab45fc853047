"""Forward, first half: everything of a chunk that does not need the state. One program per (chunk, value head), all
in parallel.

With e = b * k, q scaled (and q, k L2-normed on request), head and tail the decays from the chunk's start and to its
end (decay.py):

    Qg = q * head      Eg = e * head      Kt = k * tail
    Aqk = tril(q decay k^T)    T = stril(e decay k^T)        A = (I + T)^-1

The scores come level by level, each level one product and a mask, and the inverse doubles its blocks in the same
order, D_2h = D_h - D_h T_h D_h with T_h the part of T at level h. First the levels within blocks of 16 rows, as
products of blocks [C / 16, 16, BK]: a warp holds its block in registers through all four. Then, reading q, k, b and g
a second time (from the cache), the levels across blocks, as products of whole tiles [C, BK].

Reads q, k [T, H, K], b, g [T, HV, K]. Writes Qg, Eg, Kt [chunks, HV, C, KP], A, Aqk [chunks, HV, C, C], and in fp32
totals [chunks, HV, 2, KP], the sums of x over each half, and row_scales [chunks, HV, 2, C]: scale / norm of q, 1 /
norm of k.
"""

import triton
import triton.language as tl

from .decay import block_factor, coupled, factor, level_span, log_decay, split_log2


@triton.jit
def prepare_kernel(
    q, k, b, g, A_log, dt_bias, spans, chunk_start, chunk_rows,
    Qg, Eg, Kt, A, Aqk, totals, row_scales,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    WIDE: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    Qg += base * C * KP
    Eg += base * C * KP
    Kt += base * C * KP
    A += base * C * C
    Aqk += base * C * C
    totals += base * 2 * KP
    row_scales += base * 2 * C
    i, r = tl.arange(0, C), tl.arange(0, 16)
    row, col = i[:, None], i[None, :]
    block16, row16, col16 = tl.arange(0, L)[:, None, None], r[None, :, None], r[None, None, :]
    a_log = 0.0
    if GATE:
        a_log = tl.load(A_log + hv).to(tl.float32)

    # The scores are of raw q and k; rows and columns are scaled at the end.
    S16, T16 = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    qq, kk, qk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        mask = (row < rows) & (d < K)
        at, at_hv = row * (H * K) + d, row * (HV * K) + d
        gs = tl.load(g + at_hv, mask, 0.0)
        q_raw, k_raw = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0)
        b_raw = tl.load(b + at_hv, mask, 0.0)
        gs = gs.to(tl.float32)
        if GATE:
            bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)
            gs = tl.where(mask, log_decay(gs, a_log, bias, lower_bound, GATE), 0.0)
        hi, lo = split_log2(gs)
        hi, lo = hi.reshape(L, 16, BK), lo.reshape(L, 16, BK)
        q16, k16, b16 = q_raw.reshape(L, 16, BK), k_raw.reshape(L, 16, BK), b_raw.reshape(L, 16, BK)
        for level in tl.static_range(4):
            f16 = block_factor(level_span(row16, col16, 8 >> level), hi, lo)
            kf16 = k16 * f16
            y16 = tl.permute(kf16.to(DOT), (0, 2, 1))
            couple = coupled(row16, col16, 8 >> level)
            S16 += tl.where(couple, tl.dot((q16 * f16).to(DOT), y16, input_precision=PRECISION), 0.0)
            T16 += tl.where(couple, tl.dot((b16 * kf16).to(DOT), y16, input_precision=PRECISION), 0.0)
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
    q_scale16, k_scale16, diagonal = q_scale.reshape(L, 16), k_scale.reshape(L, 16), qk.reshape(L, 16)
    S16 = tl.where(row16 == col16, diagonal[:, :, None], S16) * q_scale16[:, :, None] * k_scale16[:, None, :]
    tl.store(Aqk + (block16 * 16 + row16) * C + block16 * 16 + col16, S16.to(DOT))
    T16 *= k_scale16[:, :, None] * k_scale16[:, None, :]
    D16 = tl.where(row16 == col16, 1.0, tl.where((row16 ^ col16) == 1, -T16, 0.0))
    for level in tl.static_range(1, 4):
        Th16 = tl.where(coupled(row16, col16, 1 << level), T16, 0.0)
        D16 -= tl.dot(tl.dot(D16, Th16, input_precision=PRECISION), D16, input_precision=PRECISION)

    square = row * C + col
    head_span, tail_span = tl.load(spans + square), tl.load(spans + C * C + square)
    half_span, quarter_span = tl.load(spans + 2 * C * C + square), tl.load(spans + (1 + WIDE) * C * C + square)
    S, T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        mask = (row < rows) & (d < K)
        at, at_hv, local = row * (H * K) + d, row * (HV * K) + d, row * KP + d
        gs = tl.load(g + at_hv, mask, 0.0)
        qs, ks = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0)
        bs = tl.load(b + at_hv, mask, 0.0)
        gs = gs.to(tl.float32)
        if GATE:
            bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)
            gs = tl.where(mask, log_decay(gs, a_log, bias, lower_bound, GATE), 0.0)
        hi, lo = split_log2(gs)
        x = (hi.to(tl.float32) + lo.to(tl.float32)).reshape(2, C // 2, BK)
        tl.store(totals + tl.arange(0, 2)[:, None] * KP + d, tl.sum(x, 1))

        # Rows and columns that do not belong to a level are set to 0, unless what they add is masked at the end.
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
        tl.store(Qg + local, (qs * f * q_scale[:, None]).to(DOT))
        tl.store(Eg + local, (bs * (ks * f) * k_scale[:, None]).to(DOT))
        f = factor(tail_span, hi, lo)
        tl.store(Kt + local, (ks * f * k_scale[:, None]).to(DOT))

    across = (row // 16) > (col // 16)
    S = tl.where(across, S * q_scale[:, None] * k_scale[None, :], 0.0)
    tl.store(Aqk + square, S.to(DOT), (row // 16) != (col // 16))
    T *= k_scale[:, None] * k_scale[None, :]
    D = tl.broadcast_to(D16[:, :, None, :], (L, 16, L, 16)).reshape(C, C)
    D = tl.where((row // 16) == (col // 16), D, 0.0)
    for level in tl.static_range(WIDE):
        Th = tl.where(coupled(row, col, 16 << level), T, 0.0)
        D -= tl.dot(tl.dot(D, Th, input_precision=PRECISION), D, input_precision=PRECISION)
    tl.store(A + square, D.to(DOT))
