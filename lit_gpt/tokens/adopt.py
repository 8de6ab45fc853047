"""Corpora from tokens that other projects wrote.

- LITPKDS folders (TinyLlama and its descendants) stay as they are: they get indices, found by looking for the ids that
  part documents, and a manifest with the hash of every file. Not a token is rewritten.
- Folders of litdata's TokensLoader (litgpt) and of datatrove (.ds) are converted into shards in another folder.

litdata     index.json {config: {data_format: ["no_header_tensor:<dtype>"], compression}, chunks: [{filename,
            chunk_size: items, dim: tokens}]}; a chunk is uint32 items n, uint32 offsets [n + 1], then bare ids.
datatrove   <name>.ds: bare ids of 2 or 4 bytes; <name>.ds.index: document ends in tokens, uint64.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.files import write_atomically, write_json
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens.corpus import BOS, EOS, PREPARE_NAME, Corpus
from lit_gpt.tokens.manifest import MANIFEST_NAME, SPLITS, read_json, write_manifest
from lit_gpt.tokens.shards import Shard, ShardWriter, dtype_for
from lit_gpt.tokens.storage import open_file

WINDOW = 1 << 22  # tokens read at a time
LITDATA_DTYPES = {  # the numbers of its serializers
    "no_header_tensor": {13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"},
    "no_header_numpy": {1: "<i2", 2: "<i4", 3: "<i8", 5: "<u2", 6: "<u4", 7: "<u8"},
}


def adopt(
    folder: Path,
    out: Optional[Path],
    tokenizer: Optional[Tokenizer],
    document_format: Optional[str],
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Path:
    """Make a corpus of `folder` and return where it is: `folder` itself, or `out` for formats that are converted.

    Args:
        tokenizer: the one that made the tokens. Left out, begin and end are Llama's ids 1 and 2, and the corpus does
            not know its vocabulary.
        document_format: which ids enclose a document; None looks which there are.

    Raises:
        UserError: nothing to adopt, an unknown or damaged file, an id outside the tokenizer's vocabulary, or an index
            that exists and says something else.
    """
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder} is a corpus already: it has a {MANIFEST_NAME}.")
    sources = _foreign_sources(folder)
    if not sources:
        if out is not None:
            raise UserError(f"{folder} holds shards of the right format, which stay where they are. Leave out --out.")
        _adopt_shards(folder, tokenizer, document_format, on_tokens)
        return folder
    if out is None:
        raise UserError(f"{folder} holds {sources[0][1].name}, which has to be converted. Say where to with --out.")
    _convert(folder, out, sources, tokenizer, document_format, on_tokens)
    return out


def _adopt_shards(
    folder: Path, tokenizer: Optional[Tokenizer], document_format: Optional[str], on_tokens: Callable[[int], None]
) -> None:
    splits = [split for split in SPLITS if split == "train" or any(folder.glob(f"{split}*.bin"))]
    corpora = {split: Corpus.open(folder, split) for split in splits}
    sample = corpora["train"].read(0, min(corpora["train"].num_tokens, WINDOW))
    document_format = document_format or _format_of(sample, tokenizer, folder)
    units = []
    for split, corpus in corpora.items():
        for shard, following in zip(corpus.shards, [*corpus.shards[1:], None]):
            part = _indexed(shard, following, tokenizer, document_format, on_tokens)
            units.append(_unit(len(units), shard.path.name, split, part))
    _write(folder, folder.resolve().name, corpora["train"].shards[0].dtype.name, tokenizer, document_format, units)


def _indexed(
    shard: Shard,
    following: Optional[Shard],
    tokenizer: Optional[Tokenizer],
    document_format: str,
    on_tokens: Callable[[int], None],
) -> dict[str, Any]:
    """Hash a shard, check its ids, write its index, and describe it as a manifest does."""
    whole, file = Shard.open(shard.path), open_file(shard.path)
    digest, ends = hashlib.sha256(), []
    for start in range(0, whole.num_tokens, WINDOW):
        tokens = whole.read(file, start, min(WINDOW, whole.num_tokens - start))
        digest.update(tokens.tobytes())
        _check_ids(tokens, tokenizer, shard.path)
        ends.append(start + _ends_in(tokens, tokenizer, document_format))
        on_tokens(len(tokens))
    found = np.concatenate(ends)
    found = found[(found > 0) & (found <= shard.num_tokens)]
    if document_format == "bos" and following is not None:  # a document ends where the next shard begins one
        next_id = following.read(open_file(following.path), 0, 1)
        if len(_ends_in(next_id, tokenizer, document_format)):
            found = np.append(found, shard.num_tokens)
    index = found.astype("<u8").tobytes()
    path = shard.path.with_suffix(".idx")
    if path.exists() and path.read_bytes() != index:
        raise UserError(f"{path} exists and differs from the documents that {document_format} finds. Move it away.")
    write_atomically(path, index)
    return {
        "file": shard.path.name,
        "tokens": shard.num_tokens,
        "padding": whole.num_tokens - shard.num_tokens,
        "documents": len(found),
        "characters": None,
        "sha256": digest.hexdigest(),
        "idx_sha256": hashlib.sha256(index).hexdigest(),
    }


def _convert(
    folder: Path,
    out: Path,
    sources: list[tuple[str, Path, Callable[[], tuple[np.ndarray, Optional[np.ndarray]]]]],
    tokenizer: Optional[Tokenizer],
    document_format: Optional[str],
    on_tokens: Callable[[int], None],
) -> None:
    """Write every source file as a shard. A rerun writes them again, to the same bytes."""
    plan = {"adopted": [path.relative_to(folder).as_posix() for _, path, _ in sources]}
    if out.exists() and any(out.iterdir()):
        begun = read_json(out / PREPARE_NAME) if (out / PREPARE_NAME).exists() else None
        if begun != plan or (out / MANIFEST_NAME).exists():
            raise UserError(f"--out {out} already holds files. Give a new or empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    write_json(out / PREPARE_NAME, plan)
    name, units, dtype = folder.resolve().name, [], None
    for number, (split, path, read) in enumerate(sources):
        tokens, ends = read()
        _check_ids(tokens, tokenizer, path)
        if dtype is None:
            document_format = document_format or _format_of(tokens, tokenizer, folder)
            dtype = dtype_for(tokenizer.vocab_size) if tokenizer else np.dtype(_smallest(tokens.dtype))
        if ends is None:
            ends = _ends_in(tokens, tokenizer, document_format)
            ends = np.unique(np.append(ends[ends > 0], len(tokens)))  # no document goes on in the next chunk
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(dtype).max:
            raise UserError(f"{path} holds ids that {dtype} cannot. Name the --tokenizer that made them.")
        stem = f"train_{name}_{number:06d}" if split == "train" else f"validation_{number:06d}"
        writer = ShardWriter(out / f"{stem}.bin", dtype)
        try:
            for document in np.split(tokens, ends[:-1]):
                writer.append(document)
            writer.close()
        finally:
            writer.abandon()
        part = {
            "file": writer.path.name,
            "tokens": writer.num_tokens,
            "documents": writer.num_documents,
            "characters": None,
            "sha256": writer.sha256,
            "idx_sha256": writer.idx_sha256,
        }
        units.append(_unit(number, plan["adopted"][number], split, part))
        on_tokens(len(tokens))
    _write(out, name, dtype.name, tokenizer, document_format, units)


def _foreign_sources(
    folder: Path,
) -> list[tuple[str, Path, Callable[[], tuple[np.ndarray, Optional[np.ndarray]]]]]:
    """(split, file, function that reads its ids and, where it says, document ends) of what has to be converted."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist.")
    found = []
    for split, names in (("train", ("", "train")), ("validation", ("val", "validation"))):
        for part in (folder / name for name in names):
            if (part / "index.json").is_file():
                found += [(split, path, read) for path, read in _litdata_chunks(part)]
            for path in sorted(part.glob("*.ds")):
                found.append((split, path, lambda path=path: _read_datatrove(path)))
    return found


