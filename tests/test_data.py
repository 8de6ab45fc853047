import json
import shutil
import threading

import numpy as np
import pytest
import torch

from data import (
    DataArgs,
    TrainData,
    ValidationData,
    check_same_tokenizer,
    check_vocabulary,
    open_train,
    open_validation,
)
from lit_gpt.errors import UserError
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.prefetch import PREFETCHED
from lit_gpt.tokens.shards import write_shard

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bare folder: 1,000 training tokens in 3 shards (so 62 sequences of 16), 100 validation tokens in 2."""
    folder = tmp_path_factory.mktemp("tokens")
    stream = np.random.default_rng(0).integers(3, 500, 1100)
    for name, begin, end in (("train_a_0", 0, 500), ("train_a_1", 500, 530), ("train_b_0", 530, 1000)):
        write_shard(folder / f"{name}.bin", [stream[begin:end]], np.dtype(np.uint16))
    for name, begin, end in (("validation_0", 1000, 1010), ("validation_1", 1010, 1100)):
        write_shard(folder / f"{name}.bin", [stream[begin:end]], np.dtype(np.uint16))
    np.save(folder / "stream.npy", stream)
    return folder


@pytest.fixture
def train(folder):
    return TrainData(folder, LENGTH, seed=7)


def step_of(train, consumed, global_batch, micro_batch, world_size, prefetch, steps=1):
    """`steps` global batches, put together from what every rank loads: int64 [steps, global_batch, LENGTH + 1]."""
    micro_steps = global_batch // (world_size * micro_batch)
    ranks = [
        train.micro_batches(consumed, global_batch, micro_batch, rank, world_size, prefetch, pin_memory=False)
        for rank in range(world_size)
    ]
    batches = [
        torch.cat([torch.cat([next(rank).tokens for rank in ranks]) for _ in range(micro_steps)]) for _ in range(steps)
    ]
    for rank in ranks:
        rank.close()
    return torch.stack(batches)


def test_a_sequence_is_the_tokens_at_its_place(train, folder):
    stream = np.load(folder / "stream.npy")[:1000]
    assert train.epochs(62) == 1
    batch = train.batch(0, 62).tokens
    assert batch.shape == (62, LENGTH + 1) and batch.dtype == torch.int64
    rows = {tuple(row) for row in batch.tolist()}
    assert rows == {tuple(stream[i : i + LENGTH + 1].tolist()) for i in range(0, 62 * LENGTH, LENGTH)}
    assert len(rows) == 62


def test_a_batch_may_span_epochs(train):
    across = train.batch(58, 10).tokens
    assert torch.equal(across, torch.cat([train.batch(58, 4).tokens, train.batch(62, 6).tokens]))
    first, second = train.batch(0, 62).tokens, train.batch(62, 62).tokens
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert train.epochs(31) == 0.5 and train.epochs(124) == 2.0


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_ranks_and_micro_batches_do_not_change_what_a_step_holds(train, world_size, micro_batch, prefetch):
    steps = step_of(train, 50, 32, micro_batch, world_size, prefetch, steps=2)
    for step, consumed in zip(steps, (50, 82)):
        assert torch.equal(step, train.batch(consumed, 32).tokens)


def test_resuming_on_other_ranks_continues_exactly(train):
    whole = step_of(train, 0, 32, 4, 2, prefetch=True, steps=4)
    resumed = step_of(train, 64, 32, 2, 8, prefetch=True, steps=2)
    assert torch.equal(whole[2:], resumed)


def test_a_batch_that_does_not_split_is_refused_before_any_loading(train):
    with pytest.raises(UserError, match="32 sequences does not split into 3 ranks x micro-batch 4"):
        train.micro_batches(0, 32, 4, 0, 3, prefetch=True, pin_memory=False)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_prefetch_thread_is_bounded_and_ends_with_its_iterator(train, monkeypatch):
    loaded = []
    original = train._load
    monkeypatch.setattr(train, "_load", lambda places: loaded.append(places) or original(places))
    batches = train.micro_batches(0, 4, 4, 0, 1, prefetch=True, pin_memory=False)
    for _ in range(3):
        next(batches)
    (thread,) = prefetch_threads()
    thread.join(0.3)
    assert thread.is_alive() and 3 <= len(loaded) <= 3 + PREFETCHED + 2
    batches.close()
    assert not prefetch_threads()


def test_an_iterator_that_is_dropped_ends_its_thread(train):
    batches = train.micro_batches(0, 4, 4, 0, 1, prefetch=True, pin_memory=False)
    next(batches)
    assert prefetch_threads()
    del batches
    assert not prefetch_threads()


def test_errors_in_the_prefetch_thread_surface(train, monkeypatch):
    original, loaded = train._load, []

    def failing(places):
        loaded.append(places)
        if len(loaded) > 2:
            raise UserError("shard x.bin became shorter")
        return original(places)

    monkeypatch.setattr(train, "_load", failing)
    batches = train.micro_batches(0, 4, 4, 0, 1, prefetch=True, pin_memory=False)
    for first in (0, 4):
        expected = original(train._places(np.arange(first, first + 4))).tokens
        assert torch.equal(next(batches).tokens, expected)
    with pytest.raises(UserError, match=r"x\.bin"):
        next(batches)
    assert not prefetch_threads()


def test_the_fingerprint_is_json_and_changes_with_what_matters(train, folder):
    fingerprint = train.fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert TrainData(folder, LENGTH, seed=7).fingerprint == fingerprint
    assert TrainData(folder, LENGTH, seed=8).fingerprint != fingerprint
    assert TrainData(folder, LENGTH + 1, seed=7).fingerprint != fingerprint


def test_validation_blocks_follow_each_other(folder):
    stream = np.load(folder / "stream.npy")[1000:]
    validation = ValidationData(folder, 33)
    assert validation.num_blocks == 3
    for i in range(3):
        assert validation.block(i).dtype == torch.int64
        assert validation.block(i).tolist() == stream[33 * i : 33 * i + 34].tolist()
    for i in (-1, 3):
        with pytest.raises(IndexError):
            validation.block(i)


def test_too_little_data_is_refused_with_the_number_of_tokens(folder):
    with pytest.raises(UserError, match="1000 tokens are too few for one sequence of 1000"):
        TrainData(folder, 1000, seed=0)
    with pytest.raises(UserError, match="100 validation tokens are too few for one block of 100"):
        ValidationData(folder, 100)
    TrainData(folder, 999, seed=0)
    ValidationData(folder, 99)


def test_the_door_opens_what_the_flags_name(folder, tmp_path):
    args = DataArgs(train_data_dir=str(folder), document_reset=False)
    train = open_train(args, LENGTH, seed=7)
    assert torch.equal(train.batch(3, 5).tokens, TrainData(folder, LENGTH, seed=7).batch(3, 5).tokens)
    assert train.batch(0, 1).cu_seqlens is None
    validation = open_validation(args, 33, train)
    assert validation.num_blocks == 3 and validation.batch(0).cu_seqlens is None
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("validation*"))
    bare = DataArgs(train_data_dir=str(tmp_path / "bare"))
    assert open_validation(bare, 33, open_train(bare, LENGTH, seed=7)) is None
    elsewhere = DataArgs(train_data_dir=str(tmp_path / "bare"), val_data_dir=str(folder))
    assert open_validation(elsewhere, 33, open_train(elsewhere, LENGTH, seed=7)).batch(2).cu_seqlens is not None
    with pytest.raises(UserError, match="no training data: give --train_data_dir"):
        open_train(DataArgs(), LENGTH, seed=7)


def test_ids_beyond_the_model_are_refused(folder):
    corpus = Corpus.open(folder, "train")
    largest = int(corpus.read(0, 1000).max())
    check_vocabulary(corpus, largest + 1)
    with pytest.raises(UserError, match=f"token id {largest}"):
        check_vocabulary(corpus, largest)


def test_the_manifest_decides_vocabulary_and_tokenizer(folder):
    train, val = TrainData(folder, LENGTH, seed=0), ValidationData(folder, LENGTH)
    check_same_tokenizer(train, val)
    train.corpus.vocab_size = 600
    check_vocabulary(train.corpus, 600)
    with pytest.raises(UserError, match="vocabulary of 600 ids, the model has 599"):
        check_vocabulary(train.corpus, 599)
    train.corpus.tokenizer_sha256, val.corpus.tokenizer_sha256 = "a" * 64, "a" * 64
    check_same_tokenizer(train, val)
    val.corpus.tokenizer_sha256 = "b" * 64
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokenizer(train, val)


def test_negative_ids_are_refused(tmp_path):
    write_shard(tmp_path / "train_0.bin", [[5, -3, 5]], np.dtype(np.int32))
    with pytest.raises(UserError, match="token id -3"):
        check_vocabulary(Corpus.open(tmp_path, "train"), 100)
