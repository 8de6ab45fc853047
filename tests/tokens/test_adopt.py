import json
import struct

import numpy as np
import pytest

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.tokens import adopt as adopt_module
from lit_gpt.tokens.adopt import adopt
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.export import export_official
from lit_gpt.tokens.look import document_lengths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"{i} alpha beta gamma" for i in range(100)]
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("tokenizer"))


def documents(count, seed=0, bos=False, eos=True, highest=300):
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(3, highest, rng.integers(1, 90)) for _ in range(count)]
    return [np.concatenate([[1] * bos, body, [2] * eos]).astype(np.int64) for body in bodies]


def put_official(path, tokens, dtype="<u2"):
    code = {"<u2": 8, "<i4": 4}[dtype]
    header = b"LITPKDS" + struct.pack("<Q", 1) + bytes([code]) + struct.pack("<Q", len(tokens))
    path.write_bytes(header + np.asarray(tokens).astype(dtype).tobytes())


def put_chunks(folder, prefix, stream, chunk, separator=2):
    """As TinyLlama's builder: equal files, documents running on, the last one filled up."""
    filled = np.append(stream, np.full(-len(stream) % chunk, separator))
    for number, tokens in enumerate(filled.reshape(-1, chunk)):
        put_official(folder / f"{prefix}_{number:010d}.bin", tokens)


