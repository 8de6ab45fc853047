"""Loading ahead of training in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Optional, TypeVar

import torch

PREFETCHED = 4  # micro-batches that wait ready

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], device: Optional[int] = None) -> Iterator[Item]:
    """`items`, computed ahead by a thread, at most PREFETCHED of them waiting.

    An error in the thread is raised to the caller; closing the iterator ends the thread. `device`: the GPU to pin
    memory for, which CUDA keeps per thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=PREFETCHED)
    closed = threading.Event()

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for item in items:
                ready.put(item)
                if closed.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not ready.empty():  # makes room for the one item that the thread may still be putting
            ready.get_nowait()
        thread.join()
