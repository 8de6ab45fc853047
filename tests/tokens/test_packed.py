"""Documents, mixtures and changes of data, through the training data of packed folders."""

import json
import os
import socket

import fsspec
import numpy as np
import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.tokens import shards
from lit_gpt.tokens.batch import segment_offsets
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.packed import TrainData, ValidationData, parse_mixture
from lit_gpt.tokens.shards import Shard, write_shard
from lit_gpt.tokens.storage import copy_folder, location, open_file

LENGTH = 16
UINT16 = np.dtype(np.uint16)


def documents_of(rng, count, longest=40):
    """Documents as an `eos` corpus has them: 1 to `longest` - 1 ordinary ids, then 2."""
    return [np.append(rng.integers(3, 500, rng.integers(1, longest)), 2) for _ in range(count)]


def write_corpus(folder, documents, splits=3, indices=True, split="train"):
    """A bare folder of `splits` shards, with indices or without."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(len(documents)), splits)):
        path = folder / f"{split}_{i}.bin"
        write_shard(path, [documents[n] for n in part], UINT16)
        if not indices:
            path.with_suffix(".idx").unlink()
    return folder


def boundaries(documents):
    """Every place where a document starts."""
    return set(np.cumsum([0, *map(len, documents)])[:-1].tolist())


def expected_offsets(starts, places, length):
    """cu_seqlens by definition: row starts and the documents that begin inside, as a set."""
    offsets = set()
    for row, place in enumerate(places):
        offsets |= {row * length} | {row * length + s - place for s in starts if place < s < place + length}
    return [*sorted(offsets), len(places) * length]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Folders a, b, c of 300, 200 and 100 documents, and their streams."""
    root, rng = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    documents = {name: documents_of(rng, count) for name, count in (("a", 300), ("b", 200), ("c", 100))}
    return {name: (write_corpus(root / name, docs), np.concatenate(docs), docs) for name, docs in documents.items()}


def places_of(data, first, count):
    """(corpus, first token) of each sequence."""
    return [(corpus.folder.name, start) for corpus, start in data._places(np.arange(first, first + count))]


# documents


@pytest.mark.parametrize("indices", [True, False])
def test_boundaries_are_those_of_the_documents(tmp_path, indices):
    documents = documents_of(np.random.default_rng(1), 200)
    data = TrainData(write_corpus(tmp_path / "x", documents, 4, indices), LENGTH, seed=5)
    starts = boundaries(documents)
    for first in range(0, 200, 8):
        cu_seqlens = data.batch(first, 8).cu_seqlens
        places = [start for _, start in places_of(data, first, 8)]
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.unique().tolist() == expected_offsets(starts, places, LENGTH)
        assert (cu_seqlens.diff() >= 0).all() and cu_seqlens[-1] == 8 * LENGTH


def test_boundaries_of_a_folder_that_separates_with_bos(tmp_path):
    documents = [np.append(1, d[:-1]) for d in documents_of(np.random.default_rng(1), 100)]
    data = TrainData(write_corpus(tmp_path / "x", documents, indices=False), LENGTH, seed=5)
    places = [start for _, start in places_of(data, 0, 50)]
    assert data.batch(0, 50).cu_seqlens.unique().tolist() == expected_offsets(boundaries(documents), places, LENGTH)


def test_prepared_corpora_know_their_documents(tiny_corpus):
    data, validation = TrainData(tiny_corpus, 64, seed=0), ValidationData(tiny_corpus, 128)
    stream = data.corpus.read(0, data.corpus.num_tokens)
    starts = set(np.flatnonzero(stream == 1).tolist())  # every document begins with BOS
    places = [start for _, start in places_of(data, 0, 100)]
    assert data.batch(0, 100).cu_seqlens.unique().tolist() == expected_offsets(starts, places, 64)
    block = validation.batch(0)
    starts = set(np.flatnonzero(validation.block(0)[:-1] == 1).tolist())
    assert torch.equal(block.tokens[0], validation.block(0))
    assert block.cu_seqlens.unique().tolist() == expected_offsets(starts, [0], 128)
    assert ValidationData(tiny_corpus, 128, document_reset=False).batch(0).cu_seqlens is None
    assert TrainData(tiny_corpus, 64, seed=0, document_reset=False).batch(0, 2).cu_seqlens is None


