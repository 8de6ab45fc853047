"""What a chunk of C rows needs before any state is known.

With e = b * k and decay(i, j) the decays of rows j+1..i multiplied:

    Aqk_ij = scale q_i . decay(i, j) k_j  (i >= j)      T_ij = e_i . decay(i, j) k_j  (i > j)      A = (I + T)^-1
    Qg = scale q * (decay from the chunk's start)      Eg = e * (the same)      Kt = k * (decay to the chunk's end)

block_scores_kernel does what lies within blocks of 16 rows, as products of blocks [C / 16, 16, BK]: a warp holds its
block in registers from factor to product. It leaves q, e, k decayed to their block's ends (Qb, Eb, Kb) and the decay of
each block. chunk_scores_kernel, which needs no exponentials any more, does the rest: the scores between blocks come
level by level, each level one product and a mask, and the inverse doubles its blocks in the same order, D_2h = D_h - D_h
T_h D_h with T_h the part of T at level h.
"""

import triton
import triton.language as tl

from .decay import coupled, gate, leaf_factors, level_span, log_decay, span_factor, split_log2


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
    normed; the blocks' decays [chunks, HV, C / 16, KP] fp32; the blocks on the diagonal of Aqk [chunks, HV, C, C]; the
    inverses D [chunks, HV, C / 16, 16, 16] fp32 of those of I + T; and row_scales [chunks, HV, 2, C]: scale / norm of q,
    1 / norm of k."""
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
    decays += base * (C // 16) * KP
    row_scales += base * 2 * C
    i, r = part * L * 16 + tl.arange(0, L * 16), tl.arange(0, 16)
    block, row, col = part * L + tl.arange(0, L)[:, None, None], r[None, :, None], r[None, None, :]
    S, T = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    S_leaf, T_leaf = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
    qq, kk, qk = tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32), tl.zeros([L, 16, 16], tl.float32)
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
    tl.store(D + base * C * 16 + block * 256 + row * 16 + col, inverse)


@triton.jit
def chunk_scores_kernel(
    Qb, Eb, Kb, decays, D, row_scales, chunk_rows,
    Qg, Eg, Kt, A, Aqk,
    HV: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads what block_scores_kernel wrote. Writes Qg, Eg, Kt [chunks, HV, C, KP], A and the rest of Aqk
    [chunks, HV, C, C]."""
    n, hv = tl.program_id(0), tl.program_id(1)
    if tl.load(chunk_rows + n) == 0:
        return
    base = n.to(tl.int64) * HV + hv
    tiles = base * C * KP
    decays += base * (C // 16) * KP
    row_scales += base * 2 * C
    i = tl.arange(0, C)
    row, col = i[:, None], i[None, :]
    block = row // 16
    odd, later = (block & 1) == 1, block >= C // 32
    q_scale, k_scale = tl.load(row_scales + i)[:, None], tl.load(row_scales + C + i)[:, None]
    S, T = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    S_wide, T_wide = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for s in range(0, KP, BK):
        d = s + tl.arange(0, BK)[None, :]
        at = tiles + row * KP + d
        qb, eb, kb = tl.load(Qb + at), tl.load(Eb + at), tl.load(Kb + at)
        S = tl.dot(qb, tl.trans(kb), S, input_precision=PRECISION)
        T = tl.dot(eb, tl.trans(kb), T, input_precision=PRECISION)
        pair = tl.load(decays + (block ^ 1) * KP + d)  # decays of the other block of a row's couple
        before, after = tl.where(odd, pair, 1.0), tl.where(odd, 1.0, pair)
        qs, es, ks = qb.to(tl.float32) * before, eb.to(tl.float32) * before, kb.to(tl.float32) * after
        if WIDE == 2:
            y = tl.trans(ks.to(DOT))
            S_wide = tl.dot(qs.to(DOT), y, S_wide, input_precision=PRECISION)
            T_wide = tl.dot(es.to(DOT), y, T_wide, input_precision=PRECISION)
            other = (block & 2) ^ 2  # first block of the other half
            pair = tl.load(decays + other * KP + d) * tl.load(decays + (other + 1) * KP + d)
            before, after = tl.where(later, pair, 1.0), tl.where(later, 1.0, pair)
            qs, es, ks = qs * before, es * before, ks * after
        tl.store(Qg + at, (qs * q_scale).to(DOT))
        tl.store(Eg + at, (es * k_scale).to(DOT))
        tl.store(Kt + at, (ks * k_scale).to(DOT))

    across = tl.load(row_scales + C + i)[None, :]
    S, T = tl.where(coupled(row, col, 16), S, 0.0), tl.where(coupled(row, col, 16), T, 0.0)
    if WIDE == 2:
        S, T = tl.where(coupled(row, col, 32), S_wide, S), tl.where(coupled(row, col, 32), T_wide, T)
    square = row * C + col
    tl.store(Aqk + base * C * C + square, (S * q_scale * across).to(DOT), row // 16 != col // 16)
    T *= k_scale * across
    inverse = tl.load(D + base * C * 16 + row * 16 + col % 16, (row // 16) == (col // 16), 0.0)
    for level in tl.static_range(WIDE):
        Th = tl.where(coupled(row, col, 16 << level), T, 0.0)
        inverse -= tl.dot(tl.dot(inverse, Th, input_precision=PRECISION), inverse, input_precision=PRECISION)
    tl.store(A + base * C * C + square, inverse.to(DOT))
