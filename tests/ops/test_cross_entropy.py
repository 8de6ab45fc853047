"""Cross entropy in pieces equals cross entropy, and holds no logits."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.ops import cross_entropy
from lit_gpt.ops.cross_entropy import linear_cross_entropy

V, D = 37, 8


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*shape, D, dtype=dtype, requires_grad=True)
    return x, torch.randn(V, D, dtype=dtype, requires_grad=True), torch.randint(V, shape)


@pytest.mark.parametrize("kept", [1, V, 5 * V, 24 * V - 1, 24 * V])
@pytest.mark.parametrize("shape", [(24,), (2, 12), (2, 3, 4)])
def test_equals_torch_whole_or_in_pieces(monkeypatch, shape, kept):
    monkeypatch.setattr(cross_entropy, "LOGITS_KEPT", kept)
    x, weight, targets = inputs(*shape)
    found = linear_cross_entropy(x, weight, targets)
    expected = F.cross_entropy((x @ weight.mT).flatten(0, -2), targets.flatten(), reduction="none").view(shape)
    torch.testing.assert_close(found, expected)
    scale = torch.rand(shape, dtype=torch.float64)  # each token's loss has a gradient of its own
    torch.testing.assert_close(
        torch.autograd.grad((found * scale).sum(), (x, weight)),
        torch.autograd.grad((expected * scale).sum(), (x, weight)),
    )


def test_losses_of_16_bit_inputs_are_in_32(monkeypatch):
    x, weight, targets = inputs(6, dtype=torch.bfloat16)
    losses = linear_cross_entropy(x, weight, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy((x @ weight.mT).float(), targets, reduction="none"))


def test_pieces_keep_few_logits_for_the_backward(monkeypatch):
    def largest_saved(kept: int) -> int:
        monkeypatch.setattr(cross_entropy, "LOGITS_KEPT", kept)
        x, weight, targets = inputs(400)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            linear_cross_entropy(x, weight, targets)
        return max(sizes)

    assert largest_saved(400 * V) >= 400 * V  # whole, they are all there
    assert largest_saved(10 * V) <= 400 * D


def test_extreme_logits():
    x = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.float32)
    losses = linear_cross_entropy(x, torch.eye(2), torch.tensor([0, 0]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 1e4]))
