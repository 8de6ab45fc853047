"""The short convolution against the sum that defines it."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.ops.short_conv import short_conv


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
    found, expected = short_conv(x, weight), reference(x, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
    )


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(5, 15), (1, 1, 1, 17), (2, 18), (3, 3, 14)])
def test_history_continues(sizes, taps):
    x, weight = inputs(20, taps)
    history, pieces = x.new_zeros(2, taps - 1, 6), []
    for piece in x.split(sizes, dim=1):
        pieces.append(short_conv(piece, weight, history=history))
        history = torch.cat([history, piece], dim=1)[:, piece.shape[1] :]
    torch.testing.assert_close(torch.cat(pieces, dim=1), reference(x, weight))


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(20,), (1, 2, 3, 14), (10, 10), (1, 1, 18)])
def test_documents_stay_apart(lengths, taps):
    x, weight = inputs(20, taps, B=1)
    positions = torch.cat([torch.arange(n) for n in lengths])
    alone = torch.cat([reference(document, weight) for document in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(short_conv(x, weight, positions), alone)


def test_output_keeps_the_dtype_of_its_input():
    x, weight = inputs(5, 4)
    history = torch.zeros(2, 3, 6)
    assert short_conv(x.bfloat16(), weight.float(), history=history).dtype == torch.bfloat16
