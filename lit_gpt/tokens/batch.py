"""What every source of training data yields: one micro-batch of tokens, with its document boundaries."""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """`tokens` int64 [micro_batch, L+1]: the inputs are [:, :-1], the targets [:, 1:].

    `cu_seqlens` int32 of a fixed size, or None (one segment per row): the starts of the segments of the flattened inputs
    [micro_batch * L], ascending from 0 to micro_batch * L; every row starts a segment; the tail repeats the end.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
