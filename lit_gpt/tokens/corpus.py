"""A corpus: the shards of one split, read as a single stream of tokens.

- Opens folders of `scripts/prepare_data.py` (with a manifest) and bare LITPKDS folders of other projects as they are.
- Checks every file's header and size at open, so that damage shows before training, with the file's name.
- Knows where documents begin: from the shards' indices; in a bare folder without them, from its separators.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Optional

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.tokens.manifest import MANIFEST_NAME, SPLITS, fingerprint_of, read_manifest
from lit_gpt.tokens.shards import HEADER, Shard
from lit_gpt.tokens.storage import AnyPath, LocalFile, RemoteFile, location, open_file

OPEN_FILES = 128
BOS, EOS = SEPARATORS = (1, 2)  # of the Llama vocabulary: what bare LITPKDS folders pad their last chunk with
OPENING_THREADS = 16  # hide the latency of remote and network disks when headers are checked
PREPARE_NAME = "prepare.json"  # what scripts/prepare_data.py notes before it begins


@dataclass
class Corpus:
    """One split of a token folder. Make it with `Corpus.open(folder, split)`.

    Attributes:
        num_tokens: length of the stream.
        vocab_size, tokenizer_sha256, document_format: from the manifest; None for a bare folder, which does not say
            (an adopted one may know its format alone).
        fingerprint: identifies the content. From the manifest (and thus from hashes of every byte), or, for a bare
            folder, from names, sizes and the first and last tokens of every shard.
    """

    folder: AnyPath
    split: str
    shards: list[Shard]
    manifest: Optional[dict[str, Any]]

    @classmethod
    def open(cls, folder: "str | os.PathLike[str]", split: str) -> "Corpus":
        """Open the "train" or "validation" split of `folder`, a path or a URL.

        Raises:
            UserError: no such folder or split, an unfinished preparation, or any damaged shard, by name.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
        folder = location(folder)
        if not folder.is_dir():
            raise UserError(f"data folder {folder} does not exist. Make one with scripts/prepare_data.py.")
        manifest = read_manifest(folder)
        if manifest is None and (folder / PREPARE_NAME).exists():
            raise UserError(f"{folder} is not finished. Run the same scripts/prepare_data.py command again.")
        shards = _listed_shards(folder, split, manifest) if manifest else _found_shards(folder, split)
        if not shards:
            hint = "Prepare it with a larger --validation_fraction." if split == "validation" else "Prepare data first."
            raise UserError(f"{folder} holds no {split} shards ({split}*.bin). {hint}")
        return cls(folder, split, shards, manifest)

    def __post_init__(self):
        self._ends = np.cumsum([shard.num_tokens for shard in self.shards], dtype=np.int64)
        self.num_tokens = int(self._ends[-1])
        self.vocab_size: Optional[int] = self.manifest["vocab_size"] if self.manifest else None
        tokenizer = self.manifest["tokenizer"] if self.manifest else None
        self.tokenizer_sha256: Optional[str] = tokenizer["sha256"] if tokenizer else None
        self.document_format: Optional[str] = self.manifest["document_format"] if self.manifest else None
        self._open_file = lru_cache(maxsize=OPEN_FILES)(_opened)

    @cached_property
    def fingerprint(self) -> str:
        if self.manifest:
            return self.manifest["fingerprint"]
        content = []
        for shard in self.shards:
            file = self._open_file(shard.path)
            count = min(2048, shard.num_tokens)
            sample = [shard.read(file, start, count) for start in (0, shard.num_tokens - count)]
            digest = hashlib.sha256(b"".join(part.tobytes() for part in sample)).hexdigest()
            content.append([shard.path.name, shard.dtype.str, shard.num_tokens, digest])
        return fingerprint_of(content)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, across shard edges: int64 [count]."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise ValueError(f"tokens {start} to {start + count} are outside the corpus of {self.num_tokens}")
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            shard = self.shards[number]
            inside = start + filled - (int(self._ends[number]) - shard.num_tokens)
            take = min(count - filled, shard.num_tokens - inside)
            file = self._open_file(shard.path)  # held while reading, so that eviction cannot close it under us
            tokens[filled : filled + take] = shard.read(file, inside, take)
            filled += take
            number += 1
        return tokens

    def document_starts(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Where documents start inside a part of the stream: int64, ascending, each in 1 ... len(tokens) - 1.

        Args:
            start, tokens: the part, as read(start, len(tokens)) returns it.
        """
        if any(shard.num_documents is None for shard in self._shards_from(start, len(tokens))):
            if self._separator == EOS:
                return np.flatnonzero(tokens[:-1] == EOS) + 1
            return np.flatnonzero(tokens[1:] == BOS) + 1
        found, stop = [], start + len(tokens)
        for shard, begin in self._shards_from(start, len(tokens)).items():
            index = self._open_file(shard.index_path)
            found.append(shard.document_ends(index, max(start - begin, 0), stop - begin) + (begin - start))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _shards_from(self, start: int, count: int) -> dict[Shard, int]:
        """The shards that hold [start, start + count), each with the place of its first token in the stream."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, start + count, side="left"))
        return {s: int(end) - s.num_tokens for s, end in zip(self.shards[first : last + 1], self._ends[first:])}

    @cached_property
    def _separator(self) -> int:
        """What parts the documents of a bare folder, which does not say: EOS after each, or BOS before each."""
        tokens = self.read(0, min(self.num_tokens, 1 << 20))
        return BOS if (tokens == BOS).any() and not (tokens == EOS).any() else EOS

    def verify(self, on_bytes: Optional[Callable[[int], None]] = None) -> None:
        """Read every shard and index of this split and compare their hashes with the manifest's.

        Raises:
            UserError: the first file that differs, or a bare folder, which has no hashes.
        """
        if self.manifest is None:
            raise UserError(f"{self.folder} has no {MANIFEST_NAME}, so there are no hashes to verify it against.")
        for part in _parts(self.manifest, self.split):
            bin_file = self.folder / part["file"]
            for path, skip, expected in (
                (bin_file, HEADER.size, part["sha256"]),
                (bin_file.with_suffix(".idx"), 0, part["idx_sha256"]),
            ):
                if _sha256(path, skip, on_bytes) != expected:
                    raise UserError(f"{path} differs from what was prepared (SHA-256). Restore it or prepare again.")


def _opened(path: AnyPath) -> "LocalFile | RemoteFile":
    try:
        return open_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}. Restore it and resume.") from error


