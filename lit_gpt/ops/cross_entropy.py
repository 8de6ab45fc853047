"""Cross entropy of a linear output head without keeping its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_KEPT = 2**26
"""Logits above this count are computed in pieces, and again in the backward pass."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x weight^T)[target], in fp32, for each token.

    Args:
        x: hidden states [..., D].
        weight: output head [V, D].
        targets: token ids [...], as int64.
    """
    shape, x, targets = targets.shape, x.flatten(0, -2), targets.flatten()
    rows = max(1, LOGITS_KEPT // weight.shape[0])
    if x.shape[0] <= rows:
        return _losses(x, weight, targets).view(shape)
    pieces = zip(x.split(rows), targets.split(rows))
    losses = [checkpoint(_losses, piece, weight, target, use_reentrant=False) for piece, target in pieces]
    return torch.cat(losses).view(shape)


def _losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
