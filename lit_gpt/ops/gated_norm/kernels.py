"""RMS norm times an activated gate in Triton: forward and backward, one launch and one pass over memory each.

    n = x rstd, rstd = 1 / sqrt(mean(x^2) + eps)      y = n weight a(z)          a(z) = z sigmoid(z), or sigmoid(z)
    dn = dy weight a(z)      dx = rstd (dn - n mean(dn n))      dz = dy n weight a'(z)      dweight = sum dy a(z) n

Bytes per element in 16 bits: forward reads x, z and writes y: 6; backward reads x, z, dy and writes dx, dz: 10. rstd
is computed again in the backward rather than kept. dweight comes as one row of fp32 per program, added up in a fixed
order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, TILES, WARPS = 2048, 16, 4
"""Elements of a tile, tiles that a program of the backward goes through, warps."""


@triton.jit
def activate(z, SILU: tl.constexpr):
    """a(z) and a'(z)."""
    s = tl.sigmoid(z)
    if SILU:
        return z * s, s * (1.0 + z * (1.0 - s))
    else:
        return s, s * (1.0 - s)


@triton.jit
def forward_kernel(
    x, weight, gate, y, rows, eps, x_t, x_h, g_t, g_h,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Reads x, gate [tokens, H, V] (strides x_t, x_h, 1 and g_t, g_h, 1), weight [V]. Writes y [tokens, H, V]."""
    row, c = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None], tl.arange(0, VP)[None, :]
    token, head = row // H, row % H
    live = (row < rows) & (c < V)
    x_ = tl.load(x + token * x_t + head * x_h + c, live, 0.0).to(tl.float32)
    z = tl.load(gate + token * g_t + head * g_h + c, live, 0.0).to(tl.float32)
    weight_ = tl.load(weight + c, c < V, 0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_ * x_, 1, keep_dims=True) / V + eps)
    a, _ = activate(z, SILU)
    tl.store(y + row * V + c, (x_ * rstd * weight_ * a).to(y.dtype.element_ty), live)


@triton.jit
def backward_kernel(
    x, weight, gate, dy, dx, dgate, dweight, rows, eps, x_t, x_h, g_t, g_h, y_t, y_h,
    H: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Reads x, gate, dy, weight. Writes dx, dgate [tokens, H, V] and dweight [programs, V] in fp32."""
    c = tl.arange(0, VP)[None, :]
    weight_ = tl.load(weight + c, c < V, 0.0).to(tl.float32)
    sums = tl.zeros([R, VP], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * R + tl.arange(0, R)[:, None]
        token, head = row // H, row % H
        live = (row < rows) & (c < V)
        x_ = tl.load(x + token * x_t + head * x_h + c, live, 0.0).to(tl.float32)
        z = tl.load(gate + token * g_t + head * g_h + c, live, 0.0).to(tl.float32)
        dy_ = tl.load(dy + token * y_t + head * y_h + c, live, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_ * x_, 1, keep_dims=True) / V + eps)
        a, da = activate(z, SILU)
        n, dn = x_ * rstd, dy_ * weight_ * a
        dx_ = rstd * (dn - n * (tl.sum(dn * n, 1, keep_dims=True) / V))
        tl.store(dx + row * V + c, dx_.to(dx.dtype.element_ty), live)
        tl.store(dgate + row * V + c, (dy_ * n * weight_ * da).to(dgate.dtype.element_ty), live)
        sums += dy_ * a * n
    tl.store(dweight + tl.program_id(0) * V + tl.arange(0, VP), tl.sum(sums, 0), tl.arange(0, VP) < V)


def _rows(x: Tensor) -> Tensor:
    """[..., H, V] -> [tokens, H, V], where the channels lie side by side."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(2) == 1 else x.contiguous()


@torch.library.custom_op("lit_gpt::gated_rms_norm", mutates_args=())
def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str) -> Tensor:
    """y of x, gate [..., H, V]; see `lit_gpt.ops.gated_norm`. Differentiable in x, weight and gate."""
    H, V = x.shape[-2:]
    VP = triton.next_power_of_2(V)
    R = max(1, ELEMENTS // VP)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate, rows = _rows(x), _rows(gate), x.numel() // V
    forward_kernel[(triton.cdiv(rows, R),)](
        x, weight, gate, y, rows, eps, *x.stride()[:2], *gate.stride()[:2],
        H=H, V=V, VP=VP, R=R, SILU=activation == "silu", num_warps=WARPS,
    )  # fmt: skip
    return y


@gated_rms_norm.register_fake
def _(x, weight, gate, eps, activation):
    return x.new_empty(x.shape)


@torch.library.custom_op("lit_gpt::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward(
    x: Tensor, weight: Tensor, gate: Tensor, dy: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate."""
    H, V = x.shape[-2:]
    VP = triton.next_power_of_2(V)
    R = max(1, ELEMENTS // VP)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    x, gate, dy, rows = _rows(x), _rows(gate), _rows(dy), x.numel() // V
    programs = triton.cdiv(rows, R * TILES)
    dweight = torch.empty(programs, V, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x, weight, gate, dy, dx, dgate, dweight, rows, eps, *x.stride()[:2], *gate.stride()[:2], *dy.stride()[:2],
        H=H, V=V, VP=VP, R=R, TILES=TILES, SILU=activation == "silu", num_warps=WARPS,
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dgate


@gated_rms_norm_backward.register_fake
def _(x, weight, gate, dy, eps, activation):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), gate.new_empty(gate.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    return *gated_rms_norm_backward(*ctx.saved_tensors, dy, ctx.eps, ctx.activation), None, None


gated_rms_norm.register_autograd(_backward, setup_context=_save)
