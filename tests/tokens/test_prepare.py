"""Preparation unit by unit, in this process: sources of every kind, document formats, refusals, full disks."""

import errno
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lit_gpt.errors import UserError
from lit_gpt.files import explain_full_disk
from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.tokens import prepare
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.sources import documents, list_units
from tests.corpora import EXTENSIONS, content, documents_in, text


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory):
    return train_tokenizer([text(i) for i in range(20)], 330, tmp_path_factory.mktemp("tokenizer") / "small")


def prepared(source, out, tokenizer, document_format="bos_eos", unit_bytes=None, text_column="text", fraction=0.2):
    """The program's steps in this process: units one after the other, without a pool."""
    units = list_units(source, EXTENSIONS, unit_bytes, text_column, exclude=out)
    job = prepare.Job(out, "data", text_column, document_format, fraction)
    with prepare.begin(job, prepare.plan_of(job, units, tokenizer)):
        tokenizer = prepare.make_tokenizer(job, units, tokenizer)
        for unit in units:
            prepare.prepare_unit(job, unit, tokenizer, lambda source_bytes, tokens: None)
        return prepare.finish(job, units, tokenizer)


BODIES = [text(i, words=50) for i in range(30)] + ["one\r\n\ttwo </s>", text(0, words=50)]


def write_source(kind, folder):
    records = [{"text": body, "id": i} for i, body in enumerate(BODIES)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = folder / f"a{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=5)
    elif kind == ".jsonl.zst":
        half = lines.index(b"\n", len(lines) // 2) - 20  # two frames, cut inside a line
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("unit_bytes", [1, None])
def test_records_of_every_kind_arrive(kind, unit_bytes, tmp_path, small_tokenizer):
    path = write_source(kind, tmp_path)
    manifest = prepared(path, tmp_path / "out", small_tokenizer, unit_bytes=unit_bytes)
    assert len(manifest["units"]) == (7 if kind == ".parquet" and unit_bytes else 1)
    train, validation = documents_in(tmp_path / "out", "train"), documents_in(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(BODIES)
    assert not set(train) & set(validation)


@pytest.mark.parametrize("document_format, before, after", [("eos", 0, 1), ("bos", 1, 0), ("bos_eos", 1, 1)])
def test_document_formats(document_format, before, after, tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text("alpha")
    prepared(tmp_path / "a.txt", tmp_path / "out", small_tokenizer, document_format, fraction=0.0)
    corpus = Corpus.open(tmp_path / "out", "train")
    assert corpus.read(0, corpus.num_tokens).tolist() == [1] * before + small_tokenizer.encode("alpha") + [2] * after
    assert corpus.document_format == document_format


def test_a_folder_may_mix_kinds_and_hold_the_output(tmp_path, small_tokenizer):
    (tmp_path / "z.md").write_text("omega")
    write_source(".parquet", tmp_path)
    write_source(".jsonl", tmp_path)
    out = tmp_path / "out"
    first = prepared(tmp_path, out, small_tokenizer, fraction=0.0)
    assert [unit["source"] for unit in first["units"]] == ["a.jsonl", "a.parquet row groups 0 to 6", "z.md"]
    (out / "notes.txt").write_text("not part of the source")
    assert len(list_units(tmp_path, EXTENSIONS, None, "text", exclude=out)) == 3


def test_units_group_files_in_order(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * 40)
    units = list_units(tmp_path, EXTENSIONS, 100, "text", exclude=tmp_path / "out")
    assert [len(unit.files) for unit in units] == [3, 3, 3, 1]
    assert [name for unit in units for name in unit.files] == [f"{i}.txt" for i in range(10)]
    assert [unit.bytes for unit in units] == [120, 120, 120, 40]
    assert units[0].source == "0.txt to 2.txt"


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "cut', "line 2 is no JSON"),
        (b'{"body": "a"}', "line 2 has no field 'text' (it has body)"),
        (b'["a"]', "line 2 has no field 'text' (it has a list)"),
        (b'{"text": 5}', "line 2: field 'text' is no text but a int"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    (unit,) = list_units(tmp_path / "a.jsonl", EXTENSIONS, None, "text", exclude=tmp_path)
    with pytest.raises(UserError) as error:
        list(documents(unit, "text"))
    assert message in str(error.value)


def test_text_that_is_none_is_counted(tmp_path, small_tokenizer):
    lines = [b'{"text": "fine"}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": null}', b'{"text": ""}', b""]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    totals = prepared(tmp_path / "a.jsonl", tmp_path / "out", small_tokenizer, fraction=0.0)["totals"]
    assert (totals["train"]["documents"], totals["not_text"], totals["empty"]) == (1, 2, 2)


def test_damaged_archives_are_named(tmp_path):
    whole = write_source(".jsonl.zst", tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[:-20])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"not zstandard at all")
    for name, message in (("cut.jsonl.zst", "cut off"), ("bad.jsonl.zst", "damaged")):
        (unit,) = list_units(tmp_path / name, EXTENSIONS, None, "text", exclude=tmp_path)
        with pytest.raises(UserError, match=f"{name} is {message}"):
            list(documents(unit, "text"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    write_source(".parquet", tmp_path)
    for name, column, message in (
        ("bad.parquet", "text", "cannot be read as parquet"),
        ("a.parquet", "body", "no column 'body' .it has text, id"),
        ("a.parquet", "id", "holds int64, not text"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            list_units(tmp_path / name, EXTENSIONS, None, column, exclude=tmp_path)


def test_a_source_without_training_text_is_refused(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no training documents: 0 held out, 0 empty, 1 not UTF-8"):
        prepared(tmp_path / "a.txt", tmp_path / "out", small_tokenizer)


def test_a_lost_shard_is_named_with_what_to_do(tmp_path, small_tokenizer):
    path = write_source(".jsonl", tmp_path)
    prepared(path, tmp_path / "out", small_tokenizer)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "train_data_000000.bin").unlink()
    units = list_units(path, EXTENSIONS, None, "text", exclude=tmp_path / "out")
    job = prepare.Job(tmp_path / "out", "data", "text", "bos_eos", 0.2)
    with pytest.raises(UserError, match=r"train_data_000000\.bin is missing.*Delete train_data_000000\.json"):
        prepare.finish(job, units, small_tokenizer)


def test_units_of_another_tokenizer_are_refused(tmp_path, small_tokenizer):
    path = write_source(".jsonl", tmp_path)
    prepared(path, tmp_path / "out", small_tokenizer)
    units = list_units(path, EXTENSIONS, None, "text", exclude=tmp_path / "out")
    job = prepare.Job(tmp_path / "out", "data", "text", "bos_eos", 0.2)
    other = train_tokenizer([text(1)], 320, tmp_path / "other")
    with pytest.raises(UserError, match=r"unit 0 of .* was made with another tokenizer"):
        prepare.finish(job, units, other)


@pytest.mark.parametrize("failing", range(1, 7))
def test_no_space_for_any_of_the_writes_leaves_nothing_half_done(failing, tmp_path, small_tokenizer, monkeypatch):
    path = write_source(".jsonl", tmp_path)
    out, calls, fsync = tmp_path / "out", [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    prepared(path, tmp_path / "whole", small_tokenizer)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"), explain_full_disk(out):
        prepared(path, out, small_tokenizer)
    assert not list(out.rglob("*.tmp"))
    prepared(path, out, small_tokenizer)
    assert content(out) == content(tmp_path / "whole")


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_tokenizer_that_cuts_text_is_refused(tmp_path, small_tokenizer, monkeypatch):
    path = write_source(".jsonl", tmp_path)
    real = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [[*ids, 2, 9] for ids in real(self, texts)])
    with pytest.raises(UserError, match=r"turns text of a\.jsonl into its own begin or end token"):
        prepared(path, tmp_path / "out", small_tokenizer)


def test_a_second_process_is_kept_out(tmp_path, small_tokenizer):
    path = write_source(".jsonl", tmp_path)
    units = list_units(path, EXTENSIONS, None, "text", exclude=tmp_path / "out")
    job = prepare.Job(tmp_path / "out", "data", "text", "bos_eos", 0.2)
    plan = prepare.plan_of(job, units, small_tokenizer)
    with prepare.begin(job, plan), pytest.raises(UserError, match="another process"), prepare.begin(job, plan):
        pass


def test_the_hold_out_has_the_share_asked_for():
    held_out = sum(prepare.is_validation(str(i).encode(), 0.02) for i in range(20_000))
    assert 330 < held_out < 470
    assert not any(prepare.is_validation(str(i).encode(), 0.0) for i in range(1000))
