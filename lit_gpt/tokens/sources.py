"""Where text comes from: files in a folder, cut into units of work, and the documents in a unit.

- A text file (.txt, .md, .py, ...) is one document; a .jsonl or .jsonl.zst line and a .parquet row are one each.
- Units depend on the source alone, never on how many workers will read them: text files are grouped in sorted order,
  a .jsonl or .jsonl.zst file is one unit, a .parquet file is cut into ranges of row groups.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import pyarrow
import pyarrow.parquet
import zstandard

from lit_gpt.errors import UserError

RECORD_SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet")
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 1 << 20, 1 << 28


@dataclass(frozen=True)
class Unit:
    """A range of the source that becomes one shard per split.

    `files` are relative to `root`; `row_groups` is the half-open range of a .parquet file; `bytes` is its share of the
    source; `signature` changes when a file's size or time of modification does.
    """

    number: int
    root: Path
    files: tuple[str, ...]
    bytes: int
    signature: str
    row_groups: Optional[tuple[int, int]] = None

    @property
    def source(self) -> str:
        """Which range of the source this is, for people."""
        if self.row_groups:
            return f"{self.files[0]} row groups {self.row_groups[0]} to {self.row_groups[1] - 1}"
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} to {self.files[-1]}"


def list_units(
    source: Path,
    extensions: tuple[str, ...],
    unit_bytes: Optional[int],
    text_column: str,
    exclude: Path,
    exclude_names: Collection[str] = (),
) -> list[Unit]:
    """Cut `source`, a file or a folder, into units of about `unit_bytes`; None: a 64th of it, 1 to 256 MiB.

    Not part of the source: the folder `exclude`, where output goes, and folders called by one of `exclude_names`.

    Raises:
        UserError: nothing to read there, an unknown kind of file, or a .parquet file without `text_column`.
    """
    if not source.exists():
        raise UserError(
            f"source {source} does not exist. Give a folder or file of text, .jsonl, .jsonl.zst or .parquet."
        )
    if source.is_file():
        if not source.name.endswith(extensions):
            raise UserError(
                f"{source} has none of the known endings {', '.join(extensions)}. Name its ending with --extensions."
            )
        root, names = source.parent, [source.name]
    else:
        root, names = source, _walk(source, extensions, exclude.resolve(), exclude_names)
        if not names:
            raise UserError(f"{source} holds no files that end in {', '.join(extensions)}. See --extensions.")
    stats = {name: (root / name).stat() for name in names}
    if unit_bytes is None:
        total = sum(stat.st_size for stat in stats.values())
        unit_bytes = min(max(total // 64, MIN_UNIT_BYTES), MAX_UNIT_BYTES)

    units: list[Unit] = []
    group: list[str] = []
    group_size = 0

    def signature(*files: str) -> str:
        listing = json.dumps([(name, stats[name].st_size, stats[name].st_mtime_ns) for name in files])
        return hashlib.sha256(listing.encode()).hexdigest()

    for name in names:
        is_text = not name.endswith(RECORD_SUFFIXES)
        if is_text:
            group.append(name)
            group_size += stats[name].st_size
        if group and (group_size >= unit_bytes or not is_text):
            units.append(Unit(len(units), root, tuple(group), group_size, signature(*group)))
            group, group_size = [], 0
        if not is_text:
            units += record_units(root, name, text_column, unit_bytes, signature(name), len(units))
    if group:
        units.append(Unit(len(units), root, tuple(group), group_size, signature(*group)))
    if not sum(unit.bytes for unit in units):
        raise UserError(f"source {source} is empty. Give one with text.")
    return units


def record_units(
    root: Path, name: str, text_column: str, unit_bytes: int, signature: str, first_number: int
) -> list[Unit]:
    """The units of one .parquet, .jsonl or .jsonl.zst file, numbered from `first_number` on.

    Raises:
        UserError: a damaged .parquet file, or one without `text_column`.
    """
    if not name.endswith(".parquet"):
        return [Unit(first_number, root, (name,), (root / name).stat().st_size, signature)]
    ranges = _row_group_ranges(root / name, text_column, unit_bytes)
    return [
        Unit(number, root, (name,), size, signature, rows) for number, (size, rows) in enumerate(ranges, first_number)
    ]


def documents(unit: Unit, text_column: str) -> Iterator[tuple[Optional[str], int]]:
    """The documents of a unit in order: (text, bytes of the source it took). Text is None where it is not UTF-8.

    Raises:
        UserError: a damaged file, or a record without text; names the file and the place.
    """
    for name in unit.files:
        path = unit.root / name
        try:
            if name.endswith(".parquet"):
                yield from _parquet_documents(path, text_column, unit)
            elif name.endswith(".jsonl.zst"):
                yield from _jsonl_documents(path, text_column, _zst_lines(path))
            elif name.endswith(".jsonl"):
                yield from _jsonl_documents(path, text_column, _plain_lines(path))
            else:
                content = path.read_bytes()
                yield decoded(content), len(content)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def sample_texts(units: list[Unit], text_column: str, budget: int) -> Iterator[str]:
    """About `budget` characters at most, from all units in proportion to their size."""
    total = sum(unit.bytes for unit in units)
    step = max(1, -(-total // budget))
    for unit in units:
        left = min(budget, -(-budget * unit.bytes // max(total, 1)))
        for text, _ in documents(replace(unit, files=unit.files[::step]), text_column):
            if text:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                break


def _walk(folder: Path, extensions: tuple[str, ...], exclude: Path, exclude_names: Collection[str]) -> list[str]:
    """Files below `folder` with one of the endings: relative paths with "/", sorted."""
    names = []
    for parent, subfolders, files in os.walk(folder):
        kept = [name for name in subfolders if name not in exclude_names]
        subfolders[:] = [name for name in kept if (Path(parent) / name).resolve() != exclude]
        paths = (Path(parent) / name for name in files if name.endswith(extensions))
        names += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return sorted(names)


def decoded(content: bytes) -> Optional[str]:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _plain_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb") as file:
        for line in file:
            yield line, len(line)


def _zst_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines of a Zstandard file, with the compressed bytes read for them. A cut-off file is an error, not an end."""
    decoder, rest, read = None, b"", 0
    with open(path, "rb") as file:
        try:
            while part := file.read(1 << 20):
                read += len(part)
                while part:
                    decoder = decoder or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                    *lines, rest = (rest + decoder.decompress(part)).split(b"\n")
                    for line in lines:
                        yield line, read
                        read = 0
                    part, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged ({error}). Fetch it again.") from error
    if decoder is not None:
        raise UserError(f"{path} is cut off in the middle of its compressed data. Fetch it again.")
    if rest:
        yield rest, read


