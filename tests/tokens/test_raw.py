import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import train_tokenizer
from lit_gpt.tokens import raw, raw_source
from lit_gpt.tokens.raw import RawTrainData, RawValidationData
from lit_gpt.tokens.raw_source import RawSource

L, G = 32, 16
KINDS = ("parquet", "jsonl", "jsonl.zst", "text")


def make_texts(count=240):
    """Documents of 1 to 120 words, each with its number in front."""
    choose = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "\n\n", "épsilon", "</s>", "12", "(x + y)"]
    return [f"<{i}> " + " ".join(choose.choices(words, k=int(120 ** choose.random()))) for i in range(count)]


TEXTS = make_texts()


def write_source(folder, kind, texts=TEXTS):
    """`texts` in order, in 24 units of 10 (text: 240 of 1; jsonl: cut by bytes). Returns the folder."""
    folder.mkdir(parents=True)
    if kind == "parquet":
        for i in range(0, len(texts), 60):
            table = pa.table({"id": list(range(len(texts[i : i + 60]))), "text": texts[i : i + 60]})
            pq.write_table(table, folder / f"{i:04d}.parquet", row_group_size=10)
    elif kind == "text":
        for i, text in enumerate(texts):
            (folder / f"{i // 50}").mkdir(exist_ok=True)
            (folder / f"{i // 50}" / f"{i:04d}.txt").write_bytes(text.encode())
    else:
        size = 120 if kind == "jsonl" else 10
        for i in range(0, len(texts), size):
            lines = "\n".join(json.dumps({"text": text}) for text in texts[i : i + size]).encode()
            name = folder / f"{i:04d}.{kind}"
            name.write_bytes(lines if kind == "jsonl" else zstandard.compress(lines + b"\n"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    return {kind: write_source(root / kind, kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Ranges, parts and slices so small that every document meets their edges."""
    monkeypatch.setattr(raw_source, "RANGE_BYTES", 1500)
    monkeypatch.setattr(raw_source, "PART_BYTES", 100)
    monkeypatch.setattr(raw_source, "MIN_ROWS", 3)


def steps_of(sources, consumed, steps, micro_batch, prefetch=False, lose=0, global_batch=G):
    """Run `sources`, one for each rank, side by side: tokens [steps, G, L + 1] and the gathered state after them.

    `lose`: micro-batches that every rank takes beyond, as a run does that is killed later.
    """
    world_size = len(sources)
    ranks = [
        source.micro_batches(consumed, global_batch, micro_batch, rank, world_size, prefetch, pin_memory=False)
        for rank, source in enumerate(sources)
    ]
    batches = torch.empty(steps, global_batch, L + 1, dtype=torch.int64)
    for step in range(steps):
        for rank, taken in enumerate(ranks):
            rows = [next(taken).tokens for _ in range(global_batch // world_size // micro_batch)]
            batches[step, rank::world_size] = torch.cat(rows)
    state = gathered_state(sources, consumed + steps * global_batch)
    for taken in ranks:
        for _ in range(lose):
            next(taken)
        taken.close()
    return batches, state


def gathered_state(sources, consumed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "_gathered", lambda part: [source._reached[1] for source in sources])
        states = [source.state(consumed) for source in sources]
    assert all(state == states[0] for state in states)
    return json.loads(json.dumps(states[0]))


def lane_documents(batches, lanes, tokenizer):
    """What each lane's stream holds, by document, from the batches alone: the last, incomplete one left out."""
    streams = batches.reshape(-1, lanes, L + 1)
    for lane in range(lanes):
        blocks = streams[:, lane]
        assert torch.equal(blocks[1:, 0], blocks[:-1, -1])
        stream = blocks[:, :-1].flatten()
        starts = (stream == tokenizer.bos_id).nonzero().flatten().tolist()
        assert starts[0] == 0
        documents = []
        for start, end in itertools.pairwise(starts):
            assert stream[end - 1] == tokenizer.eos_id
            documents.append(tokenizer.decode(stream[start + 1 : end - 1].tolist()))
        yield documents


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_once_in_every_epoch(folders, tokenizer, kind):
    source = RawTrainData(folders[kind], tokenizer, L, seed=3, lanes=8)
    unit_of = {
        record.text: number
        for number, unit in enumerate(source.corpus.source.units)
        for record in source.corpus.source.records(unit)
    }
    assert list(unit_of) == TEXTS
    count = len(source.corpus.source.units)
    assert sorted(set(unit_of.values())) == list(range(count))
    batches, _ = steps_of([source], 0, 250, micro_batch=4)
    # Of the endless list, epoch e holds places e N ... (e + 1) N - 1, and lane v places v, v + 8, v + 16, ...
    epochs, orders = ([], []), ([], [])
    for lane, documents in enumerate(lane_documents(batches, 8, tokenizer)):
        place = lane
        by_unit = [(unit, list(group)) for unit, group in itertools.groupby(documents, unit_of.__getitem__)]
        for unit, group in by_unit[:-1]:  # the last one may not be complete
            if place < 2 * count:
                epochs[place // count].extend(group)
                orders[place // count].append((place, unit))
            place += 8
    assert sorted(epochs[0]) == sorted(TEXTS)
    assert sorted(epochs[1]) == sorted(TEXTS)
    first, second = ([unit for _, unit in sorted(order)] for order in orders[:2])
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_on_1_4_2_8_ranks_continue_exactly(folders, tokenizer, kind):
    """Each leg is killed some micro-batches after its checkpoint and goes on from it on other ranks."""

    def opened(count, state=None):
        sources = [RawTrainData(folders[kind], tokenizer, L, seed=5) for _ in range(count)]
        for source in sources:
            source.load_state(state or {})
        return sources

    undisturbed, _ = steps_of(opened(1), 0, 40, micro_batch=G)
    choose = random.Random(kind)
    for _ in range(3):
        state, done, legs = None, 0, []
        for world_size in (1, 4, 2, 8):
            steps = choose.randint(1, 10)
            micro_batch = choose.choice([n for n in (1, 2, 4, 8, 16) if G // world_size % n == 0])
            batches, state = steps_of(
                opened(world_size, state),
                done * G,
                steps,
                micro_batch,
                prefetch=choose.random() < 0.5,
                lose=choose.randint(0, 9),
            )
            legs.append(batches)
            done += steps
        assert torch.equal(torch.cat(legs), undisturbed[:done])


def test_the_order_of_units_is_frozen(folders, tokenizer):
    order = RawTrainData(folders["parquet"], tokenizer, L, seed=3).order
    assert [order.start(turn) for turn in (*range(8), 24, 25)] == [19, 4, 20, 16, 9, 13, 6, 3, 15, 22]


def test_the_sequence_length_may_change_at_a_resume(folders, tokenizer):
    first, state = steps_of([RawTrainData(folders["jsonl.zst"], tokenizer, L, seed=1, lanes=4)], 0, 6, G)
    resumed = RawTrainData(folders["jsonl.zst"], tokenizer, 5, seed=1)
    resumed.load_state(state)
    second = next(resumed.micro_batches(6 * G, 4 * 40, 4 * 40, 0, 1, prefetch=False, pin_memory=False)).tokens
    whole = steps_of([RawTrainData(folders["jsonl.zst"], tokenizer, L, seed=1, lanes=4)], 0, 10, G)[0]
    for lane in range(4):
        streams = [rows.reshape(-1, 4, rows.shape[-1])[:, lane, :-1].flatten() for rows in (first, second, whole)]
        joined = torch.cat(streams[:2])
        assert len(joined) == 24 * L + 40 * 5
        assert torch.equal(joined, streams[2][: len(joined)])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("prefetch", [False, True])
def test_micro_batches_and_ranks_do_not_change_a_step(folders, tokenizer, world_size, prefetch):
    def opened():
        return RawTrainData(folders["parquet"], tokenizer, L, seed=0, lanes=8)

    expected, state = steps_of([opened()], 0, 3, micro_batch=1)
    for micro_batch in (1, 2, 4, 8, 16):
        if G // world_size % micro_batch == 0:
            sources = [opened() for _ in range(world_size)]
            batches, reached = steps_of(sources, 0, 3, micro_batch, prefetch)
            assert torch.equal(batches, expected) and reached == state


def test_what_the_thread_read_ahead_is_not_counted(folders, tokenizer):
    source = RawTrainData(folders["jsonl"], tokenizer, L, seed=0, lanes=4)
    batches = source.micro_batches(0, 4, 2, 0, 1, prefetch=True, pin_memory=False)
    states = [source.state(0)]
    for step in range(1, 4):
        next(batches)
        assert source.state(4 * (step - 1)) == states[-1]  # half a step is no step
        next(batches)
        states.append(source.state(4 * step))
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "prefetch")
    thread.join(0.2)  # time to read all that it may
    assert source.state(12) == states[-1]
    batches.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    for step, state in enumerate(states):
        again = RawTrainData(folders["jsonl"], tokenizer, L, seed=0, lanes=4)
        assert steps_of([again], 0, step, 4, global_batch=4)[1]["lanes"] == state["lanes"]
    with pytest.raises(ValueError, match="at 12 sequences, not at 8"):
        source.state(8)


def without_padding(cu_seqlens):
    offsets = cu_seqlens.tolist()
    return offsets[: offsets.index(offsets[-1]) + 1]


def test_boundaries_are_where_documents_begin(folders, tokenizer):
    source = RawTrainData(folders["text"], tokenizer, L, seed=0, lanes=8)
    batches = source.micro_batches(0, 16, 4, 0, 1, prefetch=False, pin_memory=False)
    sizes = set()
    for batch in itertools.islice(batches, 250):
        inputs = batch.tokens[:, :-1].flatten()
        starts = (inputs == tokenizer.bos_id).nonzero().flatten().tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert without_padding(batch.cu_seqlens) == sorted({*starts, *range(0, 4 * L + 1, L)})
        sizes.add(len(batch.cu_seqlens))
    assert len(sizes) == 1
    plain = RawTrainData(folders["text"], tokenizer, L, seed=0, lanes=8, document_reset=False)
    batch = next(plain.micro_batches(0, 16, 4, 0, 1, prefetch=False, pin_memory=False))
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("document_format", ["eos", "bos"])
def test_document_formats(folders, tokenizer, document_format):
    source = RawTrainData(folders["text"], tokenizer, L, seed=0, lanes=8, document_format=document_format)
    tokens = steps_of([source], 0, 10, 4)[0]
    kept, left = (tokenizer.eos_id, tokenizer.bos_id)[:: 1 if document_format == "eos" else -1]
    assert (tokens == kept).any() and not (tokens == left).any()


def test_the_number_of_lanes_is_chosen_once(folders, tokenizer):
    def lanes_of(global_batch, world_size):
        source = RawTrainData(folders["parquet"], tokenizer, L, seed=0)  # 24 units
        source.micro_batches(0, global_batch, 1, 0, world_size, prefetch=False, pin_memory=False)
        return source.lanes

    assert [lanes_of(g, 1) for g in (16, 32, 36, 24, 46, 7)] == [16, 16, 18, 24, 23, 7]
    assert [lanes_of(g, 4) for g in (16, 36, 20)] == [16, 12, 20]
    source = RawTrainData(folders["parquet"], tokenizer, L, seed=0)
    _, state = steps_of([source], 0, 1, 4, global_batch=16)
    resumed = RawTrainData(folders["parquet"], tokenizer, L, seed=0)
    resumed.load_state(state)
    assert resumed.lanes == 16
    with pytest.raises(UserError, match=r"16 lanes do not split over 3 ranks. They do over 1, 2, 4, 8, 16"):
        resumed.micro_batches(16, 48, 1, 0, 3, prefetch=False, pin_memory=False)
    with pytest.raises(UserError, match="16 lanes do not divide a global batch of 24"):
        resumed.micro_batches(16, 24, 1, 0, 1, prefetch=False, pin_memory=False)
    with pytest.raises(UserError, match=r"resumes after 32 .* the checkpoint has those after 16"):
        resumed.micro_batches(32, 16, 1, 0, 1, prefetch=False, pin_memory=False)
    with pytest.raises(UserError, match="16 lanes, not 8"):
        RawTrainData(folders["parquet"], tokenizer, L, seed=0, lanes=8).load_state(state)
    fresh = RawTrainData(folders["parquet"], tokenizer, L, seed=0)
    with pytest.raises(UserError, match=r"24 row groups or files, too few for 32 ranks"):
        fresh.micro_batches(0, 32, 1, 0, 32, prefetch=False, pin_memory=False)
    with pytest.raises(UserError, match="does not split into 4 ranks x micro-batch 3"):
        fresh.micro_batches(0, 16, 3, 0, 4, prefetch=False, pin_memory=False)
    with pytest.raises(UserError, match="the checkpoint has none"):
        fresh.micro_batches(16, 16, 1, 0, 1, prefetch=False, pin_memory=False)


def test_held_out_documents_are_the_other_half_of_the_training_documents(folders, tokenizer):
    train = RawTrainData(folders["parquet"], tokenizer, L, seed=0, lanes=8, validation_fraction=0.2)
    trained = set(itertools.chain(*lane_documents(steps_of([train], 0, 90, 4)[0], 8, tokenizer)))
    validation = RawValidationData(folders["parquet"], tokenizer, 64, validation_fraction=0.2)
    blocks = torch.cat([validation.block(i)[:-1] for i in range(validation.num_blocks)])
    assert torch.equal(blocks, torch.from_numpy(validation.tokens[: len(blocks)].astype(np.int64)))
    starts = validation.document_starts
    assert (validation.tokens[starts] == tokenizer.bos_id).all()
    for i in range(validation.num_blocks):
        batch = validation.batch(i)
        assert torch.equal(batch.tokens[0], validation.block(i))
        inside = (batch.tokens[0, :-1] == tokenizer.bos_id).nonzero().flatten().tolist()
        assert without_padding(batch.cu_seqlens) == sorted({0, *inside, 64})
    held_out = {tokenizer.decode(part[1:-1].tolist()) for part in np.split(validation.tokens, starts[1:])}
    assert held_out and trained and not held_out & trained
    assert held_out | trained == set(TEXTS)
    assert 0.1 < len(held_out) / len(TEXTS) < 0.3
    whole = RawValidationData(folders["jsonl"], tokenizer, 64)
    assert {tokenizer.decode(p[1:-1].tolist()) for p in np.split(whole.tokens, whole.document_starts[1:])} == set(TEXTS)
    bounded = RawValidationData(folders["parquet"], tokenizer, 64, validation_fraction=0.2, max_tokens=129)
    assert bounded.num_blocks == 2 and torch.equal(bounded.block(1), validation.block(1))
    with pytest.raises(IndexError):
        bounded.block(2)
    with pytest.raises(UserError, match=r"129 validation tokens are too few for one block of 129"):
        RawValidationData(folders["parquet"], tokenizer, 129, max_tokens=129)


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_an_epoch_is_near(folders, tokenizer, kind):
    source = RawTrainData(folders[kind], tokenizer, L, seed=0)
    tokens = sum(len(tokenizer.encode(text)) + 2 for text in TEXTS)
    assert source.epochs(tokens // L) == pytest.approx(1, rel=0.35)


def test_lines_of_ranges_are_the_lines_of_the_file(tmp_path, monkeypatch):
    choose = random.Random(0)
    for trial in range(60):
        lines = [b"x" * choose.choice([0, 1, 2, 7, 30]) for _ in range(choose.randint(1, 12))]
        content = b"\n".join(lines) + choose.choice([b"", b"\n"])
        path = tmp_path / f"{trial}.jsonl"
        path.write_bytes(content)
        monkeypatch.setattr(raw_source, "RANGE_BYTES", choose.randint(1, 20))
        monkeypatch.setattr(raw_source, "PART_BYTES", choose.randint(1, 20))
        starts = range(0, len(content), raw_source.RANGE_BYTES)
        read = [line for start in starts for line, _ in raw_source._lines_of_range(path, start)]
        assert read == content.split(b"\n")[: -1 if content.endswith(b"\n") or not content else None] or (
            not content and not read
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slices", [1, 16])
def test_skipping_records_skips_them(folders, kind, slices):
    source = RawSource.open(folders[kind])
    for unit in source.units[:3]:
        records = list(source.records(unit))
        for first in range(len(records) + 2):
            rest = [record[:2] for record in source.records(unit, first, slices)]
            assert rest == [record[:2] for record in records[first:]]


def test_what_is_no_text_is_no_document(tmp_path, tokenizer):
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.table({"text": ["three", None, "", "four"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    validation = RawValidationData(tmp_path, tokenizer, 4)
    documents = [
        tokenizer.decode(part[1:-1].tolist()) for part in np.split(validation.tokens, validation.document_starts)
    ]
    assert sorted(filter(None, documents)) == ["four", "one", "three", "two"]


def test_the_fingerprint_names_files_and_options(folders, tokenizer, tmp_path):
    fingerprint = RawTrainData(folders["parquet"], tokenizer, L, seed=0).fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert set(fingerprint["files"]) == {"0000.parquet", "0060.parquet", "0120.parquet", "0180.parquet"}
    assert "6 row groups" in fingerprint["files"]["0060.parquet"]
    copy = write_source(tmp_path / "copy", "parquet")
    assert RawTrainData(copy, tokenizer, L, seed=0).fingerprint == fingerprint
    others = [
        RawTrainData(copy, tokenizer, L, seed=1),
        RawTrainData(copy, tokenizer, L + 1, seed=0),
        RawTrainData(copy, tokenizer, L, seed=0, document_format="eos"),
        RawTrainData(copy, tokenizer, L, seed=0, validation_fraction=0.1),
        RawTrainData(copy, tokenizer, L, seed=0, document_reset=False),
        RawTrainData(copy, train_tokenizer(TEXTS, 310, tmp_path / "other"), L, seed=0),
    ]
    (copy / "0060.parquet").unlink()
    others.append(RawTrainData(copy, tokenizer, L, seed=0))
    for other in others:
        assert other.fingerprint != fingerprint
    (corpus,) = others[0].corpora
    assert (corpus.vocab_size, corpus.tokenizer_sha256) == (tokenizer.vocab_size, tokenizer.sha256)
    assert (corpus.folder, corpus.document_format) == (copy, "bos_eos")


def damaged(tmp_path, kind, damage):
    """A source of `kind` whose first file went through `damage`, and that file."""
    folder = write_source(tmp_path / "source", kind)
    path = sorted(path for path in folder.rglob("*") if path.is_file())[0]
    path.write_bytes(damage(path.read_bytes()))
    return folder, path


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        ("parquet", lambda content: content[:-10], r"0000\.parquet cannot be read as parquet"),
        ("parquet", lambda content: b"", r"0000\.parquet cannot be read as parquet"),
    ],
)
def test_an_unreadable_file_is_refused_at_start(tmp_path, tokenizer, kind, damage, message):
    folder, _ = damaged(tmp_path, kind, damage)
    with pytest.raises(UserError, match=message):
        RawTrainData(folder, tokenizer, L, seed=0)


def flipped(content):
    """Zeros over the second row group's texts, far from both ends of the file."""
    place = pq.read_metadata(io.BytesIO(content)).row_group(1).column(1).data_page_offset
    return content[:place] + bytes(400) + content[place + 400 :]


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        ("parquet", flipped, r"0000\.parquet is damaged in row group"),
        ("jsonl.zst", lambda content: content[:-9], r"0000\.jsonl\.zst is cut off"),
        ("jsonl.zst", lambda content: content[:30] + bytes(60) + content[90:], r"0000\.jsonl\.zst is damaged"),
        ("jsonl.zst", gzip.compress, r"0000\.jsonl\.zst is damaged"),
        ("jsonl", lambda content: content.replace(b"}", b"", 1), r"0000\.jsonl line 1 is no JSON"),
        ("jsonl", lambda content: content.replace(b'"text"', b'"body"'), r"0000\.jsonl line \d+.* no field 'text'"),
    ],
)
def test_damage_inside_a_file_is_reported_with_its_name(tmp_path, tokenizer, kind, damage, message):
    folder, _ = damaged(tmp_path, kind, damage)
    source = RawTrainData(folder, tokenizer, L, seed=0)
    with pytest.raises(UserError, match=message):
        steps_of([source], 0, 90, G, prefetch=True)


def test_a_source_that_cannot_be_used_is_refused_in_one_line(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"content": ["a"], "text": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.bin").write_text("x")
    for path, options, message in (
        (tmp_path / "none", {}, "none is neither a folder nor a file"),
        (tmp_path / "c.bin", {}, "c.bin is neither"),
        (tmp_path / "empty", {}, "holds no text in files that end in"),
        (tmp_path / "b.txt", {}, "holds no text"),
        (tmp_path / "a.parquet", {}, r"a\.parquet: column 'text' holds int64, not text"),
        (tmp_path / "a.parquet", {"text_column": "body"}, r"a\.parquet has no column 'body' \(it has content, text\)"),
        (tmp_path / "a.parquet", {"text_column": "content", "validation_fraction": 1.0}, "validation fraction 1.0"),
    ):
        with pytest.raises(UserError, match=message) as error:
            RawTrainData(path, tokenizer, L, seed=0, **options)
        assert "\n" not in str(error.value)


def test_a_source_without_documents_ends_instead_of_turning_for_ever(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 9)
    source = RawTrainData(tmp_path, tokenizer, L, seed=0)
    with pytest.raises(UserError, match="no documents to train on"):
        next(source.micro_batches(0, 1, 1, 0, 1, prefetch=False, pin_memory=False))


def test_a_tokenizer_that_makes_document_ends_of_text_is_refused(folders, tokenizer, monkeypatch):
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text) + [tokenizer.eos_id] * ("</s>" in text))
    with pytest.raises(UserError, match=r"turns text in .* into its own begin or end token"):
        steps_of([RawTrainData(folders["parquet"], tokenizer, L, seed=0)], 0, 30, G)


def test_a_tiny_source_repeats(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "\n" * 2000)  # a second range without documents
    document = [tokenizer.bos_id, *tokenizer.encode("one"), tokenizer.eos_id]
    tokens = steps_of([RawTrainData(tmp_path, tokenizer, L, seed=0)], 0, 9, 1, global_batch=1)[0][..., :-1].flatten()
    assert tokens.tolist() == (document * len(tokens))[: len(tokens)]


def test_a_file_that_changed_since_the_checkpoint_is_refused(tmp_path, tokenizer):
    folder = write_source(tmp_path / "source", "jsonl")
    source = RawTrainData(folder, tokenizer, L, seed=0, lanes=8)
    _, state = steps_of([source], 0, 5, G)
    path = folder / "0120.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b'"}')  # intact, of the same size
    RawTrainData(folder, tokenizer, L, seed=0).load_state(state)
    path.write_bytes(b" " + content[1:])
    with pytest.raises(UserError, match="changed since the checkpoint"):
        RawTrainData(folder, tokenizer, L, seed=0).load_state(state)
    resumed = RawTrainData(folder, tokenizer, L, seed=0)
    path.write_bytes(content + b"\n\n")  # while in use
    with pytest.raises(UserError, match=r"0120\.jsonl changed while it was in use"):
        steps_of([resumed], 0, 90, G)
    path.unlink()
    with pytest.raises(UserError, match=r"0120\.jsonl cannot be read: No such file"):
        steps_of([RawTrainData(write_source(tmp_path / "b", "jsonl"), tokenizer, L, seed=0)], 0, 1, G)
        steps_of([resumed], 0, 90, G)


def test_a_record_that_became_shorter_is_refused(folders, tokenizer):
    source = RawTrainData(folders["parquet"], tokenizer, L, seed=0, lanes=8)
    _, state = steps_of([source], 0, 3, G)
    state["lanes"][2][2] = 10_000
    resumed = RawTrainData(folders["parquet"], tokenizer, L, seed=0)
    resumed.load_state(state)
    with pytest.raises(UserError, match=r"\.parquet is not what the checkpoint was trained on"):
        steps_of([resumed], 48, 1, G)


RANK = """
import json, sys, torch, torch.distributed
from pathlib import Path
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens.raw import RawTrainData

folder, tokenizer, out, length, steps, rank = *sys.argv[1:4], *map(int, sys.argv[4:])
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
source = RawTrainData(folder, Tokenizer(tokenizer), length, seed=9)
batches = source.micro_batches(0, 16, 2, rank, 2, prefetch=True, pin_memory=False)
rows = torch.cat([next(batches).tokens for _ in range(steps * 4)])
state = source.state(steps * 16)
batches.close()
torch.save(rows, f"{out}/{rank}.pt")
Path(f"{out}/{rank}.json").write_text(json.dumps(state))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_make_the_batches_and_the_state_of_one(folders, tokenizer, tmp_path):
    arguments = [str(folders["parquet"]), str(tokenizer.path), str(tmp_path), str(L), "5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, *arguments, str(rank)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    expected, state = steps_of([RawTrainData(folders["parquet"], tokenizer, L, seed=9)], 0, 5, G)
    both = torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], dim=1).reshape(5, G, L + 1)
    assert torch.equal(both, expected)
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1] and states[0]["lanes"] == state["lanes"]
