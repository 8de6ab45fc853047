"""Forward, first half: everything of a chunk that does not need the state. One program per (chunk, value head), all
in parallel.

With e = b * k, q scaled (and q, k L2-normed on request), head and tail the decays from the chunk's start and to its
end (decay.py):

    Qg = q * head      Eg = e * head      Kt = k * tail      decay = the whole chunk's
    Aqk = tril(q decay k^T)    T = stril(e decay k^T)        A = (I + T)^-1

The scores come block by block: across the two halves by one product, within a half by one product and a mask per
level. The inverse of a half doubles its blocks, D_2h = D_h - D_h T_h D_h with T_h the part of T at level h; the
halves join as A10 = -A11 T10 A00.

Reads q, k [T, H, K], b, g [T, HV, K]. Writes Qg, Eg, Kt [chunks, HV, C, KP], A, Aqk [chunks, HV, C, C], decay
[chunks, HV, KP], and for the backward pass exponents [chunks, HV, 2, C, KP] fp16 (x as two summands), totals
[chunks, HV, 2, KP] (each half's decay) and row_scales [chunks, HV, 3, C] (1 / norm of q, 1 / norm of k, q . k).
"""

import triton
import triton.language as tl

from .decay import log_decay, span_factor, split_log2


@triton.jit
def half_scores(
    Sqk, T, q, k, e, hi, lo, spans, N: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds to Sqk, T [N, N] what one tile of channels q, k, e [BK, N] gives to the pairs i > j of a half."""
    i = tl.arange(0, N)
    row, col = i[:, None], i[None, :]
    for level in range(LEVELS):
        h = N >> (level + 1)
        f = span_factor(spans, 2 + level, hi, lo, N)
        odd = (i & h)[None, :] != 0
        kf = k * f
        yq, ye = tl.where(odd, q * f, kf).to(DOT), tl.where(odd, e * f, kf).to(DOT)
        couple = (((row ^ col) & -h) == h) & (row > col)
        Sqk += tl.where(couple, tl.dot(tl.trans(yq), yq, input_precision=PRECISION), 0.0)
        T += tl.where(couple, tl.dot(tl.trans(ye), ye, input_precision=PRECISION), 0.0)
    return Sqk, T


@triton.jit
def half_inverse(T, N: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + T)^-1 of a strictly lower triangular T [N, N], doubling the blocks."""
    i = tl.arange(0, N)
    row, col = i[:, None], i[None, :]
    D = tl.where(row == col, 1.0, tl.where((row ^ col) == 1, -T, 0.0))
    for level in tl.static_range(1, LEVELS):
        h = 1 << level
        Th = tl.where(((row ^ col) & -h) == h, T, 0.0)
        D -= tl.dot(tl.dot(D, Th, input_precision=PRECISION), D, input_precision=PRECISION)
    return D


@triton.jit
def prepare_kernel(
    q, k, b, g, A_log, dt_bias, spans, chunk_start, chunk_rows,
    Qg, Eg, Kt, A, Aqk, decay, exponents, totals, row_scales,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = C // 2
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
    decay += base * KP
    exponents += base * 2 * C * KP
    totals += base * 2 * KP
    row_scales += base * 3 * C

    # Row sums and exponents; the program reads them back below in its other layout.
    i = tl.arange(0, C)
    qq, kk, qk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)
        mask = (i < rows)[:, None] & (d < K)[None, :]
        at = i[:, None] * (H * K) + d[None, :]
        qs = tl.load(q + at, mask, 0.0).to(tl.float32)
        ks = tl.load(k + at, mask, 0.0).to(tl.float32)
        qq += tl.sum(qs * qs, 1)
        kk += tl.sum(ks * ks, 1)
        qk += tl.sum(qs * ks, 1)
        gs = tl.load(g + i[:, None] * (HV * K) + d[None, :], mask, 0.0).to(tl.float32)
        if GATE:
            a_log = tl.load(A_log + hv).to(tl.float32)
            bias = tl.load(dt_bias + hv * K + d, d < K, 0.0).to(tl.float32)[None, :]
            gs = tl.where(mask, log_decay(gs, a_log, bias, lower_bound, GATE), 0.0)
        hi, lo = split_log2(gs)
        at = i[:, None] * KP + d[None, :]
        tl.store(exponents + at, hi)
        tl.store(exponents + C * KP + at, lo)
        x = hi.to(tl.float32) + lo.to(tl.float32)
        first, second = tl.sum(tl.where(i[:, None] < N, x, 0.0), 0), tl.sum(tl.where(i[:, None] < N, 0.0, x), 0)
        tl.store(totals + d, tl.exp2(first))
        tl.store(totals + KP + d, tl.exp2(second))
        tl.store(decay + d, tl.exp2(first + second))
    if L2NORM:
        tl.store(row_scales + i, tl.rsqrt(qq + 1e-6))
        tl.store(row_scales + C + i, tl.rsqrt(kk + 1e-6))
    else:
        tl.store(row_scales + i, tl.full([C], 1.0, tl.float32))
        tl.store(row_scales + C + i, tl.full([C], 1.0, tl.float32))
    tl.store(row_scales + 2 * C + i, qk)
    tl.debug_barrier()

    # The scores are of raw q and k; rows and columns are scaled at the end.
    i = tl.arange(0, N)
    Sqk00, Sqk10, Sqk11 = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    T00, T10, T11 = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    for s in range(0, KP, BK):
        d = (s + tl.arange(0, BK))[:, None]
        mask0, mask1 = (i < rows)[None, :] & (d < K), (N + i < rows)[None, :] & (d < K)
        at, at_hv, local = d + i[None, :] * (H * K), d + i[None, :] * (HV * K), d + i[None, :] * KP
        q0, k0 = tl.load(q + at, mask0, 0.0).to(tl.float32), tl.load(k + at, mask0, 0.0).to(tl.float32)
        e0 = k0 * tl.load(b + at_hv, mask0, 0.0).to(tl.float32)
        hi0, lo0 = tl.load(exponents + local), tl.load(exponents + C * KP + local)
        q_scale, k_scale = tl.load(row_scales + i)[None, :] * scale, tl.load(row_scales + C + i)[None, :]
        head = span_factor(spans, 0, hi0, lo0, N)
        tl.store(Qg + local, (q0 * head * q_scale).to(DOT))
        tl.store(Eg + local, (e0 * head * k_scale).to(DOT))
        y0 = k0 * span_factor(spans, 1, hi0, lo0, N)
        tl.store(Kt + local, (y0 * tl.load(totals + KP + d) * k_scale).to(DOT))
        y0 = y0.to(DOT)
        Sqk00, T00 = half_scores(Sqk00, T00, q0, k0, e0, hi0, lo0, spans, N, LEVELS, DOT, PRECISION)

        q1 = tl.load(q + N * H * K + at, mask1, 0.0).to(tl.float32)
        k1 = tl.load(k + N * H * K + at, mask1, 0.0).to(tl.float32)
        e1 = k1 * tl.load(b + N * HV * K + at_hv, mask1, 0.0).to(tl.float32)
        hi1, lo1 = tl.load(exponents + N * KP + local), tl.load(exponents + (C + N) * KP + local)
        head = span_factor(spans, 0, hi1, lo1, N)
        q_scale, k_scale = tl.load(row_scales + N + i)[None, :] * scale, tl.load(row_scales + C + N + i)[None, :]
        total0 = tl.load(totals + d)
        yq, ye = q1 * head, e1 * head
        tl.store(Qg + N * KP + local, (yq * total0 * q_scale).to(DOT))
        tl.store(Eg + N * KP + local, (ye * total0 * k_scale).to(DOT))
        tl.store(Kt + N * KP + local, (k1 * span_factor(spans, 1, hi1, lo1, N) * k_scale).to(DOT))
        Sqk10 = tl.dot(tl.trans(yq.to(DOT)), y0, Sqk10, input_precision=PRECISION)
        T10 = tl.dot(tl.trans(ye.to(DOT)), y0, T10, input_precision=PRECISION)
        Sqk11, T11 = half_scores(Sqk11, T11, q1, k1, e1, hi1, lo1, spans, N, LEVELS, DOT, PRECISION)

    at = i[:, None] * C + i[None, :]
    diagonal = i[:, None] == i[None, :]
    q_scale0, q_scale1 = tl.load(row_scales + i) * scale, tl.load(row_scales + N + i) * scale
    k_scale0, k_scale1 = tl.load(row_scales + C + i), tl.load(row_scales + C + N + i)
    qk0, qk1 = tl.load(row_scales + 2 * C + i)[:, None], tl.load(row_scales + 2 * C + N + i)[:, None]
    tl.store(Aqk + at, (tl.where(diagonal, qk0, Sqk00) * q_scale0[:, None] * k_scale0[None, :]).to(DOT))
    tl.store(Aqk + N + at, tl.zeros([N, N], DOT))
    tl.store(Aqk + N * C + at, (Sqk10 * q_scale1[:, None] * k_scale0[None, :]).to(DOT))
    tl.store(Aqk + N * C + N + at, (tl.where(diagonal, qk1, Sqk11) * q_scale1[:, None] * k_scale1[None, :]).to(DOT))
    A00 = half_inverse(T00 * k_scale0[:, None] * k_scale0[None, :], N, LEVELS, PRECISION)
    A11 = half_inverse(T11 * k_scale1[:, None] * k_scale1[None, :], N, LEVELS, PRECISION)
    T10 *= k_scale1[:, None] * k_scale0[None, :]
    A10 = -tl.dot(tl.dot(A11, T10, input_precision=PRECISION), A00, input_precision=PRECISION)
    tl.store(A + at, A00.to(DOT))
    tl.store(A + N + at, tl.zeros([N, N], DOT))
    tl.store(A + N * C + at, A10.to(DOT))
    tl.store(A + N * C + N + at, A11.to(DOT))
