"""A corpus in the layout that TinyLlama's reader and its descendants expect: files of equal size.

    train_slim_0000000000.bin ...    validation_0000000000.bin ...    LITPKDS, each of `chunk` tokens

Documents run on from file to file; the last file is filled up with the id that parts documents, as the original
preparation scripts do. Nothing else is needed to read them; export.json says what they were made of.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.files import write_atomically, write_json
from lit_gpt.tokens.corpus import BOS, EOS, Corpus
from lit_gpt.tokens.manifest import read_json
from lit_gpt.tokens.shards import CODES, HEADER, MAGIC, VERSION

EXPORT_NAME = "export.json"
PREFIXES = {"train": "train_slim", "validation": "validation"}


def export_official(
    corpora: list[Corpus], out: Path, chunks: dict[str, int], on_tokens: Callable[[int], None] = lambda count: None
) -> dict[str, int]:
    """Write `corpora`, splits of one folder, into `out` as files of chunks[split] tokens; how many of each split.

    A rerun after an interruption goes on where it stopped.

    Raises:
        UserError: `out` holds something else.
    """
    plan = {corpus.split: {"fingerprint": corpus.fingerprint, "chunk": chunks[corpus.split]} for corpus in corpora}
    begun = read_json(out / EXPORT_NAME) if (out / EXPORT_NAME).exists() else None
    if begun != plan and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} already holds other files. Give a new or empty folder.")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    write_json(out / EXPORT_NAME, plan)
    written = {}
    for corpus in corpora:
        chunk, dtype, separator = chunks[corpus.split], corpus.shards[0].dtype, _separator(corpus)
        header = HEADER.pack(MAGIC, VERSION, CODES[dtype], chunk)
        written[corpus.split] = -(-corpus.num_tokens // chunk)
        for number in range(written[corpus.split]):
            path = out / f"{PREFIXES[corpus.split]}_{number:010d}.bin"
            count = min(chunk, corpus.num_tokens - number * chunk)
            if not path.exists():
                tokens = np.full(chunk, separator, dtype)
                tokens[:count] = corpus.read(number * chunk, count)
                write_atomically(path, header + tokens.tobytes())
            on_tokens(count)
    tokenizer = corpora[0].folder / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    return written


def _separator(corpus: Corpus) -> int:
    known = corpus.manifest and corpus.manifest["tokenizer"]
    bos, eos = (known["bos_id"], known["eos_id"]) if known else (BOS, EOS)
    return bos if corpus.document_format == "bos" else eos
