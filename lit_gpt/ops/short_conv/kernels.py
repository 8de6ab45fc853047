"""The short convolution in Triton: forward and backward, one launch and one pass over memory each.

    u_t = sum_j w_j x_{t-j}      y = u sigmoid(u)      w_j = weight[:, W-1-j], j < W <= 4
    du = dy s (1 + u (1 - s)), s = sigmoid(u)      dx_t = sum_j w_j du_{t+j}      dw_j = sum_t du_t x_{t-j}

where x_{t-j} counts as 0 if it is of the document before. A program walks down BT tokens of BC channels; the last
inputs (backward: also the sums for dx that are not yet complete) move through registers from token to token, so each
element is loaded once, but for the few tokens that neighbouring programs share. Four tokens go at a time, all their
loads first.

Bytes per element of x, in 16 bits:
    forward,  BT = 64:  reads x (2, and 3/64 of it again), writes y (2): 4.1
    backward, BT = 128: reads x (2, 6/128 again), dy (2, 3/128 again), writes dx (2) and dw per program (16/128, fp32,
                        read once more to be added up in a fixed order): 6.4
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BT, FORWARD_STAGES = 64, 1
BACKWARD_BT, BACKWARD_STAGES = 128, 3
BC, WARPS = 128, 1


@triton.jit
def pick(x, y, z, i):
    """x, y or z, by a scalar i of 0, 1 or 2."""
    if i == 0:
        chosen = x
    elif i == 1:
        chosen = y
    else:
        chosen = z
    return chosen


@triton.jit
def channels(pid, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BC: tl.constexpr):
    """Of a block of channels: its piece, the piece's width, its first channel in the piece and in x."""
    n0: tl.constexpr = (C0 + BC - 1) // BC
    n1: tl.constexpr = (C1 + BC - 1) // BC
    piece = (pid >= n0).to(tl.int32) + (pid >= n0 + n1).to(tl.int32)
    width = tl.where(piece == 0, C0, tl.where(piece == 1, C1, C2))
    block = pid - tl.where(piece == 0, 0, tl.where(piece == 1, n0, n0 + n1))
    begin = tl.where(piece == 0, 0, tl.where(piece == 1, C0, C0 + C1))
    return piece, width, block * BC, begin + block * BC


@triton.jit
def tap(weight, c, live, j: tl.constexpr, W: tl.constexpr):
    """w_j of channels c; 0 beyond the last tap."""
    if j < W:
        return tl.load(weight + c * W + (W - 1 - j), live, 0.0).to(tl.float32)
    else:
        return tl.zeros([c.shape[0]], tl.float32)


@triton.jit
def taps(weight, c, live, W: tl.constexpr):
    """w_0 ... w_3 of channels c."""
    w0, w1 = tap(weight, c, live, 0, W), tap(weight, c, live, 1, W)
    w2, w3 = tap(weight, c, live, 2, W), tap(weight, c, live, 3, W)
    return w0, w1, w2, w3


@triton.jit
def input_at(x, t, T, c, at, width, x_t):
    """x_t of a row, 0 from T on."""
    return tl.load(x + t * x_t + c, at < tl.where(t < T, width, 0), 0.0).to(tl.float32)


@triton.jit
def input_before(x, history, t, c, at, width, x_t, h_t, HAS_HISTORY: tl.constexpr, W: tl.constexpr):
    """x_t of a row, t >= -3: before the first token from the history [W-1, C], or 0."""
    row = tl.load(x + t * x_t + c, at < tl.where(t >= 0, width, 0), 0.0).to(tl.float32)
    if HAS_HISTORY:
        kept = tl.where(t < 0, tl.where(t >= 1 - W, width, 0), 0)
        row += tl.load(history + (t + W - 1) * h_t + c, at < kept, 0.0).to(tl.float32)
    return row


@triton.jit
def positions_of_four(positions, t, T, HAS_POSITIONS: tl.constexpr):
    """Places in their documents of tokens t ... t + 3, and whether a tap of one of them reaches out of its own."""
    if HAS_POSITIONS:
        p0, p1 = tl.load(positions + t, t < T, 3), tl.load(positions + t + 1, t + 1 < T, 3)
        p2, p3 = tl.load(positions + t + 2, t + 2 < T, 3), tl.load(positions + t + 3, t + 3 < T, 3)
        return p0, p1, p2, p3, tl.minimum(tl.minimum(p0, p1), tl.minimum(p2, p3)) < 3
    else:
        return 3, 3, 3, 3, False


