"""The nearest rows of the backward pass, in registers.

Of a product [BK, N] four threads share a row; each of them holds columns 2 c and 2 c + 1 of every 8. Where the columns
stand for rows in the order of row_order, a thread so has N / 4 consecutive ones, a leaf. What these mean for each other
it works out alone: no product, no shared memory, no waiting, and everything in fp32.
"""

import triton
import triton.language as tl


def row_order(c, N):
    """The row that column c of a tile of N stands for."""
    return c % 8 // 2 * (N // 4) + c // 8 * 2 + c % 2


@triton.jit
def in_row_order(x):
    """x [N, N] with its columns, rows from first to last, in that order."""
    N: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (N, 4, N // 8, 2)), (0, 2, 1, 3)), (N, N))


@triton.jit
def _halves(x):
    """x [BK, n] as two of [BK, n / 2], the first columns and the last."""
    BK: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (BK, 2, n // 2)), (0, 2, 1)))


@triton.jit
def _beside(x, y):
    """The inverse of _halves."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def rows_of(x):
    """x [BK, N] as a tuple of N / 4 tiles [BK, 4], one for each row of the leaves. N is 16 or 32."""
    N: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (x.shape[0], N // 2, 2)))
    r0, r2 = _halves(even)
    r1, r3 = _halves(odd)
    if N == 16:
        return r0, r1, r2, r3
    else:
        r4, r6 = _halves(r2)
        r5, r7 = _halves(r3)
        r0, r2 = _halves(r0)
        r1, r3 = _halves(r1)
        return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def from_rows(rows, N: tl.constexpr):
    """The inverse of rows_of."""
    if N == 16:
        even, odd = _beside(rows[0], rows[2]), _beside(rows[1], rows[3])
    else:
        even = _beside(_beside(rows[0], rows[2]), _beside(rows[4], rows[6]))
        odd = _beside(_beside(rows[1], rows[3]), _beside(rows[5], rows[7]))
    return tl.reshape(tl.join(even, odd), (even.shape[0], N))


@triton.jit
def _added(rows, n: tl.constexpr, y):
    """The rows with y added to number n."""
    return rows[:n] + (rows[n] + y,) + rows[n + 1 :]


@triton.jit
def couple_gradients(q, k, e, x, dq, de, dk, dg, Wq, Wt, first: tl.constexpr, h: tl.constexpr, C: tl.constexpr):
    """Adds to dq, de, dk, dg what two sub-blocks of h rows, from number `first` of each leaf on, mean for each other.
    Tuples of rows, x log2 of a row's decay; Wq, Wt [1, 4] point to the corner of each leaf."""
    zero = tl.zeros(x[0].shape, tl.float32)
    factors, kf, sums, exponent = (), (), (), zero
    for n in tl.static_range(h):  # even rows, from the last to the first
        f = tl.exp2(exponent)
        factors, kf, sums = (f,) + factors, (k[first + h - 1 - n] * f,) + kf, sums + (zero,)
        exponent += x[first + h - 1 - n]
    products, exponent = (), zero
    for n in tl.static_range(h):  # odd rows
        exponent += x[first + h + n]
        f = tl.exp2(exponent)
        qf, ef, P, R, more = q[first + h + n] * f, e[first + h + n] * f, zero, zero, ()
        for m in tl.static_range(h):
            wq = tl.load(Wq + (first + h + n) * C + first + m).to(tl.float32)
            wt = tl.load(Wt + (first + h + n) * C + first + m).to(tl.float32)
            P += wq * kf[m]
            R += wt * kf[m]
            more = more + (sums[m] + wq * qf + wt * ef,)
        sums, products = more, products + (qf * P + ef * R,)
        dq, de = _added(dq, first + h + n, f * P), _added(de, first + h + n, f * R)
    total = zero
    for n in tl.static_range(h):  # an odd row's factor spans the odd ones before it and itself
        total += products[h - 1 - n]
        dg = _added(dg, first + 2 * h - 1 - n, total)
    total = zero
    for n in tl.static_range(h):  # an even row's the even ones after it
        dg = _added(dg, first + n, total)
        dk = _added(dk, first + n, factors[n] * sums[n])
        total += kf[n] * sums[n]
    return dq, de, dk, dg
