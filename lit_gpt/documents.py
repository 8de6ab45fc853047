"""Boundaries of the documents packed into one row of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """What a token mixer needs to keep documents apart; built once per forward pass, without a device sync."""

    cu_seqlens: Tensor
    """Document offsets [N + 1], from 0 to the number of tokens; empty documents are allowed."""
    ids: Tensor
    """Document of each token [T]."""
    positions: Tensor
    """Place of each token in its document [T]."""

    @classmethod
    def from_offsets(cls, cu_seqlens: Tensor, num_tokens: int) -> "Documents":
        token = torch.arange(num_tokens, device=cu_seqlens.device)
        ids = torch.searchsorted(cu_seqlens.to(token.dtype), token, right=True) - 1
        return cls(cu_seqlens, ids, token - cu_seqlens[ids])