@triton.jit
def in_document(p, x1, x2, x3, RESET: tl.constexpr):
    """The three values of the tokens before place p, or weights for them; 0 for those of the document before."""
    if RESET:
        x1, x2, x3 = tl.where(p >= 1, x1, 0.0), tl.where(p >= 2, x2, 0.0), tl.where(p >= 3, x3, 0.0)
    return x1, x2, x3


@triton.jit
def output(p, x0, x1, x2, x3, w0, w1, w2, w3, RESET: tl.constexpr):
    """y of the token at place p."""
    x1, x2, x3 = in_document(p, x1, x2, x3, RESET)
    u = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return u * tl.sigmoid(u)


@triton.jit
def four_outputs(p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, w0, w1, w2, w3, RESET: tl.constexpr):
    """y of four tokens with inputs r0 ... r3, after x3, x2, x1."""
    y0 = output(p0, r0, x1, x2, x3, w0, w1, w2, w3, RESET)
    y1 = output(p1, r1, r0, x1, x2, w0, w1, w2, w3, RESET)
    y2 = output(p2, r2, r1, r0, x1, w0, w1, w2, w3, RESET)
    y3 = output(p3, r3, r2, r1, r0, w0, w1, w2, w3, RESET)
    return y0, y1, y2, y3


@triton.jit
def forward_kernel(
    x, weight, positions, history, y0, y1, y2, last,
    T, x_b, x_t, p_b, h_b, h_t,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_HISTORY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads x [B, T, C], weight [C, W], positions [B, T], history [B, W-1, C]. Writes y0, y1, y2 [B, T, C0 / C1 / C2];
    with a history, what follows it into last [B, W-1, C], which may be the history if BT >= T."""
    piece, width, first, begin = channels(tl.program_id(0), C0, C1, C2, BC)
    row, t0 = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * BT
    at = first + tl.arange(0, BC)
    c, live = begin + tl.arange(0, BC), at < width
    y, x = pick(y0, y1, y2, piece) + row * T * width + at, x + row * x_b
    if HAS_POSITIONS:
        positions += row * p_b
    if HAS_HISTORY:
        history += row * h_b
    w0, w1, w2, w3 = taps(weight, c, live, W)
    x1 = input_before(x, history, t0 - 1, c, at, width, x_t, h_t, HAS_HISTORY, W)
    x2 = input_before(x, history, t0 - 2, c, at, width, x_t, h_t, HAS_HISTORY, W)
    x3 = input_before(x, history, t0 - 3, c, at, width, x_t, h_t, HAS_HISTORY, W)
    for t in tl.range(t0, tl.minimum(t0 + BT, T), 4, num_stages=STAGES):
        r0, r1 = input_at(x, t, T, c, at, width, x_t), input_at(x, t + 1, T, c, at, width, x_t)
        r2, r3 = input_at(x, t + 2, T, c, at, width, x_t), input_at(x, t + 3, T, c, at, width, x_t)
        p0, p1, p2, p3, near = positions_of_four(positions, t, T, HAS_POSITIONS)
        if near:
            out0, out1, out2, out3 = four_outputs(p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, w0, w1, w2, w3, True)
        else:
            out0, out1, out2, out3 = four_outputs(p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, w0, w1, w2, w3, False)
        dtype = y0.dtype.element_ty
        tl.store(y + t * width, out0.to(dtype), live)
        tl.store(y + (t + 1) * width, out1.to(dtype), at < tl.where(t + 1 < T, width, 0))
        tl.store(y + (t + 2) * width, out2.to(dtype), at < tl.where(t + 2 < T, width, 0))
        tl.store(y + (t + 3) * width, out3.to(dtype), at < tl.where(t + 3 < T, width, 0))
        x1, x2, x3 = r3, r2, r1
    if HAS_HISTORY:  # noqa: SIM102 (one is known at compile time)
        if t0 + BT >= T:
            x1 = input_before(x, history, T - 1, c, at, width, x_t, h_t, True, W)
            x2 = input_before(x, history, T - 2, c, at, width, x_t, h_t, True, W)
            x3 = input_before(x, history, T - 3, c, at, width, x_t, h_t, True, W)
            kept = last + row * h_b + c
            if W > 1:
                tl.store(kept + (W - 2) * h_t, x1.to(last.dtype.element_ty), live)
            if W > 2:
                tl.store(kept + (W - 3) * h_t, x2.to(last.dtype.element_ty), live)
            if W > 3:
                tl.store(kept + (W - 4) * h_t, x3.to(last.dtype.element_ty), live)


@triton.jit
def gradient_step(
    p, inside, x0, x1, x2, x3, dout, w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET: tl.constexpr,
):  # fmt: skip
    """One token's part: dx of three tokens before, now complete; the sums a_j for dw_j (of tokens inside the program's
    own); the sums d_j for dx of 1 - j tokens on, so far."""
    x1, x2, x3 = in_document(p, x1, x2, x3, RESET)
    u = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    s = tl.sigmoid(u)
    du = dout * s * (1.0 + u * (1.0 - s))
    own = tl.where(inside, du, 0.0)
    a0, a1, a2, a3 = a0 + own * x0, a1 + own * x1, a2 + own * x2, a3 + own * x3
    w1, w2, w3 = in_document(p, w1, w2, w3, RESET)
    return d3 + w3 * du, a0, a1, a2, a3, w0 * du, d1 + w1 * du, d2 + w2 * du


@triton.jit
def four_gradients(
    t, end, p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, g0, g1, g2, g3,
    w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET: tl.constexpr,
):  # fmt: skip
    """The parts of tokens t ... t + 3 with inputs r0 ... r3, after x3, x2, x1: dx of t - 3 ... t, and the sums."""
    dx0, a0, a1, a2, a3, d1, d2, d3 = gradient_step(
        p0, t < end, r0, x1, x2, x3, g0, w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET
    )
    dx1, a0, a1, a2, a3, d1, d2, d3 = gradient_step(
        p1, t + 1 < end, r1, r0, x1, x2, g1, w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET
    )
    dx2, a0, a1, a2, a3, d1, d2, d3 = gradient_step(
        p2, t + 2 < end, r2, r1, r0, x1, g2, w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET
    )
    dx3, a0, a1, a2, a3, d1, d2, d3 = gradient_step(
        p3, t + 3 < end, r3, r2, r1, r0, g3, w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, RESET
    )
    return dx0, dx1, dx2, dx3, a0, a1, a2, a3, d1, d2, d3


@triton.jit
def backward_kernel(
    x, weight, positions, dy0, dy1, dy2, dx, dweight,
    T, x_b, x_t, p_b,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads x, weight, positions and dy0, dy1, dy2 as the forward kernel writes them. Writes dx [B, T, C] and, for each
    program down the tokens, dweight [B, programs, W, C] in fp32."""
    piece, width, first, begin = channels(tl.program_id(0), C0, C1, C2, BC)
    row, t0 = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64) * BT
    at = first + tl.arange(0, BC)
    c, live, end = begin + tl.arange(0, BC), at < width, t0 + BT
    C: tl.constexpr = C0 + C1 + C2
    dy, x, dx = pick(dy0, dy1, dy2, piece) + row * T * width, x + row * x_b, dx + row * T * C + c
    if HAS_POSITIONS:
        positions += row * p_b
    w0, w1, w2, w3 = taps(weight, c, live, W)
    x1 = input_before(x, x, t0 - 1, c, at, width, x_t, 0, False, W)
    x2 = input_before(x, x, t0 - 2, c, at, width, x_t, 0, False, W)
    x3 = input_before(x, x, t0 - 3, c, at, width, x_t, 0, False, W)
    zero = tl.zeros([BC], tl.float32)
    a0, a1, a2, a3, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero
    for t in tl.range(t0, tl.minimum(end, T) + 3, 4, num_stages=STAGES):
        r0, r1 = input_at(x, t, T, c, at, width, x_t), input_at(x, t + 1, T, c, at, width, x_t)
        r2, r3 = input_at(x, t + 2, T, c, at, width, x_t), input_at(x, t + 3, T, c, at, width, x_t)
        g0, g1 = input_at(dy, t, T, at, at, width, width), input_at(dy, t + 1, T, at, at, width, width)
        g2, g3 = input_at(dy, t + 2, T, at, at, width, width), input_at(dy, t + 3, T, at, at, width, width)
        p0, p1, p2, p3, near = positions_of_four(positions, t, T, HAS_POSITIONS)
        if near:
            dx0, dx1, dx2, dx3, a0, a1, a2, a3, d1, d2, d3 = four_gradients(
                t, end, p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, g0, g1, g2, g3,
                w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, True,
            )  # fmt: skip
        else:
            dx0, dx1, dx2, dx3, a0, a1, a2, a3, d1, d2, d3 = four_gradients(
                t, end, p0, p1, p2, p3, r0, r1, r2, r3, x1, x2, x3, g0, g1, g2, g3,
                w0, w1, w2, w3, a0, a1, a2, a3, d1, d2, d3, False,
            )  # fmt: skip
        dtype = dx.dtype.element_ty
        stop = tl.minimum(end, T)
        tl.store(dx + (t - 3) * C, dx0.to(dtype), at < tl.where(t > t0, width, 0))
        tl.store(dx + (t - 2) * C, dx1.to(dtype), at < tl.where(t > t0, tl.where(t - 2 < stop, width, 0), 0))
        tl.store(dx + (t - 1) * C, dx2.to(dtype), at < tl.where(t > t0, tl.where(t - 1 < stop, width, 0), 0))
        tl.store(dx + t * C, dx3.to(dtype), at < tl.where(t < stop, width, 0))
        x1, x2, x3 = r3, r2, r1
    dweight += (row * tl.num_programs(1) + tl.program_id(1)) * W * C + c
    tl.store(dweight + (W - 1) * C, a0, live)
    if W > 1:
        tl.store(dweight + (W - 2) * C, a1, live)
    if W > 2:
        tl.store(dweight + (W - 3) * C, a2, live)
    if W > 3:
        tl.store(dweight + (W - 4) * C, a3, live)


