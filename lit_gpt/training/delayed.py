"""Small results brought from the device to the host without making either wait."""

from collections import deque
from typing import Optional

import torch
from torch import Tensor


class DelayedRead:
    """A queue of small tensors on their way to the host.

    The host reads what was posted a step ago while the device is busy with the present one, so that it waits at most
    for work that is done already.
    """

    def __init__(self) -> None:
        self._posted: deque[tuple[Tensor, Optional[torch.cuda.Event]]] = deque()

    def __len__(self) -> int:
        return len(self._posted)

    def post(self, values: Tensor) -> None:
        """Start copying `values` [n], which nobody may change any more, to pinned memory."""
        copy, event = values.to("cpu", non_blocking=True), None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._posted.append((copy, event))

    def take(self) -> list[float]:
        """The oldest that was posted, once its copy is there."""
        copy, event = self._posted.popleft()
        if event is not None:
            event.synchronize()
        return copy.tolist()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` [n] over all ranks, the same bits on each, in place; queued on the device, not waited for.

    Fabric's all_reduce has a barrier before it, for which the host waits.
    """
    if torch.distributed.is_initialized():
        values /= torch.distributed.get_world_size()
        torch.distributed.all_reduce(values)
    return values