def _jsonl_documents(
    path: Path, text_column: str, lines: Iterator[tuple[bytes, int]]
) -> Iterator[tuple[Optional[str], int]]:
    for number, (line, size) in enumerate(lines, start=1):
        record = decoded(line)
        if record is None:
            yield None, size
        elif record.strip():
            yield text_of(record, text_column, f"{path} line {number}"), size


def text_of(line: str, text_column: str, place: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON ({error}). Mend or remove the line.") from error
    if not isinstance(record, dict) or text_column not in record:
        has = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{place} has no field '{text_column}' (it has {has}). Name the field with --text_column.")
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: field '{text_column}' is no text but a {type(text).__name__}. See --text_column.")
    return text or ""


def open_parquet(path: Path, text_column: str) -> pyarrow.parquet.ParquetFile:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as parquet ({reason}). Fetch it again.") from error
    if text_column not in file.schema_arrow.names:
        has = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column '{text_column}' (it has {has}). Name the column with --text_column.")
    kind = file.schema_arrow.field(text_column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column '{text_column}' holds {kind}, not text. See --text_column.")
    return file


def _row_group_ranges(path: Path, text_column: str, unit_bytes: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(bytes of text, half-open range of row groups), each of at least `unit_bytes` but for the last."""
    with open_parquet(path, text_column) as file:
        paths = [file.schema.column(i).path for i in range(len(file.schema))]
        column, groups = paths.index(text_column), [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = [group.column(column).total_uncompressed_size for group in groups]
    first, size = 0, 0
    for i, group_size in enumerate(sizes):
        size += group_size
        if size >= unit_bytes or i == len(sizes) - 1:
            yield size, (first, i + 1)
            first, size = i + 1, 0


def _parquet_documents(path: Path, text_column: str, unit: Unit) -> Iterator[tuple[Optional[str], int]]:
    with open_parquet(path, text_column) as file:
        groups = range(*unit.row_groups)
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_column]):
                for value in batch.column(0):
                    yield scalar_text(value), unit.bytes // max(rows, 1)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}). Fetch it again.") from error


def scalar_text(value: pyarrow.Scalar) -> Optional[str]:
    if not value.is_valid:
        return ""
    return decoded(value.as_buffer().to_pybytes())
