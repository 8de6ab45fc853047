"""Causal depthwise convolution with SiLU, over a few taps."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor, weight: Tensor, positions: Optional[Tensor] = None, history: Optional[Tensor] = None
) -> Tensor:
    """y_t = SiLU(sum_j weight[:, W-1-j] * x_{t-j}), taps before the first token being zero.

    Args:
        x: inputs [B, T, C].
        weight: taps [C, W], the last one for the current token.
        positions: place of each token in its document [B, T]; taps that reach into the document before are dropped.
        history: the W-1 inputs that came before x, [B, W-1, C]; zeros if absent.
    """
    taps, length = weight.shape[1], x.shape[1]
    if history is None:
        history = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    padded = torch.cat([history.to(x.dtype), x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, taps - 1]
    for j in range(1, taps):
        tap = padded[:, taps - 1 - j : taps - 1 - j + length]
        if positions is not None:
            tap = tap * (positions >= j)[..., None]
        y = torch.addcmul(y, tap, weight[:, taps - 1 - j])
    return F.silu(y)
