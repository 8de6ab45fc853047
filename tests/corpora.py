"""Texts to prepare, and independent looks at what came of them."""

import hashlib
import random

import numpy as np

from lit_gpt.tokenizer import Tokenizer

WORDS = ["state", "of", "delta", "rule", "erased", "gates", "</s>", "<s>", "alpha", "0", "1", "2", "naïve", "漢字"]
EXTENSIONS = (".py", ".txt", ".rst", ".md", ".jsonl", ".jsonl.zst", ".parquet")


def text(seed, words=200):
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=10)) for _ in range(words // 10)) + f"\n    end {seed}\n"


def content(folder):
    """Every file below `folder` and its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_in(folder, split):
    """The documents of a split by an independent reading of its files."""
    tokenizer = Tokenizer(folder / "tokenizer")
    found = []
    for path in sorted(folder.glob(f"{split}*.bin")):
        tokens = np.fromfile(path, "<u2", offset=24)
        ends = np.fromfile(path.with_suffix(".idx"), "<u8").astype(int)
        assert ends[-1] == len(tokens)
        for begin, end in zip([0, *ends], ends):
            assert tokens[begin] == 1 and tokens[end - 1] == 2
            inside = tokens[begin + 1 : end - 1].tolist()
            assert not {1, 2} & set(inside), "text became a document boundary"
            found.append(tokenizer.decode(inside))
    return found
