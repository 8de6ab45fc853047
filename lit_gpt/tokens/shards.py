"""Shards: files of packed token ids in the LITPKDS format, version 1, which TinyLlama and its descendants use.

    offset  size  field
    0       7     b"LITPKDS"
    7       8     version = 1, uint64 little-endian
    15      1     dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f32, 7 f64, 8 u16
    16      8     number of tokens n, uint64 little-endian
    24      n*s   token ids, s bytes each, little-endian

Beside a shard lies its index `.idx`: the END of every document, counted in tokens, uint64 little-endian.
Files are read with `pread`, which, unlike mapping, does not grow the process and is fast on network file systems. An
index is never loaded either: ends are nearly proportional to their number, so a guess finds the right page of it.
"""

import contextlib
import hashlib
import os
import struct
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.files import sync_folder, temporary_name, write_atomically
from lit_gpt.tokens.storage import AnyPath, LocalFile, RemoteFile, open_file

MAGIC = b"LITPKDS"
VERSION = 1
HEADER = struct.Struct("<7sQBQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
INDEX_PAGE = 512  # entries of an index that are read at once


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest type in customary use that holds every id: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Shard:
    """One checked shard: `num_tokens` ids of `dtype`. Its header promises exactly the bytes that the file has.

    `num_documents`: entries of its index, None without one.
    """

    path: AnyPath
    dtype: np.dtype
    num_tokens: int
    num_documents: Optional[int] = None

    @cached_property
    def index_path(self) -> AnyPath:
        return self.path.with_suffix(".idx")

    @classmethod
    def open(cls, path: AnyPath) -> "Shard":
        """Read and check the header of `path`.

        Raises:
            UserError: missing file, foreign or damaged header, or a size other than the header's; names the file.
        """
        try:
            header, size = open_file(path).pread(HEADER.size, 0), path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing. Restore it, or prepare the data again.") from None
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror or error}. Restore it.") from error
        if len(header) < HEADER.size:
            raise UserError(f"shard {path} is truncated: {size} bytes, less than a header. Restore it.")
        magic, version, code, num_tokens = HEADER.unpack(header)
        if magic != MAGIC:
            raise UserError(f"{path} is no token shard: it begins with {magic!r}, not {MAGIC!r}. Restore or remove it.")
        if version != VERSION:
            raise UserError(f"shard {path} has format version {version}; only version {VERSION} is known. Restore it.")
        if code not in DTYPES:
            raise UserError(f"shard {path} has dtype code {code}, which is no integer type of the format. Restore it.")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        expected = HEADER.size + num_tokens * dtype.itemsize
        if size != expected:
            how = "is truncated" if size < expected else "has bytes too many"
            raise UserError(f"shard {path} {how}: {size} bytes, its header promises {expected}. Restore it.")
        return cls(path, dtype, num_tokens)

    def read(self, file: "LocalFile | RemoteFile", start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as an array [count] of `dtype`, through an open file."""
        return _read_array(self.path, file, HEADER.size, self.dtype, start, count)

    def document_ends(self, index: "LocalFile | RemoteFile", start: int, stop: int) -> np.ndarray:
        """Ends e of documents with start < e < stop, ascending: int64, read from the open index.

        The first of them is looked for by interpolation between known ends, and by halving where ends are far from
        proportional, one page of the index at a time.

        Raises:
            UserError: the index is damaged: shorter than it was, or not ascending.
        """
        low, low_end, high, high_end = 0, 0, self.num_documents, self.num_tokens  # ends[low:high] holds the first
        found, tries = [], 0
        while low < high:
            share = (start - low_end) / max(high_end - low_end, 1) if tries < 4 else 0.5
            guess = low + int((high - low) * min(max(share, 0.0), 1.0)) - INDEX_PAGE // 2
            first = max(low, min(guess, high - INDEX_PAGE))
            page = self._index_page(index, first)
            if page[0] > start and first > low:
                high, high_end = first, int(page[0])
            elif page[-1] <= start:
                low, low_end = first + len(page), int(page[-1])
            else:
                low = high = first
            tries += 1
        first = low
        while first < self.num_documents:
            page = self._index_page(index, first)
            found.append(page[np.searchsorted(page, start, "right") : np.searchsorted(page, stop, "left")])
            if page[-1] >= stop:
                break
            first += len(page)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _index_page(self, index: "LocalFile | RemoteFile", first: int) -> np.ndarray:
        count = min(INDEX_PAGE, self.num_documents - first)
        page = _read_array(self.index_path, index, 0, np.dtype("<u8"), first, count).astype(np.int64)
        if (page[1:] < page[:-1]).any() or page[0] < 0:
            raise UserError(f"index {self.index_path} does not ascend, so it is damaged. Restore it.")
        return page


def _read_array(
    path: AnyPath, file: "LocalFile | RemoteFile", skip: int, dtype: np.dtype, start: int, count: int
) -> np.ndarray:
    """Elements [start, start + count) of what follows the first `skip` bytes of a file."""
    wanted, offset = count * dtype.itemsize, skip + start * dtype.itemsize
    parts = []
    while wanted > 0:
        try:
            part = file.pread(wanted, offset)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}. Restore it and resume.") from error
        if not part:
            raise UserError(f"{path} became shorter while in use. Restore it and resume.")
        parts.append(part)
        wanted -= len(part)
        offset += len(part)
    return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=dtype)


class ShardWriter:
    """Writes a shard and its index document by document; neither exists under its name until `close`.

    After `close`: `num_tokens`, `num_documents`, `sha256` (of the tokens, without the header) and `idx_sha256`.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = 0
        self._ends = array("Q")
        self._digest = hashlib.sha256()
        self._temporary = temporary_name(path)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by close or abandon)
        self._file.write(bytes(HEADER.size))

    @property
    def num_documents(self) -> int:
        return len(self._ends)

    def append(self, ids: "list[int] | np.ndarray") -> None:
        """Add one document."""
        payload = np.asarray(ids, dtype=self.dtype).tobytes()
        self._file.write(payload)
        self._digest.update(payload)
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)

    def close(self) -> None:
        """Finish the header, then give both files their names: the index first, so that no shard is without one."""
        self.sha256 = self._digest.hexdigest()
        index = np.asarray(self._ends, dtype="<u8").tobytes()
        self.idx_sha256 = hashlib.sha256(index).hexdigest()
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.num_tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        write_atomically(self.path.with_suffix(".idx"), index)
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Drop what was written. Does nothing after `close`."""
        with contextlib.suppress(OSError):  # a full disk fails again on what is still buffered
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_shard(path: Path, documents: "list[np.ndarray]", dtype: np.dtype) -> None:
    """Write `documents` as the shard `path` and its index, atomically."""
    writer = ShardWriter(path, dtype)
    try:
        for document in documents:
            writer.append(document)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
