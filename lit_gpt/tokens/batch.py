"""What every source of training data yields: one micro-batch of tokens, with its document boundaries."""

from typing import NamedTuple, Optional

import numpy as np
import torch

from lit_gpt.errors import UserError


class Batch(NamedTuple):
    """`tokens` int64 [micro_batch, L+1]: the inputs are [:, :-1], the targets [:, 1:].

    `cu_seqlens` int32 of a fixed size, or None (one segment per row): the starts of the segments of the flattened
    inputs [micro_batch * L], ascending from 0 to micro_batch * L; every row starts a segment; the tail repeats the end.
    """

    tokens: torch.Tensor
    cu_seqlens: Optional[torch.Tensor] = None

    def pin_memory(self) -> "Batch":
        return Batch(self.tokens.pin_memory(), None if self.cu_seqlens is None else self.cu_seqlens.pin_memory())


def check_split(global_batch: int, micro_batch: int, world_size: int) -> None:
    """Raise UserError unless a global batch is a whole number of micro-batches on every rank."""
    if global_batch < 1 or global_batch % (world_size * micro_batch):
        raise UserError(
            f"global batch of {global_batch} sequences does not split into {world_size} ranks x micro-batch "
            f"{micro_batch}. Use a micro-batch that divides {global_batch / world_size:g}."
        )


def segment_offsets(starts: list[np.ndarray], length: int) -> torch.Tensor:
    """`cu_seqlens` of rows of `length` inputs: int32.

    Its size depends on the number of rows and their length alone: room for 8 documents in every row and one more in
    every 128 tokens of it. Where a micro-batch holds more, the room doubles until they fit: no boundary is left out.

    Args:
        starts: for each row, where documents start inside it, ascending, each in 1 ... length - 1.
    """
    rows = len(starts)
    bounds = [part for row, inside in enumerate(starts) for part in ([row * length], inside + row * length)]
    flat = np.concatenate(bounds)
    size = rows * (8 + length // 128)
    while size < len(flat):
        size *= 2
    offsets = np.full(size + 1, rows * length, dtype=np.int32)
    offsets[: len(flat)] = flat
    return torch.from_numpy(offsets)