def _litdata_chunks(folder: Path) -> Iterator[tuple[Path, Callable[[], tuple[np.ndarray, None]]]]:
    index = read_json(folder / "index.json")
    try:
        config, chunks = index["config"], index["chunks"]
        (data_format,) = config["data_format"]
        serializer, number = data_format.split(":")
        dtype = np.dtype(LITDATA_DTYPES[serializer][int(number)])
        described = [(chunk["filename"], int(chunk["chunk_size"]), int(chunk["dim"])) for chunk in chunks]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/index.json describes no token chunks (TokensLoader) of litdata.") from None
    if config.get("compression") or config.get("encryption"):
        raise UserError(f"{folder} is compressed or encrypted, which is not read. Optimize it again without.")
    for name, items, num_tokens in described:
        path = folder / name
        yield path, lambda path=path, items=items, n=num_tokens: (_read_litdata(path, dtype, items, n), None)


def _read_litdata(path: Path, dtype: np.dtype, items: int, num_tokens: int) -> np.ndarray:
    content = _content(path)
    header = 4 * (1 + items + 1)
    expected = header + num_tokens * dtype.itemsize
    if len(content) != expected:
        raise UserError(f"{path} has {len(content)} bytes, index.json promises {expected}. Restore it.")
    offsets = np.frombuffer(content, "<u4", items + 2)
    if offsets[0] != items or offsets[1] != header or offsets[-1] != expected:
        raise UserError(f"{path} has a damaged header. Restore it.")
    return np.frombuffer(content, dtype, offset=header)


