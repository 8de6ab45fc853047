"""What a chunk of C rows needs before any state is known.

With e = b * k and decay(i, j) the decays of rows j+1..i multiplied:

    Aqk_ij = scale q_i . decay(i, j) k_j  (i >= j)      T_ij = e_i . decay(i, j) k_j  (i > j)      A = (I + T)^-1
    Qg = scale q * (decay from the chunk's start)      Eg = e * (the same)      Kt = k * (decay to the chunk's end)

block_scores_kernel does what lies within blocks of 16 rows, as products of blocks [C / 16, 16, BK]: a warp holds its
block in registers from factor to product. It leaves q, e, k decayed to their block's ends (Qb, Eb, Kb) and the decay of
each block. chunk_scores_kernel, which needs no exponentials any more, does the rest: the scores between the blocks of a
half, then those between the halves. The inverse doubles its blocks in the same order, D_2h = D_h - D_h T_h D_h with T_h
what is new of T.
"""

import triton
import triton.language as tl

from .decay import coupled, gate, leaf_factors, log_decay, span_factor, split_log2


@triton.jit
def block_scores_kernel(
    q, k, b, g, A_log, dt_bias, chunk_start, chunk_rows,
    Qb, Eb, Kb, decays, Aqk, D, row_scales,
    scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    L: tl.constexpr,
    L2NORM: tl.constexpr, GATE: tl.constexpr, B_RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads q, k [T, H, K], b, g [T, HV, K]. Writes Qb, Eb, Kb [chunks, HV, C, KP] of q, e, k as they come, not yet
    normed; the blocks' decays [chunks, HV, C / 16 + 1, KP] fp32; the blocks on the diagonal of Aqk [chunks, HV, C, C];
    in D [chunks, HV, C, N] fp32, each row's half of the inverse, those on its diagonal; and row_scales
    [chunks, HV, 2, C]: scale / norm of q, 1 / norm of k."""
    PARTS: tl.constexpr = C // 16 // L
    n, part, hv = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
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
    Qb += base * C * KP
    Eb += base * C * KP
    Kb += base * C * KP
    decays += base * (C // 16 + 1) * KP
    row_scales += base * 2 * C
    i, r = part * L * 16 + tl.arange(0, L * 16), tl.arange(0, 16)
    block, row, col = part * L + tl.arange(0, L)[:, None, None], r[None, :, None], r[None, None, :]
    S, T = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    S_leaf, T_leaf = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    qq, kk, qk = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    d = tl.arange(0, BK)[None, :]
    g_next = tl.load(g + i[:, None] * (HV * K) + d, (i[:, None] < rows) & (d < K), 0.0)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        mask = (i[:, None] < rows) & (d < K)
        at, at_hv = i[:, None] * (H * K) + d, i[:, None] * (HV * K) + d
        # A step ahead by hand: the software pipeline would copy g four bytes at a time, to suit the product's layout.
        gs = g_next
        g_next = tl.load(g + at_hv + BK, mask & (d + BK < K), 0.0)
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
        qs, ks = q_raw.reshape(L, 16, BK), k_raw.reshape(L, 16, BK)
        es = b_raw.reshape(L, 16, BK) * ks.to(tl.float32)
        y = tl.permute(ks.to(DOT), (0, 2, 1))
        qk = tl.dot(qs.to(DOT), y, qk, input_precision=PRECISION)
        if L2NORM:
            qq = tl.dot(qs.to(DOT), tl.permute(qs.to(DOT), (0, 2, 1)), qq, input_precision=PRECISION)
            kk = tl.dot(ks.to(DOT), y, kk, input_precision=PRECISION)

        at_block = (block * 16 + row) * KP + s + tl.arange(0, BK)[None, None, :]
        f = span_factor(col <= row, hi, lo)
        tl.store(Qb + at_block, (qs * f).to(DOT))
        tl.store(Eb + at_block, (es * f).to(DOT))
        tl.store(decays + block * KP + s + tl.arange(0, BK)[None, None, :] + 0 * row, f, row == 15)
        f = span_factor(col > row, hi, lo)
        tl.store(Kb + at_block, (ks * f).to(DOT))

        f_head, f_leaf, f_tail = leaf_factors(row, col, hi, lo)
        yq, ye = (qs * f_head).to(DOT), (es * f_head).to(DOT)
        y = tl.permute((ks * f_tail).to(DOT), (0, 2, 1))
        S = tl.dot(yq, y, S, input_precision=PRECISION)
        T = tl.dot(ye, y, T, input_precision=PRECISION)
        y = tl.permute((ks * f_leaf).to(DOT), (0, 2, 1))
        S_leaf = tl.dot(yq, y, S_leaf, input_precision=PRECISION)
        T_leaf = tl.dot(ye, y, T_leaf, input_precision=PRECISION)

    # Above the diagonal the leaf's products may have overflowed; nothing is taken from there.
    leaf, couple = (row // 8 == col // 8) & (row > col), coupled(row, col, 8)
    S = tl.where(leaf, S_leaf, tl.where(couple, S, 0.0))
    T = tl.where(leaf, T_leaf, tl.where(couple, T, 0.0))
    if L2NORM:
        q_scale = tl.rsqrt(tl.sum(tl.where(row == col, qq, 0.0), 2) + 1e-6) * scale
        k_scale = tl.rsqrt(tl.sum(tl.where(row == col, kk, 0.0), 2) + 1e-6)
    else:
        q_scale, k_scale = tl.full([L, 16], 1.0, tl.float32) * scale, tl.full([L, 16], 1.0, tl.float32)
    i = i.reshape(L, 16)
    tl.store(row_scales + i, q_scale)
    tl.store(row_scales + C + i, k_scale)
    S = tl.where(row == col, qk, S) * q_scale[:, :, None] * k_scale[:, None, :]
    tl.store(Aqk + base * C * C + (block * 16 + row) * C + block * 16 + col, S.to(DOT))
    T *= k_scale[:, :, None] * k_scale[:, None, :]
    inverse = tl.where(row == col, 1.0, tl.where((row ^ col) == 1, -T, 0.0))
    for level in tl.static_range(1, 4):
        Th = tl.where(coupled(row, col, 1 << level), T, 0.0)
        inverse -= tl.dot(tl.dot(inverse, Th, input_precision=PRECISION), inverse, input_precision=PRECISION)
    N: tl.constexpr = C // 2
    tl.store(D + base * C * N + (block * 16 + row) * N + (block * 16) % N + col, inverse)


@triton.jit
def _to_chunk_ends(
    Qb, Eb, Kb, Qg, Eg, Kt, row_scales, m, d, head, tail,
    KP: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Block m of Qb, Eb, Kb [16, BK] as they are; stores them decayed by what comes before and after the block."""
    i = m * 16 + tl.arange(0, 16)
    at = i[:, None] * KP + d[None, :]
    qb, eb, kb = tl.load(Qb + at), tl.load(Eb + at), tl.load(Kb + at)
    q_scale, k_scale = tl.load(row_scales + i)[:, None], tl.load(row_scales + C + i)[:, None]
    tl.store(Qg + at, (qb * head[None, :] * q_scale).to(DOT))
    tl.store(Eg + at, (eb * head[None, :] * k_scale).to(DOT))
    tl.store(Kt + at, (kb * tail[None, :] * k_scale).to(DOT))


@triton.jit
def _couple(S, T, D, A, Aqk, row_scales, m, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Of blocks m and m + 1, S and T [16, 16] the raw scores between them: their part of Aqk, and of the inverse, which
    goes to D [C, 32]."""
    i = m * 16 + tl.arange(0, 16)
    row, col = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    columns = tl.load(row_scales + C + i)[None, :]
    S *= tl.load(row_scales + i + 16)[:, None] * columns
    T *= tl.load(row_scales + C + i + 16)[:, None] * columns
    tl.store(Aqk + (m * 16 + 16 + row) * C + m * 16 + col, S.to(DOT))
    tl.store(Aqk + (m * 16 + row) * C + m * 16 + 16 + col, tl.zeros([16, 16], DOT))
    first, second = tl.load(D + (m * 16 + row) * 32 + col), tl.load(D + (m * 16 + 16 + row) * 32 + 16 + col)
    below = tl.dot(tl.dot(second, T, input_precision=PRECISION), first, input_precision=PRECISION)
    tl.store(D + (m * 16 + 16 + row) * 32 + col, -below)


@triton.jit
def chunk_scores_kernel(
    Qb, Eb, Kb, decays, D, row_scales, chunk_rows,
    Qg, Eg, Kt, A, Aqk, across_out,
    HV: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Reads what block_scores_kernel wrote. Writes Qg, Eg, Kt [chunks, HV, C, KP], A and the rest of Aqk
    [chunks, HV, C, C], and in the last row of decays the chunk's; for the backward pass across_out
    [chunks, HV, 3, N, KP], N = C / 2, what meets across the halves: k of the first, decayed to its end, q and e of the
    second, decayed from its start."""
    N: tl.constexpr = C // 2
    n, hv = tl.program_id(0), tl.program_id(1)
    if tl.load(chunk_rows + n) == 0:
        return
    base = n.to(tl.int64) * HV + hv
    Qb += base * C * KP
    Eb += base * C * KP
    Kb += base * C * KP
    Qg += base * C * KP
    Eg += base * C * KP
    Kt += base * C * KP
    decays += base * (C // 16 + 1) * KP
    row_scales += base * 2 * C
    A += base * C * C
    Aqk += base * C * C
    D += base * C * N
    across_out += base * 3 * N * KP
    r = tl.arange(0, N)
    row, col = r[:, None], r[None, :]
    q2_scale, e2_scale = tl.load(row_scales + N + row), tl.load(row_scales + C + N + row)
    k1_scale = tl.load(row_scales + C + row)
    S_first, T_first = tl.zeros([16, 16], tl.float32), tl.zeros([16, 16], tl.float32)
    S_second, T_second = tl.zeros([16, 16], tl.float32), tl.zeros([16, 16], tl.float32)
    S, T = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)
    for s in tl.range(0, KP, BK, num_stages=STAGES):
        d = s + tl.arange(0, BK)
        at, at16 = row * KP + d[None, :], tl.arange(0, 16)[:, None] * KP + d[None, :]
        q2, e2, k1 = tl.load(Qb + N * KP + at), tl.load(Eb + N * KP + at), tl.load(Kb + at)
        d0, d1, one = tl.load(decays + d), tl.load(decays + KP + d), tl.full([BK], 1.0, tl.float32)
        if N == 32:
            d2, d3 = tl.load(decays + 2 * KP + d), tl.load(decays + 3 * KP + d)
            before, after = tl.where(row >= 16, d2[None, :], 1.0), tl.where(row >= 16, 1.0, d1[None, :])
            q2, e2, k1 = q2 * before, e2 * before, k1 * after
        q2, e2, k1 = (q2 * q2_scale).to(DOT), (e2 * e2_scale).to(DOT), (k1 * k1_scale).to(DOT)
        S = tl.dot(q2, tl.trans(k1), S, input_precision=PRECISION)
        T = tl.dot(e2, tl.trans(k1), T, input_precision=PRECISION)
        if KEEP:
            tl.store(across_out + at, k1)
            tl.store(across_out + N * KP + at, q2)
            tl.store(across_out + 2 * N * KP + at, e2)

        if N == 32:
            # Loaded apart from what is stored below: used in products alone, shared memory holds them swizzled.
            first, third = 16 * KP + at16, 48 * KP + at16
            y = tl.trans(tl.load(Kb + at16))
            S_first = tl.dot(tl.load(Qb + first), y, S_first, input_precision=PRECISION)
            T_first = tl.dot(tl.load(Eb + first), y, T_first, input_precision=PRECISION)
            y = tl.trans(tl.load(Kb + 32 * KP + at16))
            S_second = tl.dot(tl.load(Qb + third), y, S_second, input_precision=PRECISION)
            T_second = tl.dot(tl.load(Eb + third), y, T_second, input_precision=PRECISION)
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 0, d, one, d1 * d2 * d3, KP, C, DOT)
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 1, d, d0, d2 * d3, KP, C, DOT)
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 2, d, d0 * d1, d3, KP, C, DOT)
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 3, d, d0 * d1 * d2, one, KP, C, DOT)
        else:
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 0, d, one, d1, KP, C, DOT)
            _to_chunk_ends(Qb, Eb, Kb, Qg, Eg, Kt, row_scales, 1, d, d0, one, KP, C, DOT)
        whole = d0 * d1
        if N == 32:
            whole *= d2 * d3
        tl.store(decays + (C // 16) * KP + d, whole)

    if N == 32:
        _couple(S_first, T_first, D, A, Aqk, row_scales, 0, C, DOT, PRECISION)
        _couple(S_second, T_second, D, A, Aqk, row_scales, 2, C, DOT, PRECISION)
        tl.debug_barrier()
    lower = row // 16 >= col // 16
    first, second = tl.load(D + row * N + col, lower, 0.0), tl.load(D + (N + row) * N + col, lower, 0.0)
    below = tl.dot(tl.dot(second, T, input_precision=PRECISION), first, input_precision=PRECISION)
    zero = tl.zeros([N, N], DOT)
    tl.store(A + row * C + col, first.to(DOT))
    tl.store(A + row * C + N + col, zero)
    tl.store(A + (N + row) * C + col, (-below).to(DOT))
    tl.store(A + (N + row) * C + N + col, second.to(DOT))
    tl.store(Aqk + row * C + N + col, zero)
    tl.store(Aqk + (N + row) * C + col, S.to(DOT))