def test_the_size_of_the_offsets_is_fixed_until_they_do_not_fit():
    few = segment_offsets([np.array([5]), np.array([], dtype=np.int64)], 256)
    assert few.tolist() == [0, 5, 256] + [512] * (len(few) - 3)
    assert len(segment_offsets([np.array([1, 2, 3]), np.array([9])], 256)) == len(few)
    crowded = segment_offsets([np.arange(1, 256)] * 2, 256)
    assert crowded.unique().tolist() == list(range(513)) and (len(crowded) - 1) % (len(few) - 1) == 0


@pytest.mark.parametrize("kind", ["even", "short then long", "long then short", "one giant", "empty ones"])
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 5000])
def test_an_index_is_searched_page_by_page(tmp_path, kind, count, monkeypatch):
    rng = np.random.default_rng(count)
    lengths = {
        "even": rng.integers(1, 20, count),
        "short then long": np.where(np.arange(count) < count * 0.9, 1, 2000),
        "long then short": np.where(np.arange(count) < count * 0.1, 2000, 1),
        "one giant": np.where(np.arange(count) == count // 3, 10**6, 1),
        "empty ones": rng.integers(0, 3, count) * 7,
    }[kind]
    lengths[-1] += 1
    ends = np.cumsum(lengths)
    (tmp_path / "x.idx").write_bytes(ends.astype("<u8").tobytes())
    shard = Shard(tmp_path / "x.bin", UINT16, int(ends[-1]), count)
    pages = []
    original = Shard._index_page
    monkeypatch.setattr(Shard, "_index_page", lambda *args: pages.append(args) or original(*args))
    index = open_file(tmp_path / "x.idx")
    for start in [
        0,
        1,
        *rng.integers(0, ends[-1], 40).tolist(),
        int(ends[-1]) - 1,
        *(ends[:: count // 5 + 1]).tolist(),
    ]:
        for stop in (start + 1, start + 100, int(ends[-1])):
            pages.clear()
            found = shard.document_ends(index, start, stop)
            assert found.tolist() == ends[(ends > start) & (ends < stop)].tolist()
            assert len(pages) <= 4 + 12 + 2 + len(found) // shards.INDEX_PAGE


def test_a_damaged_index_is_refused_by_name(tmp_path):
    folder = write_corpus(tmp_path / "x", documents_of(np.random.default_rng(1), 200), 1)
    index = folder / "train_0.idx"
    intact = index.read_bytes()
    index.write_bytes(intact[:-3])
    with pytest.raises(UserError, match=r"train_0\.idx is truncated"):
        Corpus.open(folder, "train")
    ends = np.frombuffer(intact, "<u8").copy()
    ends[100] ^= 1 << 40
    index.write_bytes(ends.tobytes())
    with pytest.raises(UserError, match=r"train_0\.idx does not ascend"):
        TrainData(folder, LENGTH, seed=0).batch(0, 100)
    index.write_bytes(intact)
    data = TrainData(folder, LENGTH, seed=0)
    index.write_bytes(intact[:80])
    with pytest.raises(UserError, match=r"train_0\.idx became shorter"):
        data.batch(0, 100)


# mixtures


def test_folders_and_weights_are_read_off_the_flag(tmp_path):
    assert parse_mixture("a=0.7, b/c=0.3") == {"a": 0.7, "b/c": 0.3}
    assert parse_mixture("some/folder") == {"some/folder": 1.0}
    (tmp_path / "odd=1,name").mkdir()
    assert parse_mixture(tmp_path / "odd=1,name") == {str(tmp_path / "odd=1,name"): 1.0}
    for text, message in (("a=1,b", "b has no weight"), ("a=1,a=2", "a is named twice"), ("a=x", "no number")):
        with pytest.raises(UserError, match=message):
            parse_mixture(text)
    with pytest.raises(UserError, match="several folders need weights"):
        parse_mixture("a,b")


def mixed(corpora, length=LENGTH, **weights):
    return TrainData(",".join(f"{corpora[name][0]}={w}" for name, w in weights.items()), length, seed=7)


def test_a_mixture_takes_from_each_corpus_in_its_own_order(corpora):
    data = mixed(corpora, a=0.7, b=0.3)
    alone = {name: TrainData(corpora[name][0], LENGTH, seed=7) for name in "ab"}
    places = places_of(data, 0, 3000)
    assert abs(sum(name == "a" for name, _ in places) / 3000 - 0.7) < 0.03
    for name in "ab":
        own = [place for place in places if place[0] == name]
        assert own == places_of(alone[name], 0, len(own))
    for (name, start), row in zip(places[:50], data.batch(0, 50).tokens):
        assert np.array_equal(row, corpora[name][1][start : start + LENGTH + 1])
    shares = {corpus.folder.name: (share, epochs) for corpus, share, epochs in data.corpus_epochs(3000)}
    expected = sum(name == "b" for name, _ in places) / ((len(corpora["b"][1]) - 1) // LENGTH)
    assert abs(shares["a"][0] - 0.7) < 1e-4 and shares["b"][1] == expected
    assert data.epochs(3000) == max(epochs for _, epochs in shares.values())


def test_the_order_in_which_folders_are_named_means_nothing(corpora):
    one, other = mixed(corpora, a=0.7, b=0.3), mixed(corpora, b=3, a=7)
    assert one.fingerprint == other.fingerprint and places_of(one, 0, 100) == places_of(other, 0, 100)
    assert one.fingerprint != mixed(corpora, a=0.6, b=0.4).fingerprint
    assert json.loads(json.dumps(one.fingerprint)) == one.fingerprint
    with pytest.raises(UserError, match="named twice"):
        TrainData(f"{corpora['a'][0]}=1,{corpora['a'][0]}/=1", LENGTH, seed=7)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 16])
def test_global_batches_are_the_same_on_any_ranks_from_any_place(corpora, world_size, micro_batch):
    data, global_batch = mixed(corpora, a=0.6, b=0.25, c=0.15), 128
    consumed = int(np.random.default_rng().integers(0, 100_000))
    expected = data.batch(consumed, 2 * global_batch)
    rounds = 2 * global_batch // (world_size * micro_batch)
    rows, starts = [], []
    ranks = [
        data.micro_batches(consumed, global_batch, micro_batch, r, world_size, False, False) for r in range(world_size)
    ]
    for _ in range(rounds):
        for batch in map(next, ranks):
            offset = len(rows) * LENGTH
            starts += (batch.cu_seqlens.unique()[:-1] + offset).tolist()
            rows += batch.tokens.tolist()
    assert rows == expected.tokens.tolist(), consumed
    assert starts == expected.cu_seqlens.unique()[:-1].tolist(), consumed


def gather_steps(rank, world_size, folders, places, port, out):
    """One of the gloo processes: what all ranks together load at each place, written by rank 0."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    data, steps = TrainData(folders, LENGTH, seed=7), []
    for consumed, micro_batch in places:
        batches = data.micro_batches(consumed, 32, micro_batch, rank, world_size, prefetch=True, pin_memory=False)
        for _ in range(32 // (world_size * micro_batch)):
            parts = [torch.empty(micro_batch, LENGTH + 1, dtype=torch.int64) for _ in range(world_size)]
            torch.distributed.all_gather(parts, next(batches).tokens)
            steps += parts
        batches.close()
    if rank == 0:
        torch.save(torch.cat(steps), out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_load_the_same_global_batches(corpora, tmp_path):
    folders = f"{corpora['a'][0]}=0.6,{corpora['b'][0]}=0.4"
    rng = np.random.default_rng()
    places = [(int(rng.integers(0, 100_000)), int(rng.choice([1, 2, 4, 8, 16]))) for _ in range(200)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(gather_steps, (2, folders, places, port, tmp_path / "steps.pt"), nprocs=2)
    data = TrainData(folders, LENGTH, seed=7)
    for step, (consumed, micro_batch) in zip(torch.load(tmp_path / "steps.pt").split(32), places, strict=True):
        assert torch.equal(step, data.batch(consumed, 32).tokens), (consumed, micro_batch)


# changes at a resume


def resumed(data, old, consumed):
    """`data` going on where `old` was after `consumed` sequences, through JSON as in a checkpoint."""
    data.load_state(json.loads(json.dumps(old.state(consumed))))
    return data


def test_a_resume_without_a_change_changes_nothing(corpora):
    data = resumed(mixed(corpora, a=0.7, b=0.3), mixed(corpora, a=0.7, b=0.3), 777)
    assert len(data.phases) == 1 and places_of(data, 0, 2000) == places_of(mixed(corpora, a=0.7, b=0.3), 0, 2000)


def test_new_weights_go_on_where_each_corpus_was(corpora):
    first = mixed(corpora, a=0.7, b=0.3)
    second = resumed(mixed(corpora, a=0.2, b=0.3, c=0.5), first, 900)
    third = resumed(mixed(corpora, b=1), second, 1500)
    last = resumed(mixed(corpora, a=0.5, b=0.5), third, 1600)
    places = [*places_of(first, 0, 900), *places_of(second, 900, 600), *places_of(third, 1500, 100)]
    places += places_of(last, 1600, 1000)
    for name in "abc":
        own = [place for place in places if place[0] == name]
        assert own == places_of(TrainData(corpora[name][0], LENGTH, seed=7), 0, len(own))
    window = places_of(second, 900, 600)
    assert abs(sum(name == "c" for name, _ in window) / 600 - 0.5) < 0.08
    with pytest.raises(ValueError, match="earlier phase"):
        second.batch(899, 1)
    assert [phase.start for phase in last.phases] == [0, 900, 1500, 1600]


@pytest.mark.parametrize("lengths", [(16, 8, 32, 64, 4), (64, 16), (8, 64)])
def test_lengths_that_fill_the_unit_repeat_nothing_and_leave_nothing_out(corpora, lengths):
    folder, stream, _ = corpora["a"]
    unit, old, consumed = 64, None, 0
    epoch = (len(stream) - 1) // unit * unit
    covered, turn = np.zeros(epoch, dtype=int), 0
    while covered.sum() < epoch:
        length = lengths[turn % len(lengths)]
        data = TrainData(folder, length, seed=7, shuffle_unit=unit)
        if old:
            resumed(data, old, consumed)
        count = min((1 + turn) * unit, epoch - covered.sum()) // length  # whole units at a time
        for _, start in places_of(data, consumed, count):
            covered[start : start + length] += 1
        consumed, old, turn = consumed + count, data, turn + 1
    assert (covered == 1).all() and turn > 5
    assert data.epochs(consumed) == 1.0


def test_a_change_in_the_middle_of_a_longer_sequence_repeats_nothing(corpora):
    folder, _, _ = corpora["a"]
    first = TrainData(folder, 16, seed=7, shuffle_unit=64)
    second = resumed(TrainData(folder, 64, seed=7, shuffle_unit=64), first, 9)  # two units and a quarter
    seen = {start // 64 for _, start in places_of(first, 0, 9)}
    rest = [start // 64 for _, start in places_of(second, 9, second._samplers[0].num_units - 3)]
    assert len(seen) == 3 and not seen & set(rest) and len(set(rest)) == len(rest)


def test_a_shorter_length_finishes_the_epoch_that_was_begun(corpora):
    folder, stream, _ = corpora["a"]
    first = TrainData(folder, 32, seed=7)
    second = resumed(TrainData(folder, 16, seed=7), first, 40)
    sequences = (len(stream) - 1) // 32
    begun = [start for _, start in places_of(first, 0, 40)]
    rest = [start for _, start in places_of(second, 40, 2 * (sequences - 40))]
    assert sorted([*begun, *(start + 16 for start in begun), *rest]) == list(range(0, sequences * 32, 16))
    again = resumed(TrainData(folder, 16, seed=7), second, 60)
    assert len(again.phases) == 2 and places_of(again, 60, 50) == places_of(second, 60, 50)


def test_a_unit_of_no_whole_number_of_sequences_is_refused(corpora):
    with pytest.raises(UserError, match="shuffle unit 40 is no multiple of the sequence length 16"):
        TrainData(corpora["a"][0], 16, seed=7, shuffle_unit=40)


# behind URLs


@pytest.fixture
def in_memory(corpora):
    """Corpora a and b as memory:// folders."""
    fs = fsspec.filesystem("memory")
    for name in "ab":
        for path in corpora[name][0].iterdir():
            fs.pipe_file(f"/bucket/{name}/{path.name}", path.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def test_a_corpus_behind_a_url_is_the_same_corpus(corpora, in_memory):
    local, remote = mixed(corpora, a=0.7, b=0.3), TrainData(f"{in_memory}/a=0.7,{in_memory}/b=0.3", LENGTH, seed=7)
    assert remote.fingerprint == local.fingerprint
    ours, theirs = local.batch(1000, 64), remote.batch(1000, 64)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
    batches = remote.micro_batches(0, 16, 8, 0, 1, prefetch=True, pin_memory=False)
    assert torch.equal(next(batches).tokens, local.batch(0, 8).tokens)
    batches.close()


def test_a_prepared_corpus_behind_a_url(tiny_corpus, tmp_path):
    fs = fsspec.filesystem("memory")
    for path in tiny_corpus.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/prepared/{path.relative_to(tiny_corpus)}", path.read_bytes())
    local, remote = TrainData(tiny_corpus, 64, seed=0), TrainData("memory://prepared", 64, seed=0)
    assert torch.equal(local.batch(3, 20).tokens, remote.batch(3, 20).tokens)
    assert torch.equal(local.batch(3, 20).cu_seqlens, remote.batch(3, 20).cu_seqlens)
    remote.corpus.verify()
    assert torch.equal(ValidationData("memory://prepared", 64).block(0), ValidationData(tiny_corpus, 64).block(0))
    copy_folder(remote.corpus.folder / "tokenizer", tmp_path / "tokenizer")
    assert {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()} == {
        p.name: p.read_bytes() for p in (tiny_corpus / "tokenizer").iterdir()
    }
    shard = next(path for path in fs.ls("/prepared", detail=False) if "train" in path and path.endswith(".bin"))
    content = fs.cat_file(shard)
    fs.pipe_file(shard, content[:-1])
    with pytest.raises(UserError, match=r"train.*\.bin is truncated"):
        Corpus.open("memory://prepared", "train")
    flipped = bytearray(content)
    flipped[-1] ^= 1
    fs.pipe_file(shard, bytes(flipped))
    with pytest.raises(UserError, match="SHA-256"):
        Corpus.open("memory://prepared", "train").verify()
    fs.rm("/prepared", recursive=True)


def test_a_request_that_fails_names_the_file(in_memory, monkeypatch):
    data = TrainData(f"{in_memory}/a", LENGTH, seed=7)
    monkeypatch.setattr(data.corpus.folder.fs, "cat_file", lambda *args, **options: 1 / 0)
    with pytest.raises(UserError, match=r"memory://.*train_\d\.(bin|idx) cannot be read: ZeroDivisionError"):
        data.batch(0, 8)


def test_urls_that_lead_nowhere_end_in_one_line():
    with pytest.raises(UserError, match="does not exist"):
        Corpus.open("memory://nothing/here", "train")
    with pytest.raises(UserError, match="nosuch"):
        location("nosuch://bucket/a")


def test_each_corpus_says_how_often_it_is_seen(tiny_corpus, tmp_path):
    for path in tiny_corpus.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = TrainData(f"{tiny_corpus}=0.9,{tmp_path}=0.1", 32, seed=0)
    sequences = (data.corpus.num_tokens - 1) // 32
    large, small = sorted(data.describe(5 * sequences), key=lambda line: "10.00%" in line)
    assert f"90.00% from {tiny_corpus}: {data.corpus.num_tokens:,} tokens" in large and "more than 4" in large
    assert f"10.00% from {tmp_path}" in small and "more than" not in small
    epochs = [float(line.split("sees ")[1].split()[0]) for line in (large, small)]
    assert epochs == pytest.approx([4.5, 0.5], abs=0.05)


@pytest.mark.parametrize("epochs, warned", [(4, False), (4.1, True)])
def test_many_epochs_are_warned_of(tiny_corpus, epochs, warned):
    data = TrainData(tiny_corpus, 32, seed=0)
    consumed = int(epochs * ((data.corpus.num_tokens - 1) // 32))
    (line,) = data.describe(consumed)
    assert ("more than 4" in line) == warned and f"{epochs:.2f} epochs" in line