def put_litdata(folder, bodies, chunk_items, data_format, dtype):
    """By the format's description: index.json, and chunks of a count, offsets and bare items."""
    folder.mkdir(parents=True)
    chunks = []
    for number, first in enumerate(range(0, len(bodies), chunk_items)):
        items = [body.astype(dtype).tobytes() for body in bodies[first : first + chunk_items]]
        header = 4 * (2 + len(items))
        offsets = header + np.cumsum([0, *map(len, items)])
        content = struct.pack(f"<{2 + len(items)}I", len(items), *offsets) + b"".join(items)
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(content)
        dim = sum(map(len, bodies[first : first + chunk_items]))
        chunks.append({"filename": name, "chunk_size": len(items), "chunk_bytes": len(content), "dim": dim})
    config = {"data_format": [data_format], "compression": None, "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))


def stream_of(corpus):
    return corpus.read(0, corpus.num_tokens)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("given", [True, False])
def test_an_official_folder_gets_indices_and_hashes_and_stays_as_it_is(tmp_path, tokenizer, given, monkeypatch):
    monkeypatch.setattr(adopt_module, "WINDOW", 100)
    train, validation = documents(200), documents(20, seed=1)
    put_chunks(tmp_path, "train_slim_w000", np.concatenate(train), 1024)
    put_chunks(tmp_path, "validation", np.concatenate(validation), 512)
    shards, bare = content(tmp_path), Corpus.open(tmp_path, "train")
    before = stream_of(bare)
    adopt(tmp_path, None, tokenizer if given else None, None)
    assert {path: data for path, data in content(tmp_path).items() if path in shards} == shards
    for split, expected in (("train", train), ("validation", validation)):
        corpus = Corpus.open(tmp_path, split)
        corpus.verify()
        assert np.array_equal(stream_of(corpus), np.concatenate(expected))
        assert np.concatenate(list(document_lengths(corpus))).tolist() == [len(body) for body in expected]
        assert corpus.document_format == "eos"
        assert corpus.tokenizer_sha256 == (tokenizer.sha256 if given else None)
        assert corpus.vocab_size == (300 if given else None)
    corpus = Corpus.open(tmp_path, "train")
    assert np.array_equal(stream_of(corpus), before)
    first = np.cumsum([len(body) for body in train])
    for start in (0, 1000, 1023, 1024, 3000):
        starts = corpus.document_starts(start, corpus.read(start, 500)) + start
        assert starts.tolist() == first[(first > start) & (first < start + 500)].tolist()
    if given:
        assert Tokenizer(tmp_path / "tokenizer").sha256 == tokenizer.sha256
    with pytest.raises(UserError, match="is a corpus already"):
        adopt(tmp_path, None, None, None)
    path = tmp_path / "train_slim_w000_0000000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=path.name):
        corpus.verify()


def test_documents_that_only_begin(tmp_path):
    bodies = documents(120, bos=True, eos=False)
    put_chunks(tmp_path, "train_slim", np.concatenate(bodies), 256, separator=1)
    adopt(tmp_path, None, None, None)
    corpus = Corpus.open(tmp_path, "train")
    assert corpus.document_format == "bos"
    lengths = np.concatenate(list(document_lengths(corpus))).tolist()
    assert lengths[: len(bodies)] == [len(body) for body in bodies]
    assert lengths[len(bodies) :] in ([], [1])  # one separator of the padding stays


def test_adopting_can_be_cut_at_any_file(tmp_path, tokenizer, monkeypatch):
    put_chunks(tmp_path, "train_slim", np.concatenate(documents(60)), 512)
    whole = tmp_path.parent / f"{tmp_path.name}_whole" / tmp_path.name  # the folder's name is in the manifest
    whole.mkdir(parents=True)
    for path, data in content(tmp_path).items():
        (whole / path).write_bytes(data)
    adopt(whole, None, tokenizer, None)
    calls = []

    def cut(path, data, real=adopt_module.write_atomically):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(adopt_module, "write_atomically", cut)
    with pytest.raises(KeyboardInterrupt):
        adopt(tmp_path, None, tokenizer, None)
    monkeypatch.undo()
    adopt(tmp_path, None, tokenizer, None)
    assert content(tmp_path) == content(whole)


def test_what_does_not_fit_is_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(UserError, match="does not exist"):
        adopt(tmp_path / "nowhere", None, None, None)
    with pytest.raises(UserError, match="no train shards"):
        adopt(tmp_path, None, None, None)
    put_official(tmp_path / "train_0.bin", np.append(documents(3)[0], [300, 2]))
    with pytest.raises(UserError, match=r"train_0\.bin holds id 300, .* 0 to 299"):
        adopt(tmp_path, None, tokenizer, None)
    put_official(tmp_path / "train_0.bin", [7, 8, 9])
    with pytest.raises(UserError, match="neither begin nor end ids"):
        adopt(tmp_path, None, None, None)
    put_official(tmp_path / "train_0.bin", [7, 2, 8, 2])
    (tmp_path / "train_0.idx").write_bytes(struct.pack("<Q", 1))
    with pytest.raises(UserError, match=r"train_0\.idx exists and differs"):
        adopt(tmp_path, None, None, None)
    with pytest.raises(UserError, match="Leave out --out"):
        adopt(tmp_path, tmp_path / "out", None, None)
    assert (tmp_path / "train_0.idx").read_bytes() == struct.pack("<Q", 1)


@pytest.mark.parametrize(
    "data_format, dtype", [("no_header_tensor:16", "<i4"), ("no_header_tensor:17", "<i8"), ("no_header_numpy:5", "<u2")]
)
def test_litdata_folders_are_converted(tmp_path, tokenizer, data_format, dtype):
    train, validation = documents(90, bos=True), documents(15, seed=3, bos=True)
    put_litdata(tmp_path / "slim" / "train", train, 40, data_format, dtype)
    put_litdata(tmp_path / "slim" / "val", validation, 40, data_format, dtype)
    with pytest.raises(UserError, match="Say where to with --out"):
        adopt(tmp_path / "slim", None, tokenizer, None)
    source = content(tmp_path / "slim")
    place = adopt(tmp_path / "slim", tmp_path / "out", tokenizer, None)
    assert place == tmp_path / "out" and content(tmp_path / "slim") == source
    for split, expected in (("train", train), ("validation", validation)):
        corpus = Corpus.open(place, split)
        corpus.verify()
        assert np.array_equal(stream_of(corpus), np.concatenate(expected))
        assert np.concatenate(list(document_lengths(corpus))).tolist() == [len(body) for body in expected]
    assert (corpus.document_format, corpus.shards[0].dtype) == ("bos_eos", np.dtype("<u2"))
    with pytest.raises(UserError, match="already holds files"):
        adopt(tmp_path / "slim", tmp_path / "out", tokenizer, None)


def test_an_interrupted_conversion_is_no_corpus_and_goes_on(tmp_path, tokenizer):
    put_litdata(tmp_path / "slim", documents(90), 30, "no_header_tensor:16", "<i4")
    cut = tmp_path / "slim" / "chunk-0-2.bin"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"chunk-0-2\.bin has .* index.json promises"):
        adopt(tmp_path / "slim", tmp_path / "out", tokenizer, None)
    with pytest.raises(UserError, match="not finished"):
        Corpus.open(tmp_path / "out", "train")
    cut.write_bytes(b"\0" + whole[1:])
    with pytest.raises(UserError, match=r"chunk-0-2\.bin has a damaged header"):
        adopt(tmp_path / "slim", tmp_path / "out", tokenizer, None)
    cut.write_bytes(whole)
    adopt(tmp_path / "slim", tmp_path / "out", tokenizer, None)
    adopt(tmp_path / "slim", tmp_path / "fresh" / "out", tokenizer, None)
    assert content(tmp_path / "out") == content(tmp_path / "fresh" / "out")