def _sha256(path: AnyPath, skip: int, on_bytes: Optional[Callable[[int], None]]) -> str:
    """Of what follows the first `skip` bytes. `on_bytes` hears the size of each part as it is read."""
    digest, file = hashlib.sha256(), open_file(path)
    while part := file.pread(1 << 22, skip):
        digest.update(part)
        skip += len(part)
        if on_bytes:
            on_bytes(len(part))
    return digest.hexdigest()


def _parts(manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [unit[split] for unit in manifest["units"] if unit[split]]


def _listed_shards(folder: AnyPath, split: str, manifest: dict[str, Any]) -> list[Shard]:
    """The shards that the manifest lists, each as it describes them."""

    def checked(part: dict[str, Any]) -> Shard:
        shard = Shard.open(folder / part["file"])
        if shard.dtype != np.dtype(manifest["dtype"]):
            raise UserError(f"shard {shard.path} holds {shard.dtype}, the manifest {manifest['dtype']}. Restore it.")
        if shard.num_tokens != part["tokens"] + part.get("padding", 0):
            raise UserError(
                f"shard {shard.path} holds {shard.num_tokens} tokens, the manifest says {part['tokens']}. Restore it."
            )
        index = shard.index_path
        if not index.is_file() or index.stat().st_size != 8 * part["documents"]:
            raise UserError(f"index {index} is missing or not of {part['documents']} documents. Restore it.")
        return replace(shard, num_tokens=part["tokens"], num_documents=part["documents"])

    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        return list(pool.map(checked, _parts(manifest, split)))


def _found_shards(folder: AnyPath, split: str) -> list[Shard]:
    """All `<split>*.bin` in order of name, less the padding at their ends."""

    def checked(path: AnyPath) -> Shard:
        shard = Shard.open(path)
        if not shard.index_path.is_file():
            return shard
        size = shard.index_path.stat().st_size
        if size % 8:
            raise UserError(f"index {shard.index_path} is truncated: {size} bytes, no multiple of 8. Restore it.")
        return replace(shard, num_documents=size // 8)

    with ThreadPoolExecutor(OPENING_THREADS) as pool:
        shards = list(pool.map(checked, sorted(folder.glob(f"{split}*.bin"), key=lambda path: path.name)))
        for shard in shards:
            if shard.dtype != shards[0].dtype:
                raise UserError(
                    f"shard {shard.path} holds {shard.dtype}, but {shards[0].path.name} holds {shards[0].dtype}. "
                    f"Keep data of one type in a folder."
                )
        shards = list(pool.map(_without_padding, shards))
    return [shard for shard in shards if shard.num_tokens]


def _without_padding(shard: Shard, window: int = 4096) -> Shard:
    """The shard up to and including the first separator of a run of separators that ends it."""
    file = open_file(shard.path)
    end, separator = shard.num_tokens, None
    while end:
        count = min(window, end)
        tail = shard.read(file, end - count, count)
        separator = tail[-1] if separator is None else separator
        if separator not in SEPARATORS:
            return shard
        others = np.flatnonzero(tail != separator)
        if len(others):
            end += int(others[-1]) + 1 - count
            break
        end -= count
    return replace(shard, num_tokens=min(end + 1, shard.num_tokens))
