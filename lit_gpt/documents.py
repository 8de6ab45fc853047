"""Boundaries of the documents packed into a batch of tokens."""

from typing import Optional

import torch
from torch import Tensor

from lit_gpt.ops.attention import document_masks


class Documents:
    """What token mixers need to keep documents apart; built once per forward pass, without a device sync.

    Attributes:
        ids: document of each token [B, T], ascending in a row.
        positions: place of each token in its document [B, T].
        starts: where a document begins [B, T].
    """

    def __init__(self, cu_seqlens: Tensor, shape: tuple[int, int], device: torch.device):
        """cu_seqlens: offsets [N + 1] in the flattened batch of `shape`; empty documents are allowed.

        A document does not go beyond its row: every row begins one, whether cu_seqlens says so or not.
        """
        cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int64, non_blocking=True)
        token = torch.arange(shape[0] * shape[1], device=device)
        self.ids = (torch.searchsorted(cu_seqlens, token, right=True) - 1).view(shape)
        since_start = (token - cu_seqlens[self.ids.flatten()]).view(shape)
        self.positions = torch.minimum(since_start, torch.arange(shape[1], device=device))
        self.starts = self.positions == 0
        self._masks: dict[tuple[Optional[int], torch.dtype], list[Tensor]] = {}

    def attention_masks(self, window: Optional[int], dtype: torch.dtype) -> list[Tensor]:
        """For causal_attention: built by the first layer that asks, shared by the others."""
        if (window, dtype) not in self._masks:
            self._masks[window, dtype] = document_masks(self.ids, window, dtype)
        return self._masks[window, dtype]
