"""From [B, T, H, D] to chunks of C tokens and back.

Sequences of any lengths are cut into chunks of their own (the last one padded with zeros: k = 0, g = 0 leave the state
as it is), and the chunks are ordered by their place in the sequence, longest sequence first. So every step of the scan
over chunks is one contiguous slice, and the sequences still running at that step are the first rows of the state:

    sequences of 3, 2 and 1 chunks:   a0 b0 c0 | a1 b1 | a2        steps: 3, 2, 1 sequences
"""

from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F


class ChunkLayout:
    """Where each token of a batch sits when cut into chunks.

    Equal lengths (`offsets` None): B sequences of T tokens. Ragged: B = 1, and `offsets` (N + 1 integers from 0 to T)
    bound N sequences.
    """

    def __init__(self, shape: tuple[int, int], chunk: int, offsets: list[int] | None, device: torch.device):
        self.B, self.T = shape
        self.chunk, self.offsets, self.device = chunk, offsets, device
        lengths = [self.T] * self.B if offsets is None else [end - start for start, end in pairwise(offsets)]
        chunks = [-(-length // chunk) for length in lengths]
        self.sequences = len(lengths)
        self.order = sorted(range(self.sequences), key=lambda n: -chunks[n])
        self.chunks = chunks
        self.step_sizes = [sum(c > step for c in chunks) for step in range(max(chunks, default=0))]

    def steps(self, heads: int) -> list[slice]:
        """The rows of the chunks [M, ...] (M = chunks x heads) that each step of the scan covers."""
        ends = [0]
        for size in self.step_sizes:
            ends.append(ends[-1] + size * heads)
        return [slice(start, end) for start, end in pairwise(ends)]

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ragged: the token in each slot of the chunks (T where it is padding), and the slot of each token."""
        starts = torch.tensor([self.offsets[n] for n in self.order])
        ends = torch.tensor([self.offsets[n + 1] for n in self.order])
        step = torch.repeat_interleave(
            torch.arange(len(self.step_sizes)), torch.tensor(self.step_sizes, dtype=torch.long)
        )
        row = torch.cat([torch.arange(size) for size in self.step_sizes]) if self.step_sizes else step
        token = (starts[row] + step * self.chunk)[:, None] + torch.arange(self.chunk)
        padding = token >= ends[row][:, None]
        slot = torch.empty(self.T, dtype=torch.long)
        slot[token[~padding]] = torch.arange(token.numel()).view_as(token)[~padding]
        return token.masked_fill(padding, self.T).flatten().to(self.device), slot.to(self.device)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> [steps, sequences, H, C, D], a view unless it pads; ragged: [chunks, 1, H, C, D]."""
        H, D = x.shape[2:]
        if self.offsets is None:
            if missing := len(self.step_sizes) * self.chunk - self.T:
                x = F.pad(x, (0, 0, 0, 0, 0, missing))
            return x.unflatten(1, (len(self.step_sizes), self.chunk)).permute(1, 0, 3, 2, 4)
        x = F.pad(x[0], (0, 0, 0, 0, 0, 1)).index_select(0, self._slots[0])
        return x.view(-1, 1, self.chunk, H, D).transpose(2, 3)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`: [steps, sequences, H, C, D] -> [B, T, H, D]."""
        if self.offsets is None:
            return x.permute(1, 0, 3, 2, 4).reshape(self.B, -1, x.shape[2], x.shape[4])[:, : self.T]
        return x.transpose(2, 3).flatten(0, 2).index_select(0, self._slots[1])[None]

    def to_scan_order(self, state: torch.Tensor) -> torch.Tensor:
        """A copy of the states [N, ...] in the order of the scan, longest sequence first."""
        return state[self.order].contiguous()

    def from_scan_order(self, state: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_scan_order`."""
        return state[sorted(range(self.sequences), key=self.order.__getitem__)]
