"""Decay factors of a chunk, for every log-decay from 0 to -inf.

Every factor the chunk algorithm needs is a product of alpha = exp(g) over a span of rows, so it is at most 1. Within a
block of N rows (16 forward, half a chunk backward) we write its exponent as a sum over the span and let the tensor
cores add it up: with x = g log2(e) and a 0/1 matrix M [N, N] whose row i marks the span that row i needs,

    factor = exp2(M x)        and, going back,        dg = M^T (factor * dfactor)

Nothing is subtracted, so nothing cancels and nothing overflows. The spans of a block:

    head   i: rows 0..i                  from the block's start through i
    tail   j: rows j+1..N-1              after j to the block's end
    level  h = N/2, N/4, ... 1: sub-blocks of h rows, taken in couples (even, odd)
           i in the odd one, p its first row: rows p..i; j in the even one: rows j+1..p-1

A pair of rows i > j of one block falls into exactly one couple of exactly one level, and its decay is the product of
the two. A pair of rows of two blocks decays by the tail of one, the head of the other, and all of the blocks between.

Within sub-blocks of 8 rows the forward pass takes one product instead of three levels: with P_i the sum of x from the
sub-block's start through i, decay(i, j) = exp2(P_i + 112) exp2(-112 - P_j). The two stay between 2^-112 and 2^112,
because no token counts for less than 2^-28 there: 4e-9, less than what fp32 resolves beside 1. The shift is a constant,
and a power of two changes no rounding, so what a row gives depends on no row after it.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def span_table(N: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The span matrices M [2 + log2 N, N, N] of N rows: head, tail, then the levels N/2 ... 1."""
    i, s = torch.arange(N)[:, None], torch.arange(N)[None]
    spans = [s <= i, s > i]
    h = N // 2
    while h:
        odd, start = (i // h) % 2 == 1, i // h * h
        spans.append(torch.where(odd, (s >= start) & (s <= i), (s > i) & (s < start + h)))
        h //= 2
    return torch.stack(spans).to(device, dtype)


@functools.cache
def span_table_transposed(N: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Their transposes."""
    return span_table(N, dtype, device).transpose(1, 2).contiguous()


@triton.jit
def log_decay(x, a_log, bias, lower_bound, GATE: tl.constexpr):
    """g from what the caller gave: g itself (GATE 0), -exp(A_log) softplus(x + bias) (1) or lower_bound
    sigmoid(exp(A_log) (x + bias)) (2)."""
    if GATE == 1:
        y = x + bias
        x = -tl.exp(a_log) * tl.where(y > 20.0, y, tl.log(1.0 + tl.exp(tl.minimum(y, 20.0))))
    elif GATE == 2:
        x = lower_bound * tl.sigmoid(tl.exp(a_log) * (x + bias))
    return x


@triton.jit
def log_decay_backward(x, a_log, bias, lower_bound, dg, GATE: tl.constexpr):
    """(dx, dA_log), both elementwise; dbias = dx."""
    if GATE == 1:
        y = x + bias
        dx = -tl.exp(a_log) * tl.sigmoid(y) * dg
        da = dg * log_decay(x, a_log, bias, lower_bound, GATE)
    else:
        u = tl.exp(a_log) * (x + bias)
        p = tl.sigmoid(u)
        du = dg * lower_bound * p * (1.0 - p)
        dx = du * tl.exp(a_log)
        da = du * u
    return dx, da


@triton.jit
def gate(x, RANGE: tl.constexpr):
    """A write or erase gate from what the caller gave: the gate itself (RANGE 0), or RANGE sigmoid(x) in fp32."""
    if RANGE > 0:
        x = RANGE * tl.sigmoid(x.to(tl.float32))
    return x


@triton.jit
def gate_backward(y, dy, RANGE: tl.constexpr):
    """dx of y = gate(x)."""
    if RANGE > 0:
        dy *= y * (1.0 - y / RANGE)
    return dy


@triton.jit
def split_log2(g):
    """x = g log2(e) as two fp16 summands (22 bits). Below -150, where exp2 is 0 in fp32, x stays at -150: -inf is
    legal."""
    x = tl.maximum(g * 1.4426950408889634, -150.0, propagate_nan=tl.PropagateNan.ALL)
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def coupled(row, col, h):
    """Where row i lies in the odd and column j in the even sub-block of one couple of level h."""
    return (((row ^ col) & -h) == h) & (row > col)


@triton.jit
def span_exponent(span, hi, lo):
    """M x [L, 16, BK] for a span matrix M [1, 16, 16] and blocks x = hi + lo [L, 16, BK]."""
    M = tl.broadcast_to(tl.where(span, 1.0, 0.0).to(tl.float16), (hi.shape[0], 16, 16))
    return tl.dot(M, lo, tl.dot(M, hi))


@triton.jit
def span_factor(span, hi, lo):
    """exp2(M x), as above."""
    return tl.exp2(span_exponent(span, hi, lo))


@triton.jit
def leaf_factors(row, col, hi, lo):
    """Of every row: that of its head within 8 rows, times 2^112; its inverse; and that of its tail within 8 rows, times
    2^-112."""
    tail = span_exponent((col > row) & (col < (row & -8) + 8), hi, lo)
    hi = tl.maximum(hi, tl.full(hi.shape, -28.0, tl.float16))
    head = span_exponent((col >= (row & -8)) & (col <= row), hi, lo)
    return tl.exp2(head + 112.0), tl.exp2(-112.0 - head), tl.exp2(tail) * 1.925929944387236e-34


@triton.jit
def span_factor_transposed(spans, m, hi, lo, N: tl.constexpr):
    """exp2(M_m x) as a tile [BK, N], channel by row; x = hi + lo [BK, N] fp16, spans [.., N, N] fp16."""
    i = tl.arange(0, N)
    M = tl.trans(tl.load(spans + m * N * N + i[:, None] * N + i[None, :]))
    return tl.exp2(tl.dot(lo, M, tl.dot(hi, M)))


@triton.jit
def dot_split(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y with x in fp32; beside y in bf16, x is the sum of two of them, 16 bits."""
    hi = x
    if y.dtype == tl.bfloat16:  # cut, not rounded: a mask is cheaper than a conversion there and back
        hi = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        acc = tl.dot((x - hi).to(y.dtype), y, acc)
    return tl.dot(hi.to(y.dtype), y, acc, input_precision=PRECISION)


@triton.jit
def span_sum_transposed(spans_transposed, m, x, acc, N: tl.constexpr, PRECISION: tl.constexpr):
    """acc + M_m^T x, what the factors' gradients x add to dg, as tiles [BK, N]; spans_transposed [.., N, N] is of the
    dots' type."""
    i = tl.arange(0, N)
    M = tl.trans(tl.load(spans_transposed + m * N * N + i[:, None] * N + i[None, :]))
    return dot_split(x, M, acc, PRECISION)
