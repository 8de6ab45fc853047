"""Looking at a corpus: some of its documents, and how long they all are."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.storage import open_file

WINDOW = 1 << 18  # tokens read at a time
INDEX_WINDOW = 1 << 20  # index entries read at a time
LONGEST = 1 << 22  # tokens; longer documents count as this long in the quantiles


def documents_spread(corpus: Corpus, count: int, shown: int) -> Iterator[tuple[int, np.ndarray, Optional[int]]]:
    """`count` documents from places spread evenly: (place of the first token, its first `shown` ids, length).

    The length is None for a document that is longer than a window of 262,144 tokens.
    """
    for i in range(count):
        place = _document_from(corpus, i * corpus.num_tokens // count)
        tokens = corpus.read(place, min(WINDOW, corpus.num_tokens - place))
        following = corpus.document_starts(place, tokens)
        at_end = place + len(tokens) == corpus.num_tokens
        length = int(following[0]) if len(following) else len(tokens) if at_end else None
        yield place, tokens[: min(shown, length or shown)], length


def _document_from(corpus: Corpus, place: int) -> int:
    """The first token of a document at or after `place`, or of the corpus if none follows."""
    start = max(place - 1, 0)
    while place and start < corpus.num_tokens - 1:
        starts = corpus.document_starts(start, corpus.read(start, min(WINDOW + 1, corpus.num_tokens - start)))
        if len(starts):
            return start + int(starts[0])
        start += WINDOW
    return 0


def document_lengths(corpus: Corpus) -> Iterator[np.ndarray]:
    """Lengths of all documents in order, in tokens: arrays of int64. What follows the last end counts as one more."""
    begin = 0
    for ends in _document_ends(corpus):
        if len(ends):
            yield np.diff(ends, prepend=begin)
            begin = int(ends[-1])
    if begin < corpus.num_tokens:
        yield np.array([corpus.num_tokens - begin])


def _document_ends(corpus: Corpus) -> Iterator[np.ndarray]:
    """Ends of documents in the whole stream: from the indices, or, where one is missing, by reading every token."""
    if all(shard.num_documents is not None for shard in corpus.shards):
        first_token = 0
        for shard in corpus.shards:
            index = open_file(shard.index_path)
            for first in range(0, shard.num_documents, INDEX_WINDOW):
                count = min(INDEX_WINDOW, shard.num_documents - first)
                yield np.frombuffer(index.pread(8 * count, 8 * first), "<u8").astype(np.int64) + first_token
            first_token += shard.num_tokens
    else:
        for start in range(0, corpus.num_tokens - 1, WINDOW):
            tokens = corpus.read(start, min(WINDOW + 1, corpus.num_tokens - start))
            yield start + corpus.document_starts(start, tokens)


def draw_lengths(corpus: Corpus, path: Path) -> dict[str, float]:
    """Draw a histogram of document lengths into the PNG `path` and return what can be said in numbers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.zeros(LONGEST + 1, dtype=np.int64)
    documents, tokens, longest = 0, 0, 0
    for lengths in document_lengths(corpus):
        counts += np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)
        documents, tokens = documents + len(lengths), tokens + int(lengths.sum())
        longest = max(longest, int(lengths.max()))

    reached = np.cumsum(counts)
    quantile = lambda q: int(np.searchsorted(reached, q * documents))
    edges = np.unique(np.geomspace(1, min(longest, LONGEST) + 1, 60).astype(np.int64))
    length = np.arange(LONGEST + 1)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, weights in (("documents", counts), ("tokens", counts * length)):
        share, _ = np.histogram(length, bins=edges, weights=weights / max(weights.sum(), 1))
        axes.stairs(share, edges, fill=name == "documents", alpha=0.6, linewidth=1.5, label=name)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="share", title=f"{corpus.folder}, {corpus.split}")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
    return {
        "documents": documents,
        "mean length": tokens / documents,
        "5% are at most": quantile(0.05),
        "median": quantile(0.5),
        "95% are at most": quantile(0.95),
        "longest": longest,
    }