def test_litdata_that_cannot_be_read_says_so(tmp_path):
    put_litdata(tmp_path / "a", documents(9), 9, "no_header_tensor:16", "<i4")
    index = (tmp_path / "a" / "index.json").read_text()
    for old, new, message in (
        ('"compression": null', '"compression": "zstd"', "compressed or encrypted"),
        ("no_header_tensor:16", "jpeg", "no token chunks"),
        ("no_header_tensor:16", "no_header_tensor:0", "no token chunks"),
    ):
        (tmp_path / "a" / "index.json").write_text(index.replace(old, new))
        with pytest.raises(UserError, match=message):
            adopt(tmp_path / "a", tmp_path / "out", None, None)
    assert not (tmp_path / "out").exists()


def test_datatrove_folders_are_converted(tmp_path):
    bodies = documents(50, highest=90_000)
    (tmp_path / "in").mkdir()
    for i, part in enumerate((bodies[:30], bodies[30:])):
        path = tmp_path / "in" / f"0000{i}_train.ds"
        path.write_bytes(np.concatenate(part).astype("<u4").tobytes())
        ends = np.cumsum([len(body) for body in part]).astype("<u8")
        path.with_name(f"{path.name}.index").write_bytes(ends.tobytes())
    corpus = Corpus.open(adopt(tmp_path / "in", tmp_path / "out", None, None), "train")
    assert np.array_equal(stream_of(corpus), np.concatenate(bodies))
    assert np.concatenate(list(document_lengths(corpus))).tolist() == [len(body) for body in bodies]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="do not fit together"):
        adopt(tmp_path / "in", tmp_path / "other", None, None)


def test_an_export_is_what_the_original_reader_expects_and_comes_back(tmp_path, tokenizer):
    train, validation = documents(300), documents(30, seed=5)
    put_litdata(tmp_path / "in" / "train", train, 70, "no_header_tensor:16", "<i4")
    put_litdata(tmp_path / "in" / "val", validation, 70, "no_header_tensor:16", "<i4")
    adopt(tmp_path / "in", tmp_path / "corpus", tokenizer, None)
    corpora = [Corpus.open(tmp_path / "corpus", split) for split in ("train", "validation")]
    out = tmp_path / "official"
    written = export_official(corpora, out, {"train": 33 * 16, "validation": 65 * 4})
    for prefix, chunk, bodies in (("train_slim", 33 * 16, train), ("validation", 65 * 4, validation)):
        stream = np.concatenate(bodies)
        paths = sorted(out.glob(f"{prefix}*"))
        assert len(paths) == -(-len(stream) // chunk)
        for i, path in enumerate(paths):  # the format by its definition
            data = path.read_bytes()
            header = b"LITPKDS" + struct.pack("<QBQ", 1, 8, chunk)
            assert path.name == f"{prefix}_{i:010d}.bin" and data[:24] == header and len(data) == 24 + 2 * chunk
            here = stream[i * chunk : (i + 1) * chunk]
            expected = np.append(here, np.full(chunk - len(here), 2))
            assert np.array_equal(np.frombuffer(data, "<u2", offset=24), expected)
    assert written == {"train": len(sorted(out.glob("train_slim*"))), "validation": len(sorted(out.glob("valid*")))}

    whole = content(out)
    (out / "train_slim_0000000001.bin").unlink()
    (out / "train_slim_0000000002.bin.99.tmp").write_bytes(b"half")
    export_official(corpora, out, {"train": 33 * 16, "validation": 65 * 4})
    assert content(out) == whole
    with pytest.raises(UserError, match="already holds other files"):
        export_official(corpora, out, {"train": 33 * 8, "validation": 65 * 4})

    adopt(out, None, Tokenizer(out / "tokenizer"), None)
    assert np.array_equal(stream_of(Corpus.open(out, "train")), np.concatenate(train))
