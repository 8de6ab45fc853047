"""The short convolution against the sum that defines it, and its kernels against the plain code in float64."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.ops.short_conv import short_conv
from tests.ops.triton_kernels import (
    AGAIN,
    DEVICE,
    GPU,
    INTERPRETED,
    compile_for,
    relative_error,
    run_interpreted,
    runs_kernels,
)

BF16 = 4e-3 if GPU else 8e-3
"""Error of one rounding to bf16, and some; the interpreter truncates instead."""


def reference(x, weight):
    """SiLU of torch's depthwise convolution over inputs padded in front."""
    taps = weight.shape[1]
    return F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], groups=weight.shape[0])).mT


def inputs(T: int, taps: int, B: int = 2, C: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(T)
    x, weight = torch.randn(B, T, C, dtype=torch.float64), torch.randn(C, taps, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_equals_torch(T, taps):
    x, weight = inputs(T, taps)
    pieces, expected = short_conv(x, weight, (1, 3, 2)), reference(x, weight)
    assert [piece.shape[-1] for piece in pieces] == [1, 3, 2]
    found = torch.cat(pieces, dim=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
    )


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(5, 15), (1, 1, 1, 17), (2, 18), (3, 3, 14)])
def test_history_continues(sizes, taps):
    x, weight = inputs(20, taps)
    history = x.new_zeros(2, taps - 1, 6)
    with torch.no_grad():
        pieces = [short_conv(piece, weight, (6,), history=history)[0] for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), reference(x, weight))
    assert torch.equal(history, x[:, 20 - (taps - 1) :])


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(20,), (1, 2, 3, 14), (10, 10), (1, 1, 18)])
def test_documents_stay_apart(lengths, taps):
    x, weight = inputs(20, taps, B=1)
    positions = torch.cat([torch.arange(n) for n in lengths])
    alone = torch.cat([reference(document, weight) for document in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(short_conv(x, weight, (6,), positions)[0], alone)


def test_output_keeps_the_dtype_of_its_input():
    x, weight = inputs(5, 4)
    history = torch.zeros(2, 3, 6)
    assert short_conv(x.bfloat16(), weight.float(), (6,), history=history)[0].dtype == torch.bfloat16


@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="the kernels need Triton")
    run_interpreted(__file__)


def projection(B: int, T: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(B, T, width, generator=torch.Generator().manual_seed(T))
    return x.to(DEVICE, dtype).requires_grad_()


def taps_of(C: int, W: int) -> torch.Tensor:
    return torch.randn(C, W, generator=torch.Generator().manual_seed(W)).to(DEVICE).requires_grad_()


@runs_kernels
@pytest.mark.parametrize(
    "W, T, lengths, dtype",
    [
        (4, 70, (1, 2, 62, 5), torch.float32),
        (4, 9, (3, 6), torch.bfloat16),
        (4, 3, None, torch.bfloat16),
        (3, 66, None, torch.float32),
        (2, 4, (2, 2), torch.float32),
        (1, 5, (2, 3), torch.float32),
    ],
)
def test_kernels_equal_the_plain_code(W, T, lengths, dtype):
    """Pieces of a slice of a wider projection and all gradients, within one rounding of the output."""
    from lit_gpt.ops.short_conv import kernels

    B, sizes = (1 if T > 64 else 2), [20, 20, 150]
    x, weight = projection(B, T, 300, dtype), taps_of(190, W)
    positions = lengths and torch.cat([torch.arange(n) for n in lengths]).expand(B, T).to(DEVICE)
    found = kernels.short_conv(x[..., 10:200], weight, positions, sizes)
    assert all(y.is_contiguous() and y.dtype == dtype for y in found)
    grads = [torch.randn_like(y) for y in found]
    found = [*found, *torch.autograd.grad(found, (x, weight), grads)]

    x64, weight64 = (z.detach().double().cpu().requires_grad_() for z in (x, weight))
    expected = short_conv(x64[..., 10:200], weight64, sizes, positions if positions is None else positions.cpu())
    gradients = torch.autograd.grad(expected, (x64, weight64), [grad.double().cpu() for grad in grads])
    for y, z in zip(found, [*expected, *gradients]):
        assert relative_error(y.cpu(), z.detach()) < (1e-6 if y.dtype == torch.float32 else BF16)


@runs_kernels
@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("sizes", [(1,) * 6, (2, 3, 1), (65, 3)])
@torch.no_grad()
def test_kernel_history_continues(sizes, W):
    """Token by token and in pieces longer than a program's; what follows the history is written in place."""
    from lit_gpt.ops.short_conv import kernels

    T = sum(sizes)
    x, weight, history = projection(2, T, 40, torch.float32), taps_of(40, W), torch.zeros(2, W - 1, 40, device=DEVICE)
    pieces = [kernels.short_conv_after(piece, weight, history, None) for piece in x.split(sizes, dim=1)]
    expected = short_conv(x.double().cpu(), weight.double().cpu(), [40])[0]
    assert relative_error(torch.cat(pieces, dim=1).cpu(), expected) < 1e-6
    before = torch.cat([torch.zeros(2, W - 1, 40), x.cpu()], dim=1)
    assert torch.equal(history.cpu(), before[:, before.shape[1] - (W - 1) :])


@runs_kernels
def test_kernels_are_registered_operators():
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch, by torch's own check; with one piece's
    gradient absent too."""
    from lit_gpt.ops.short_conv import kernels

    x, weight = projection(1, 6, 30, torch.float32), taps_of(30, 4)
    positions = torch.arange(6, device=DEVICE)[None]
    torch.library.opcheck(kernels.short_conv, (x, weight, positions, [10, 10, 10]))
    with torch.no_grad():
        history = torch.zeros(1, 3, 30, device=DEVICE)
        torch.library.opcheck(kernels.short_conv_after, (x.detach(), weight.detach(), history, None))
    first, *_ = kernels.short_conv(x, weight, None, [10, 10, 10])
    expected = short_conv(x.double().cpu(), weight.double().cpu(), [10, 10, 10])[0]
    found = torch.autograd.grad(first.square().sum(), (x, weight))
    for y, z in zip(found, torch.autograd.grad(expected.square().sum(), (x, weight))):
        assert relative_error(y.cpu(), z.cpu()) < 1e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile(arch):
    """In 16-byte or 8-byte accesses, bf16, documents and history."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    from lit_gpt.ops.short_conv import kernels as K

    bf16 = dict.fromkeys(("x", "history", "y0", "y1", "y2", "last", "dy0", "dy1", "dy2", "dx"), "*bf16")
    types = {**bf16, "weight": "*fp32", "dweight": "*fp32", "positions": "*i64"}
    constants = {"C0": 256, "C1": 256, "C2": 512, "W": 4, "BC": K.BC, "HAS_POSITIONS": True}
    forward = {**constants, "BT": K.FORWARD_BT, "STAGES": K.FORWARD_STAGES, "HAS_HISTORY": True}
    backward = {**constants, "BT": K.BACKWARD_BT, "STAGES": K.BACKWARD_STAGES}
    for kernel, named in ((K.forward_kernel, forward), (K.backward_kernel, backward)):
        assert compile_for(kernel, arch, types, named, K.WARPS).count("st.global.v") >= 4


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_at_full_size_twice():
    """bf16 at 2 x 4096 x 6144 in documents: against float64 in slices, two runs bit-equal, no wait for the host."""
    sizes, B, T = [2048, 2048, 2048], 2, 4096
    x, weight = projection(B, T, 6144 + 128, torch.bfloat16), taps_of(6144, 4)
    positions = torch.arange(T, device=DEVICE).remainder(1000).expand(B, T)
    grads = [torch.randn(B, T, size, device=DEVICE, dtype=torch.bfloat16) for size in sizes]

    def run():
        y = short_conv(x[..., :6144], weight, sizes, positions)
        return y, *torch.autograd.grad(y, (x, weight), grads)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (y, dx, dweight), (y_again, dx_again, dweight_again) = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat([*y], -1), torch.cat([*y_again], -1))
    assert torch.equal(dx, dx_again) and torch.equal(dweight, dweight_again)
    x64, weight64 = x.detach()[..., :6144:97].double().requires_grad_(), weight.detach()[::97].double().requires_grad_()
    expected = short_conv(x64, weight64, [x64.shape[-1]], positions)[0]
    gradients = torch.autograd.grad(expected, (x64, weight64), torch.cat(grads, dim=-1)[..., ::97].double())
    assert relative_error(torch.cat(y, dim=-1)[..., ::97], expected.detach()) < 4e-3
    assert relative_error(dx[..., :6144:97], gradients[0]) < 4e-3
    assert relative_error(dweight[::97], gradients[1]) < 1e-5
