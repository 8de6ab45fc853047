"""Tensors in one file, in the safetensors format: nothing in it is ever executed, whoever made it.

    8 bytes    n, the length of the header, little-endian
    n bytes    JSON: {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    the rest   the elements, row-major, little-endian; offsets count from here

https://github.com/huggingface/safetensors. A file is written in one pass, hashed as it goes and synced to the disk.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from lit_gpt.errors import UserError

warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of the longest header that the format allows."""
PIECE = 1 << 24
"""Bytes hashed and written at a time."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte from the start of the file."""


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    on_bytes: Optional[Callable[[int], None]] = None,
) -> str:
    """Write tensors of the CPU to `path` and sync it; returns the file's hex SHA-256. `on_bytes` hears what is written.

    Raises:
        OSError: the disk is full or fails; what was written so far stays, for the caller to remove.
    """
    # Wider elements first, so that every tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in [struct.pack("<Q", len(text)) + text, *(_bytes(tensors[name]) for name in names)]:
            for begin in range(0, len(part), PIECE):
                piece = part[begin : begin + PIECE]
                digest.update(piece)
                file.write(piece)
                if on_bytes:
                    on_bytes(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class TensorFile:
    """A file of tensors, open for reading. Raises UserError if it is not one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
                if length > min(MAX_HEADER, size - 8):
                    raise ValueError("no header")
                header = json.loads(file.read(length))
                # a private mapping, though nobody writes: PyTorch warns of memory that it could not write to
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in self.metadata.values()):
                raise ValueError("its metadata is not text")
            self.entries = {name: _entry(value, 8 + length, size) for name, value in header.items()}
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}).") from error

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU, mapped from the file: read as it is used, never to be written to."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(self.memory, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)


def _entry(value: dict, data: int, size: int) -> Entry:
    """One line of a header, checked. `data` is where the elements begin in a file of `size` bytes."""
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    begin, end = value["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes are not whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError("sizes do not fit")
    return Entry(dtype, shape, data + begin)


def _bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor as bytes, without a copy if it is contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