def _launch(x: Tensor, weight: Tensor, positions: Optional[Tensor], history: Optional[Tensor], sizes: list[int]):
    """(pieces of y, what follows the history)."""
    (B, T, _), W = x.shape, weight.shape[1]
    x = x if x.stride(2) == 1 else x.contiguous()
    pieces = [torch.empty(B, T, size, dtype=x.dtype, device=x.device) for size in sizes]
    last = history
    if history is not None and T > FORWARD_BT:  # the first program reads the history while the last one writes
        last = torch.empty_like(history)
    (C0, C1, C2), (y0, y1, y2) = _three(sizes, 0), _three(pieces, pieces[0])
    blocks = sum(triton.cdiv(size, BC) for size in sizes)
    forward_kernel[(blocks, triton.cdiv(T, FORWARD_BT), B)](
        x, weight.contiguous(), positions, history, y0, y1, y2, last,
        T, x.stride(0), x.stride(1), T, *((0, 0) if history is None else history.stride()[:2]),
        C0=C0, C1=C1, C2=C2, W=W, BT=FORWARD_BT, BC=BC,
        HAS_POSITIONS=positions is not None, HAS_HISTORY=history is not None,
        STAGES=FORWARD_STAGES, num_warps=WARPS,
    )  # fmt: skip
    return pieces, last