def _read_datatrove(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _content(path)
    index = path.with_name(f"{path.name}.index")
    ends = np.frombuffer(_content(index), "<u8").astype(np.int64)
    total = int(ends[-1]) if len(ends) else 0
    size = len(content) // total if total else 0
    if size not in (2, 4) or size * total != len(content) or (np.diff(ends, prepend=0) < 0).any():
        raise UserError(f"{path} and {index.name} do not fit together. Restore them.")
    return np.frombuffer(content, f"<u{size}"), ends


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Restore it.") from error


def _smallest(dtype: np.dtype) -> type:
    return np.uint16 if dtype == np.uint16 else np.int32


def _special_ids(tokenizer: Optional[Tokenizer]) -> tuple[Optional[int], Optional[int]]:
    return (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (BOS, EOS)


def _format_of(tokens: np.ndarray, tokenizer: Optional[Tokenizer], folder: Path) -> str:
    """The document format whose ids there are."""
    bos, eos = (id_ is not None and bool((tokens == id_).any()) for id_ in _special_ids(tokenizer))
    if not bos and not eos:
        raise UserError(
            f"{folder} holds neither begin nor end ids {_special_ids(tokenizer)} in its first tokens. "
            "Name the --tokenizer that made them."
        )
    return "bos_eos" if bos and eos else "eos" if eos else "bos"


def _ends_in(tokens: np.ndarray, tokenizer: Optional[Tokenizer], document_format: str) -> np.ndarray:
    """Where documents end: after each end id, or, where there are only begin ids, before each of these."""
    bos, eos = _special_ids(tokenizer)
    return np.flatnonzero(tokens == eos) + 1 if "eos" in document_format else np.flatnonzero(tokens == bos)


def _check_ids(tokens: np.ndarray, tokenizer: Optional[Tokenizer], path: Path) -> None:
    if tokenizer and len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise UserError(
            f"{path} holds id {wrong}, tokenizer {tokenizer.name} has 0 to {tokenizer.vocab_size - 1}. "
            "Name the --tokenizer that made it."
        )


def _unit(number: int, source: str, split: str, part: dict[str, Any]) -> dict[str, Any]:
    both = {**dict.fromkeys(SPLITS), split: part}
    return {"unit": number, "source": source, "files": 1, "bytes": None, **both, "not_text": 0, "empty": 0}


def _write(
    folder: Path,
    name: str,
    dtype: str,
    tokenizer: Optional[Tokenizer],
    document_format: str,
    units: list[dict[str, Any]],
) -> None:
    """Copy the tokenizer, then write the manifest."""
    if tokenizer:
        copy = tokenizer.save(folder / "tokenizer").relative_to(folder).as_posix()
        known = {"file": copy, "sha256": tokenizer.sha256, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}

    def total(split: str) -> dict[str, Optional[int]]:
        parts = [unit[split] for unit in units if unit[split]]
        return {**{key: sum(part[key] for part in parts) for key in ("tokens", "documents")}, "characters": None}

    write_manifest(
        folder,
        {
            "name": name,
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size if tokenizer else None,
            "document_format": document_format,
            "tokenizer": known if tokenizer else None,
            "validation": None,
            "units": units,
            "totals": {**{split: total(split) for split in SPLITS}, "files": len(units), "not_text": 0, "empty": 0},
        },
    )
