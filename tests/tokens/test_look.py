import matplotlib.image
import numpy as np
import pytest

from lit_gpt.tokens import look
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.look import document_lengths, documents_spread, draw_lengths
from lit_gpt.tokens.shards import write_shard

SIZES = [[40, 7, 300], [1, 2, 90, 5], [1000]]
LENGTHS = [size for sizes in SIZES for size in sizes]


@pytest.fixture(params=[True, False], ids=["with indices", "without"])
def corpus(request, tmp_path, monkeypatch):
    """Three shards of documents that end in id 2; every document's other ids are its number."""
    monkeypatch.setattr(look, "WINDOW", 64)
    number = 10
    for i, sizes in enumerate(SIZES):
        documents = []
        for size in sizes:
            documents.append(np.append(np.full(size - 1, number), 2))
            number += 1
        write_shard(tmp_path / f"train_{i}.bin", documents, np.dtype(np.uint16))
        if not request.param:
            (tmp_path / f"train_{i}.idx").unlink()
    return Corpus.open(tmp_path, "train")


def test_lengths(corpus, monkeypatch):
    monkeypatch.setattr(look, "INDEX_WINDOW", 2)
    assert np.concatenate(list(document_lengths(corpus))).tolist() == LENGTHS


def test_documents_begin_where_documents_begin(corpus):
    begins = np.cumsum([0, *LENGTHS])
    lengths = dict(zip(begins, LENGTHS))
    for count in (1, 2, 5, 40):
        found = list(documents_spread(corpus, count, shown=30))
        assert len(found) == count and found[0][0] == 0
        for place, ids, length in found:
            assert place in lengths
            assert length == lengths[place] if lengths[place] <= 64 else length in (lengths[place], None)
            assert ids.tolist() == corpus.read(place, min(lengths[place], 30)).tolist()


def test_the_numbers_and_the_picture(corpus, tmp_path):
    numbers = draw_lengths(corpus, tmp_path / "lengths.png")
    assert numbers["documents"] == 8 and numbers["longest"] == 1000
    assert numbers["mean length"] == pytest.approx(np.mean(LENGTHS))
    assert numbers["median"] == np.quantile(LENGTHS, 0.5, method="inverted_cdf")
    assert numbers["95% are at most"] == 1000
    image = matplotlib.image.imread(tmp_path / "lengths.png")
    assert image.shape[0] > 300 and image.std() > 0.05
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