def _three(items: list, filler) -> list:
    return [*items, filler, filler][:3]


@torch.library.custom_op("lit_gpt::short_conv", mutates_args=())
def short_conv(x: Tensor, weight: Tensor, positions: Optional[Tensor], sizes: list[int]) -> list[Tensor]:
    """y of x [B, T, C] in up to three contiguous pieces; see `lit_gpt.ops.short_conv`. Differentiable in x, weight."""
    return _launch(x, weight, None if positions is None else positions.contiguous(), None, sizes)[0]


@short_conv.register_fake
def _(x, weight, positions, sizes):
    return [x.new_empty(*x.shape[:2], size) for size in sizes]


@torch.library.custom_op("lit_gpt::short_conv_backward", mutates_args=())
def short_conv_backward(
    x: Tensor, weight: Tensor, positions: Optional[Tensor], grads: list[Tensor], sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, given those of the pieces."""
    (B, T, C), W = x.shape, weight.shape[1]
    x = x if x.stride(2) == 1 else x.contiguous()
    positions = None if positions is None else positions.contiguous()
    grads = [grad.contiguous() for grad in grads]
    dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(T, BACKWARD_BT)
    dweight = torch.empty(B, programs, W, C, dtype=torch.float32, device=x.device)
    (C0, C1, C2), (dy0, dy1, dy2) = _three(sizes, 0), _three(grads, grads[0])
    backward_kernel[(sum(triton.cdiv(size, BC) for size in sizes), programs, B)](
        x, weight.contiguous(), positions, dy0, dy1, dy2, dx, dweight, T, x.stride(0), x.stride(1), T,
        C0=C0, C1=C1, C2=C2, W=W, BT=BACKWARD_BT, BC=BC,
        HAS_POSITIONS=positions is not None, STAGES=BACKWARD_STAGES, num_warps=WARPS,
    )  # fmt: skip
    return dx, dweight.sum((0, 1)).t().contiguous().to(weight.dtype)


@short_conv_backward.register_fake
def _(x, weight, positions, grads, sizes):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grads):
    return *short_conv_backward(*ctx.saved_tensors, grads, ctx.sizes), None, None


short_conv.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("lit_gpt::short_conv_after", mutates_args=("history",))
def short_conv_after(x: Tensor, weight: Tensor, history: Tensor, positions: Optional[Tensor]) -> Tensor:
    """y [B, T, C] after the inputs in history [B, W-1, C], which becomes the last W-1 inputs. Inference only."""
    (y,), last = _launch(x, weight, positions, history, [x.shape[2]])
    if last is not history:
        history.copy_(last)
    return y


@short_conv_after.register_fake
def _(x, weight, history, positions):
    return x.new_empty(x.shape)
