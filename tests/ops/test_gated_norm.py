"""RMS norm times a gate against its formula, and its kernels against the formula in float64."""

import pytest
import torch

from lit_gpt.ops.gated_norm import gated_rms_norm
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


@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="the kernels need Triton")
    run_interpreted(__file__)


def formula(x, weight, gate, eps, activation):
    z = gate.reshape(x.shape)
    a = 1 / (1 + torch.exp(-z))
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * (z * a if activation == "silu" else a)


def draw(dtype, T=37, H=3, V=20, extra=50):
    rng = torch.Generator().manual_seed(V)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(DEVICE)
    x, projection = normal(2, T, H, V).to(dtype), normal(2, T, H * V + extra).to(dtype)
    return [t.requires_grad_() for t in (x, normal(V), projection)]


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_plain_code_is_the_formula(activation):
    x, weight, projection = (t.detach().double().cpu() for t in draw(torch.float64))
    found = gated_rms_norm(x, weight, projection[..., 7:67], 1e-2, activation)
    torch.testing.assert_close(found, formula(x, weight, projection[..., 7:67], 1e-2, activation))
    assert gated_rms_norm(x.bfloat16(), weight.float(), projection[..., 7:67].float(), 1e-2, activation).dtype == (
        torch.bfloat16
    )


@runs_kernels
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, H, V", [(37, 3, 20), (1, 1, 128), (150, 2, 64)])
def test_kernels_equal_the_formula(T, H, V, dtype, activation):
    """The output and all gradients, the gate being a slice of a wider projection, within one rounding of the output."""
    from lit_gpt.ops.gated_norm import kernels

    x, weight, projection = draw(dtype, T, H, V)
    gate = projection[..., 7 : 7 + H * V].unflatten(-1, (H, V))
    y = kernels.gated_rms_norm(x, weight, gate, 1e-2, activation)
    dy = torch.randn_like(y).transpose(0, 1).contiguous().transpose(0, 1)  # no order that a kernel could count on
    found = [y, *torch.autograd.grad(y, (x, weight, projection), dy)]
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, projection)]
    expected = formula(leaves[0], leaves[1], leaves[2][..., 7 : 7 + H * V], 1e-2, activation)
    gradients = torch.autograd.grad(expected, leaves, dy.double())
    for a, b in zip(found, [expected.detach(), *gradients]):
        assert relative_error(a, b) < (1e-6 if a.dtype == torch.float32 else 4e-3 if GPU else 8e-3)


@runs_kernels
def test_kernels_are_registered_operators():
    from lit_gpt.ops.gated_norm import kernels

    x, weight, projection = draw(torch.float32, 5)
    gate = projection[..., 7:67].unflatten(-1, (3, 20))
    torch.library.opcheck(kernels.gated_rms_norm, (x, weight, gate, 1e-5, "silu"))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile(arch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    from lit_gpt.ops.gated_norm.kernels import TILES, WARPS, backward_kernel, forward_kernel

    types = {**dict.fromkeys(("x", "gate", "y", "dy", "dx", "dgate"), "*bf16"), "weight": "*fp32", "dweight": "*fp32"}
    constants = {"H": 16, "V": 128, "VP": 128, "R": 16, "TILES": TILES, "SILU": True}
    for kernel in (forward_kernel, backward_kernel):
        named = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert "st.global.v4" in compile_for(kernel, arch, types | {"eps": "fp32"}, named, WARPS)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_at_full_size_twice():
    """bf16 at 4 x 4096 x 16 x 128: against float64, two runs bit-equal, no wait for the host."""
    normal = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
    x, gate, dy = normal(4, 4096, 16, 128), normal(4, 4096, 2048), normal(4, 4096, 16, 128)
    weight = torch.randn(128, device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, weight, gate)]
    run = lambda: (y := gated_rms_norm(*leaves, 1e-5, "silu"), *torch.autograd.grad(y, leaves, dy))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, again = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = formula(*wide, 1e-5, "silu")
    for a, b in zip(found, [expected.detach(), *torch.autograd.grad(expected, wide, dy.double())]):
        assert relative_error(a, b) < (1e-5 if a.dtype == torch.float32 else 4e-3)
