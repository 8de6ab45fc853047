"""Raw text as it lies on disk, cut into units that can be read in any order, each from any record on.

    .parquet       a unit is a row group, a record a row
    .jsonl         a unit is the lines that begin in one MiB of the file, a record a line
    .jsonl.zst     a unit is the file (Zstandard has no random access), a record a line
    other endings  a unit is the file, which is one record: a text

Hundreds of units are read side by side, so a reader at rest holds little: no open file, no decoder pages, some 64 rows
of a row group or 32 KiB of a compressed file.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

import pyarrow
import pyarrow.parquet
import zstandard

from lit_gpt.errors import UserError
from lit_gpt.tokens.manifest import fingerprint_of
from lit_gpt.tokens.sources import RECORD_SUFFIXES, decoded, open_parquet, scalar_text, text_of

EXTENSIONS = (".py", ".txt", ".rst", ".md", *RECORD_SUFFIXES)
RANGE_BYTES = 1 << 20  # of a .jsonl file that make a unit
PART_BYTES = 1 << 15  # read from a .jsonl or .jsonl.zst file at a time
MIN_ROWS, SLICES = 64, 16  # a row group is read in at most 16 slices, of at least 64 rows
FOOTERS = 32  # of parquet files kept in memory; one of a gigabyte takes some MB
SAMPLED_BYTES = 4096  # at each end of a file, to know it again


class Unit(NamedTuple):
    """A range of the source: row group or MiB number `part` of `file`, and the bytes of the source it covers."""

    file: str
    part: int
    bytes: int


class Record(NamedTuple):
    """Record `number` of a unit. Text is None where it is not UTF-8; `bytes` of the source were read to get at it."""

    number: int
    text: Optional[str]
    bytes: int


@dataclass
class RawSource:
    """The readable files of a folder. Make it with `RawSource.open(folder, text_column)`.

    Attributes:
        folder: where the files are.
        files: what identifies each file: its size, its row groups, a hash of its first and last 4 KiB.
        units: all units, in order of file name and place.
    """

    folder: Path
    text_column: str
    files: dict[str, str]
    units: list[Unit]

    @classmethod
    def open(
        cls, folder: "str | os.PathLike[str]", text_column: str = "text", extensions: tuple[str, ...] = EXTENSIONS
    ) -> "RawSource":
        """List a folder, or a single file, reading the footer of every parquet file and both ends of every file.

        Raises:
            UserError: nothing to read there; a file that cannot be read; a parquet file without `text_column`.
        """
        folder = Path(folder)
        if folder.is_file() and folder.name.endswith(extensions):
            folder, names = folder.parent, [folder.name]
        elif folder.is_dir():
            found = (path for path in folder.rglob("*") if path.name.endswith(extensions) and path.is_file())
            names = sorted(path.relative_to(folder).as_posix() for path in found)
        else:
            raise UserError(f"{folder} is neither a folder nor a file that ends in {', '.join(extensions)}.")
        with ThreadPoolExecutor(8) as readers:  # the time goes into waiting for the disk
            seen = list(readers.map(lambda name: _inspect(folder, name, text_column), names))
        units = [unit for _, parts in seen for unit in parts]
        if not sum(unit.bytes for unit in units):
            raise UserError(f"{folder} holds no text in files that end in {', '.join(extensions)}.")
        return cls(folder, text_column, {name: identity for name, (identity, _) in zip(names, seen)}, units)

    def __post_init__(self):
        self._footer = lru_cache(maxsize=FOOTERS)(pyarrow.parquet.read_metadata)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    @property
    def fingerprint(self) -> str:
        """Identifies the files and how they are cut into units."""
        return fingerprint_of([self.text_column, self.files, len(self.units), RANGE_BYTES])

    def records(self, unit: Unit, first: int = 0, slices: int = SLICES) -> Iterator[Record]:
        """The records of `unit` from number `first` on, in order; those before it are skipped, not parsed.

        `slices`: how many times a row group may be decoded to hold less of it at a time; 1 holds the whole.

        Raises:
            UserError: a file that is damaged, or not of the size it had at first; a line without text.
        """
        path = self.folder / unit.file
        try:
            if path.stat().st_size != int(self.files[unit.file].split()[0]):
                raise UserError(f"{path} changed while it was in use. Restore it and resume.")
            if unit.file.endswith(".parquet"):
                yield from self._rows(path, unit, first, slices)
            elif unit.file.endswith((".jsonl", ".jsonl.zst")):
                yield from self._lines(path, unit, first)
            elif first == 0:
                content = path.read_bytes()
                yield Record(0, decoded(content), len(content))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error

    def _rows(self, path: Path, unit: Unit, first: int, slices: int) -> Iterator[Record]:
        # An open reader would keep 13 MB of pages and dictionaries. Decoding again up to each slice costs a few percent
        # of the time that its tokenization takes.
        try:
            rows = self._footer(path).row_group(unit.part).num_rows
            size = max(MIN_ROWS, -(-rows // slices))
            while first < rows:
                texts = self._slice(path, unit.part, first, size)
                for number, text in enumerate(texts, start=first):
                    yield Record(number, text, unit.bytes // rows)
                first += len(texts)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # the system's, as opposed to Arrow's of the same class
                raise
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged in row group {unit.part} ({reason}). Fetch it again.") from error

    def _slice(self, path: Path, row_group: int, first: int, size: int) -> list[Optional[str]]:
        """At most `size` texts from row `first` on; slices begin at multiples of `size`."""
        footer, checked = self._footer(path), {"page_checksum_verification": True}  # where the file has checksums
        with pyarrow.parquet.ParquetFile(path, metadata=footer, buffer_size=1 << 16, **checked) as file:
            start = 0
            for batch in file.iter_batches(size, row_groups=[row_group], columns=[self.text_column], use_threads=False):
                if start + len(batch) > first:
                    return [scalar_text(value) for value in batch.column(0)[first - start :]]
                start += len(batch)
        raise UserError(f"{path} is damaged: row group {row_group} ends at row {start}. Fetch it again.")

    def _lines(self, path: Path, unit: Unit, first: int) -> Iterator[Record]:
        compressed = unit.file.endswith(".zst")
        lines = _split(_decompressed(path)) if compressed else _lines_of_range(path, unit.part * RANGE_BYTES)
        for number, (line, size) in enumerate(lines):
            if number < first:
                continue
            place = f"{path} line {number + 1}"
            if not compressed and unit.part:
                place += f" after byte {unit.part * RANGE_BYTES:,}"
            text = decoded(line)
            if text is not None:
                text = text_of(text, self.text_column, place) if text.strip() else ""
            yield Record(number, text, size)


def _inspect(folder: Path, name: str, text_column: str) -> tuple[str, list[Unit]]:
    """What identifies a file, and its units."""
    path = folder / name
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            ends = file.read(SAMPLED_BYTES)
            file.seek(max(0, size - SAMPLED_BYTES))
            ends += file.read(SAMPLED_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    identity = f"{size} bytes, SHA-256 of both ends {hashlib.sha256(ends).hexdigest()[:16]}"
    if name.endswith(".jsonl"):
        starts = range(0, size, RANGE_BYTES)
        return identity, [Unit(name, i, min(RANGE_BYTES, size - start)) for i, start in enumerate(starts)]
    if not name.endswith(".parquet"):
        return identity, [Unit(name, 0, size)]
    with open_parquet(path, text_column) as file:
        columns = [file.schema.column(i).path for i in range(len(file.schema))]
        column = columns.index(text_column)
        groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
        units = [Unit(name, i, group.column(column).total_uncompressed_size) for i, group in enumerate(groups)]
    return f"{identity}, {len(units)} row groups", units


def _parts(path: Path, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on. It is opened for every part: hundreds are read at the same time."""
    while True:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            part = file.read(PART_BYTES)
        if not part:
            return
        yield part
        start += len(part)


