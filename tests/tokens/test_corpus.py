import struct

import numpy as np
import pytest

from lit_gpt.errors import UserError
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.shards import Shard, ShardWriter, dtype_for, write_shard

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def put_official(path, tokens):
    """A LITPKDS file by the format's definition alone, sharing nothing with the code under test."""
    header = b"LITPKDS" + struct.pack("<Q", 1) + bytes([CODES[tokens.dtype.name]]) + struct.pack("<Q", len(tokens))
    path.write_bytes(header + tokens.astype(tokens.dtype.newbyteorder("<")).tobytes())


@pytest.fixture
def official(tmp_path):
    """Three files of unequal length and what they hold."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(3, 32000, n).astype(np.uint16) for n in (1000, 1, 257)]
    for i, tokens in enumerate(arrays):
        put_official(tmp_path / f"train_slim_{i:010d}.bin", tokens)
    return tmp_path, np.concatenate(arrays).astype(np.int64)


@pytest.mark.parametrize("dtype", CODES)
def test_a_shard_of_each_integer_type_reads_back_through_numpy(tmp_path, dtype):
    documents = [np.array([5, 6, 7], dtype), np.array([100], dtype)]
    write_shard(tmp_path / "a.bin", documents, np.dtype(dtype))
    assert np.fromfile(tmp_path / "a.bin", np.dtype(dtype).newbyteorder("<"), offset=24).tolist() == [5, 6, 7, 100]
    assert np.fromfile(tmp_path / "a.idx", "<u8").tolist() == [3, 4]
    put_official(tmp_path / "b.bin", np.concatenate(documents))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert Shard.open(tmp_path / "a.bin").num_tokens == 4


def test_no_shard_appears_before_it_is_complete(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.dtype(np.uint16))
    writer.append([1, 2])
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    writer.abandon()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OverflowError):
        write_shard(tmp_path / "a.bin", [[70000]], np.dtype(np.uint16))
    assert not list(tmp_path.iterdir())


def test_dtype_follows_the_vocabulary():
    assert dtype_for(32000) == np.uint16 and dtype_for(65499) == np.uint16 and dtype_for(65500) == np.int32


def test_an_official_folder_reads_as_one_stream(official):
    folder, stream = official
    corpus = Corpus.open(folder, "train")
    assert corpus.num_tokens == len(stream)
    assert corpus.vocab_size is None and corpus.tokenizer_sha256 is None and corpus.document_format is None
    for start in range(0, len(stream), 7):
        for count in (0, 1, 13, 300):
            count = min(count, len(stream) - start)
            read = corpus.read(start, count)
            assert read.dtype == np.int64 and np.array_equal(read, stream[start : start + count])
    for start, count in ((-1, 2), (0, len(stream) + 1), (len(stream), 1)):
        with pytest.raises(ValueError):
            corpus.read(start, count)


def test_files_beyond_the_open_file_limit_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.tokens.corpus.OPEN_FILES", 2)
    for i in range(9):
        put_official(tmp_path / f"train_{i}.bin", np.full(3, i + 10, np.uint16))
    corpus = Corpus.open(tmp_path, "train")
    for _ in range(2):
        assert corpus.read(0, 27).tolist() == np.repeat(np.arange(10, 19), 3).tolist()


@pytest.mark.parametrize("separator", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2, 4095, 4096, 10_000])
def test_padding_is_stripped_to_one_separator(tmp_path, separator, padding):
    text = np.arange(3, 50, dtype=np.uint16)
    put_official(tmp_path / "validation_0.bin", np.append(text, np.full(padding, separator, np.uint16)))
    expected = text.tolist() + [separator] * min(padding, 1)
    corpus = Corpus.open(tmp_path, "validation")
    assert corpus.read(0, corpus.num_tokens).tolist() == expected


def test_a_run_of_ordinary_tokens_is_not_padding(tmp_path):
    put_official(tmp_path / "train_0.bin", np.full(50, 13, np.uint16))
    assert Corpus.open(tmp_path, "train").num_tokens == 50


def test_the_fingerprint_follows_content_not_place(official, tmp_path_factory):
    folder, _ = official
    before = Corpus.open(folder, "train").fingerprint
    copy = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert Corpus.open(copy, "train").fingerprint == before
    put_official(copy / "train_slim_0000000001.bin", np.array([9], np.uint16))
    assert Corpus.open(copy, "train").fingerprint != before


BROKEN = "train_slim_0000000001.bin"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data[:10], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data + b"\0", "bytes too many"),
        (lambda data: b"M" + data[1:], "no token shard"),
        (lambda data: data[:7] + b"\2" + data[8:], "format version 2"),
        (lambda data: data[:15] + b"\6" + data[16:], "dtype code 6"),
        (lambda data: data[:16] + b"\2" + data[17:], "truncated"),
        (lambda data: data[:15] + b"\3" + data[16:], "holds int16, but train_slim_0000000000.bin holds uint16"),
    ],
)
def test_a_damaged_file_is_refused_by_name(official, damage, message):
    folder, _ = official
    (folder / BROKEN).write_bytes(damage((folder / BROKEN).read_bytes()))
    with pytest.raises(UserError) as error:
        Corpus.open(folder, "train")
    assert BROKEN in str(error.value) and message in str(error.value)


def test_every_flipped_bit_of_a_header_is_noticed(official):
    folder, _ = official
    intact = (folder / BROKEN).read_bytes()
    for bit in range(24 * 8):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / BROKEN).write_bytes(flipped)
        with pytest.raises(UserError, match=BROKEN):
            Corpus.open(folder, "train")


def test_a_file_cut_while_in_use_is_noticed(official):
    folder, _ = official
    corpus = Corpus.open(folder, "train")
    path = folder / "train_slim_0000000000.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=path.name):
        corpus.read(0, 500)


def test_a_file_that_vanishes_while_in_use_is_named(official):
    folder, _ = official
    corpus = Corpus.open(folder, "train")
    (folder / "train_slim_0000000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_slim_0000000000\.bin cannot be opened: No such file"):
        corpus.read(0, 500)


def test_folders_without_data_are_refused(tmp_path, official):
    with pytest.raises(UserError, match="does not exist"):
        Corpus.open(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no train shards"):
        Corpus.open(tmp_path / "empty", "train")
    with pytest.raises(UserError, match="no validation shards"):
        Corpus.open(official[0], "validation")
    with pytest.raises(UserError, match="no hashes"):
        Corpus.open(official[0], "train").verify()
    (tmp_path / "empty" / "prepare.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        Corpus.open(tmp_path / "empty", "train")
