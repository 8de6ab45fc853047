"""Causal depthwise convolution with SiLU, over a few taps.

    y_t = SiLU(sum_j weight[:, W-1-j] * x_{t-j})

CUDA tensors run one Triton kernel each way (kernels.py), other tensors the plain code here.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.ops.dispatch import runs_fused

FUSED_TAPS = 4
"""The kernels keep this many inputs of a channel in registers; more taps run the plain code."""
FUSED_PIECES = 3
"""The kernels write this many outputs: q, k and v; more run the plain code."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    positions: Optional[Tensor] = None,
    history: Optional[Tensor] = None,
) -> list[Tensor]:
    """y [B, T, C], as pieces of so many channels, each contiguous on CUDA (but after a history).

    Args:
        x: inputs [B, T, C], of any strides: a slice of a wider projection is read where it is.
        weight: taps [C, W], the last one for the current token.
        sizes: channels of each piece, C in all.
        positions: place of each token in its document [B, T]; taps that reach into the document before are dropped.
        history: the W-1 inputs that came before x, [B, W-1, C]; zeros if absent. Made into those that come before the
            token after x, in place.
    """
    fused = runs_fused(x, weight) and weight.shape[1] <= FUSED_TAPS and len(sizes) <= FUSED_PIECES
    if not fused or (history is not None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return list(_plain(x, weight, positions, history).split(list(sizes), dim=-1))

    from lit_gpt.ops.short_conv import kernels  # imports Triton, which CPU builds of PyTorch lack

    if history is None:
        return kernels.short_conv(x, weight, positions, list(sizes))
    return list(kernels.short_conv_after(x, weight, history, positions).split(list(sizes), dim=-1))


def _plain(x: Tensor, weight: Tensor, positions: Optional[Tensor], history: Optional[Tensor]) -> Tensor:
    taps, length = weight.shape[1], x.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if history is None else history.to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, taps - 1]
    for j in range(1, taps):
        tap = padded[:, taps - 1 - j : taps - 1 - j + length]
        if positions is not None:
            tap = tap * (positions >= j)[..., None]
        y = torch.addcmul(y, tap, weight[:, taps - 1 - j])
    if history is not None:
        history.copy_(padded[:, length:])
    return F.silu(y)