def _decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """Content of a Zstandard file by parts, with the compressed bytes each took. A cut-off file is an error."""
    decoder = None
    try:
        for part in _parts(path, 0):
            size, content = len(part), b""
            while part:
                decoder = decoder or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                content += decoder.decompress(part)
                part, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
            yield content, size
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged ({error}). Fetch it again.") from error
    if decoder is not None:
        raise UserError(f"{path} is cut off in the middle of its compressed data. Fetch it again.")


def _split(parts: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Lines of a content that comes in parts, each with the sizes of the parts that were read to complete it."""
    begun: list[bytes] = []  # of the line that is not complete
    read = 0
    for part, size in parts:
        read += size
        head, *lines = part.split(b"\n")
        begun.append(head)
        if lines:
            *complete, rest = [b"".join(begun), *lines]
            for line in complete:
                yield line, read
                read = 0
            begun = [rest]
    if last := b"".join(begun):
        yield last, read


def _lines_of_range(path: Path, start: int) -> Iterator[tuple[bytes, int]]:
    """The lines that begin in the RANGE_BYTES bytes from `start`, with their sizes."""
    end, position = start + RANGE_BYTES, max(0, start - 1)
    lines = _split((part, 0) for part in _parts(path, position))
    if start:  # to the first line break, be it the byte before the range: that line began earlier
        position += len(next(lines, (b"", 0))[0]) + 1
    for line, _ in lines:
        if position >= end:
            return
        yield line, len(line) + 1
        position += len(line) + 1
