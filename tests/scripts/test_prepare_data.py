import functools
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import TrainData, ValidationData, check_same_tokenizer, check_vocabulary
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens.corpus import Corpus
from tests.corpora import EXTENSIONS, content, documents_in, text

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"

_spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
prepare_data = importlib.util.module_from_spec(_spec)
sys.modules["prepare_data"] = prepare_data
_spec.loader.exec_module(prepare_data)


def run(*flags):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """60 text files in 3 folders, copies among them, a file that is not UTF-8 and an empty one."""
    root = tmp_path_factory.mktemp("source")
    for i in range(60):
        path = root / f"part{i % 3}" / f"{i:03d}{('.txt', '.md', '.py')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(i if i < 50 else i - 50), encoding="utf-8")
    (root / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (root / "empty.txt").write_text("")
    (root / "image.png").write_bytes(b"\x89PNG")
    return root


@pytest.fixture(scope="module")
def flags(source):
    return ["--source", source, "--train_tokenizer", 330, "--validation_fraction", 0.2, "--unit_bytes", 3000]


@pytest.fixture(scope="module")
def corpus(flags, tmp_path_factory):
    """A corpus prepared with two workers, and what the program printed."""
    out = tmp_path_factory.mktemp("prepared") / "two"
    result = run(*flags, "--out", out, "--workers", 2)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_every_text_arrives_once_and_exactly(corpus, source):
    out, printed = corpus
    train, validation = documents_in(out, "train"), documents_in(out, "validation")
    files = sorted(path for path in source.rglob("*") if path.suffix in EXTENSIONS and path.name != "latin.txt")
    expected = sorted(body for path in files if (body := path.read_text(encoding="utf-8")))
    assert sorted(train + validation) == expected
    assert train and validation and not set(train) & set(validation), "a text is in both splits"
    totals = json.loads((out / "manifest.json").read_text())["totals"]
    assert totals["train"]["documents"] == len(train)
    assert totals["validation"]["characters"] == sum(map(len, validation))
    assert (totals["not_text"], totals["empty"], totals["files"], totals["folders"]) == (1, 1, 62, 4)
    assert "1 not UTF-8" in printed and f"{totals['train']['tokens']:,}" in printed and "delta" in printed


def test_the_corpus_goes_through_the_door(corpus):
    out, _ = corpus
    train, validation = TrainData(out, 64, seed=0), ValidationData(out, 128)
    stream = np.concatenate([np.fromfile(path, "<u2", offset=24) for path in sorted(out.glob("train*.bin"))])
    assert len(list(out.glob("train*.bin"))) > 3
    assert np.array_equal(train.corpus.read(0, train.corpus.num_tokens), stream)
    assert train.corpus.vocab_size == 330 and train.corpus.document_format == "bos_eos"
    assert train.corpus.tokenizer_sha256 == Tokenizer(out / "tokenizer").sha256
    assert train.batch(0, 4).tokens.shape == (4, 65) and validation.block(0).shape == (129,)
    check_same_tokenizer(train, validation)
    check_vocabulary(train.corpus, 330)
    with pytest.raises(UserError, match="vocabulary of 330"):
        check_vocabulary(train.corpus, 329)


def test_one_worker_writes_the_same_bytes_and_a_rerun_says_it_is_finished(corpus, flags, tmp_path, capsys):
    out, _ = corpus
    result = run(*flags, "--out", tmp_path / "one", "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "one") == content(out)
    prepare_data.main([*map(str, flags), "--out", str(tmp_path / "one")])
    assert "finished already" in capsys.readouterr().out
    assert content(tmp_path / "one") == content(out)


def started(flags, out, **pipes):
    command = [sys.executable, str(SCRIPT), *map(str, flags), "--out", str(out), "--workers", "2"]
    pipes = {"stdout": subprocess.DEVNULL, **(pipes or {"stderr": subprocess.DEVNULL})}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts with & ignore it
    return subprocess.Popen(command, preexec_fn=heard, **pipes)


def kill_when(out, flags, condition, delay=0.0):
    """Start a run and SIGKILL it, the parent alone, once `condition()` holds. True if it was killed at work."""
    process = started(flags, out)
    while process.poll() is None and not condition():
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_a_run_that_is_killed_and_interrupted_continues_to_the_same_bytes(corpus, flags, tmp_path):
    expected, _ = corpus
    out = tmp_path / "out"

    def records():
        return len(list(out.glob("train*.json")))

    assert kill_when(out, flags, lambda: (out / "prepare.json").exists())

    process = started(flags, out)
    while process.poll() is None and records() < 2:
        time.sleep(0.002)
    workers = children_of(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) >= 2 and not any(map(runs, workers)), "workers outlive their parent"
    with pytest.raises(UserError, match="not finished"):
        Corpus.open(out, "train")

    (out / "train_data_000001.bin.1234.tmp").write_bytes(b"half a sha")
    leftovers = set(out.glob("*.tmp"))
    process = started(flags, out, stderr=subprocess.PIPE)
    while process.poll() is None and not set(out.glob("*.bin.*.tmp")) - leftovers:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.decode() == "error: interrupted. Finished units are kept: run the same command again.\n"
    assert not list(out.glob("*.tmp")) and not (out / "manifest.json").exists()

    result = run(*flags, "--out", out)
    assert result.returncode == 0 and "continuing" in result.stdout, result.stderr
    assert content(out) == content(expected)


def stat_of(pid):
    """[state, parent, ...] of a process; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def children_of(parent):
    stats = {int(path.name): stat_of(path.name) for path in Path("/proc").glob("[0-9]*")}
    return [pid for pid, stat in stats.items() if stat and int(stat[1]) == parent]


def runs(pid):
    """Whether a process is there and not a zombie, which only waits to be collected."""
    stat = stat_of(pid)
    return stat is not None and stat[0] != "Z"


@pytest.mark.slow
def test_twenty_kills_at_random_instants_lose_nothing(source, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(3000):
        (many / f"{i}.txt").write_text(text(i, words=300), encoding="utf-8")
    flags = ["--source", many, "--train_tokenizer", 330, "--validation_fraction", 0.02, "--unit_bytes", 15_000]
    began = time.monotonic()
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    whole = time.monotonic() - began  # kills come at fractions of this, on a fast machine and on a slow one
    rng, out, kills = random.Random(1), tmp_path / "killed", 0
    while kills < 20 and not (out / "manifest.json").exists():
        done = len(list(out.glob("train*.json")))
        if rng.random() < 0.3:  # before there is any record, else after the next one
            kills += kill_when(out, flags, lambda: True, delay=rng.random() * whole / 3)
        else:
            more = functools.partial(lambda done: len(list(out.glob("train*.json"))) > done, done)
            kills += kill_when(out, flags, more, delay=rng.random() * whole / 100)
    assert kills == 20
    assert run(*flags, "--out", out, "--workers", 3).returncode == 0
    assert content(out) == content(tmp_path / "whole")


# What follows needs no second process: the program's own functions, called here.


def refused(capsys, *flags):
    """The one line with which the program refuses."""
    with pytest.raises(SystemExit) as exit_:
        prepare_data.main([str(flag) for flag in flags])
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "change, message",
    [
        (["--document_format", "eos"], "begun with document_format = bos_eos"),
        (["--validation_fraction", "0.1"], "begun with validation_fraction = 0.2"),
        (["--train_tokenizer", "500"], "begun with tokenizer = to train, 330 ids"),
        (["--unit_bytes", "9000"], "changed since it was begun"),
    ],
)
def test_other_options_are_refused_for_a_folder_already_begun(corpus, flags, capsys, change, message):
    before = content(corpus[0])
    assert message in refused(capsys, *flags, "--out", corpus[0], *change)
    assert content(corpus[0]) == before


def test_a_changed_source_is_refused(corpus, source, flags, capsys):
    path = source / "part1" / "031.md"
    old = path.stat()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    try:
        message = refused(capsys, *flags, "--out", corpus[0])
        assert "the source of" in message and "part1/" in message
    finally:
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def test_what_cannot_be_prepared_is_refused_and_nothing_is_written(source, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    (tmp_path / "a.docx").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    make = ["--train_tokenizer", "330", "--out", out]
    for flags, message in (
        (["--source", tmp_path / "nowhere", *make], "does not exist"),
        (["--source", tmp_path / "empty", *make], "holds no files that end in .py"),
        (["--source", tmp_path / "blank", *make], "is empty"),
        (["--source", tmp_path / "a.docx", *make], "none of the known endings"),
        (["--source", source, "--out", out], "either --tokenizer PATH or --train_tokenizer SIZE"),
        (["--source", source, *make, "--tokenizer", "x"], "either --tokenizer"),
        (["--source", source, "--tokenizer", tmp_path / "no.model", "--out", out], "no.model does not exist"),
        (["--source", source, *make, "--document_format", "sos"], "none of bos_eos, eos, bos"),
        (["--source", source, *make, "--validation_fraction", "1"], "below 1"),
        (["--source", source, *make, "--name", "../x"], "--name"),
        (["--source", source, *make, "--workers", "0"], "--workers 0"),
        (["--source", source, *make, "--nonsense", "0"], "nonsense"),
    ):
        assert message in refused(capsys, *flags)
    assert not out.exists()
    assert "already holds other files (thesis.tex)" in refused(
        capsys, "--source", source, "--train_tokenizer", 330, "--out", tmp_path / "full"
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_size_of_tokenizer_that_does_not_fit_can_be_mended(source, tmp_path, capsys):
    command = ["--source", source, "--out", tmp_path / "out", "--workers", 1]
    assert "tokenizer of 90000 pieces" in refused(capsys, *command, "--train_tokenizer", 90000)
    assert "tokenizer of 10 pieces" in refused(capsys, *command, "--train_tokenizer", 10)
    assert list(content(tmp_path / "out")) == ["prepare.json"]


def test_a_damaged_corpus_is_refused_by_file_name(corpus, tmp_path, capsys):
    out = tmp_path / "copy"
    shard = sorted(corpus[0].glob("train*.bin"))[1].name

    def fresh():
        out.mkdir(exist_ok=True)
        for name in content(corpus[0]):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes((corpus[0] / name).read_bytes())

    def opening_fails(match):
        with pytest.raises(UserError, match=match):
            Corpus.open(out, "train")
        fresh()

    fresh()
    (out / shard).unlink()
    opening_fails(f"{shard} is missing")
    (out / shard).write_bytes((out / shard).read_bytes()[:-2])
    opening_fails(f"{shard} is truncated")
    other = next(path for path in sorted(out.glob("train*.bin")) if path.name != shard)
    (out / shard).write_bytes(other.read_bytes())
    opening_fails(f"{shard} holds .* the manifest says")
    tokens = np.fromfile(out / shard, "<u2", offset=24)
    header = (out / shard).read_bytes()[:15] + b"\4" + (out / shard).read_bytes()[16:24]
    (out / shard).write_bytes(header + tokens.astype("<i4").tobytes())
    opening_fails(f"{shard} holds int32, the manifest uint16")
    index = shard.replace(".bin", ".idx")
    (out / index).write_bytes((out / index).read_bytes()[:-8])
    opening_fails(index)
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace('"document_format": "bos_eos"', '"document_format": "eos"'))
    opening_fails("changed after it was written")
    (out / "manifest.json").write_text(manifest[:100])
    opening_fails("manifest.json cannot be read")

    prepare_data.main(["verify", str(out)])
    assert "as prepared" in capsys.readouterr().out
    flipped = bytearray((out / shard).read_bytes())
    flipped[100] ^= 1
    (out / shard).write_bytes(flipped)
    Corpus.open(out, "train")  # headers and sizes are right
    assert f"{shard} differs from what was prepared" in refused(capsys, "verify", out)


def test_the_tools_print_draw_export_and_adopt(corpus, tmp_path, capsys):
    out = corpus[0]

    def printed(*flags):
        prepare_data.main([str(flag) for flag in flags])
        return " ".join(capsys.readouterr().out.split())

    totals = json.loads((out / "manifest.json").read_text())["totals"]
    picture = tmp_path / "lengths.png"
    shown = printed("inspect", out, "--documents", 2, "--picture", picture)
    assert shown.count("document at token") == 2 and "delta" in shown and str(picture) in shown
    assert f"documents │ {totals['train']['documents']} │" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    flags = ["--official", "--chunk", "65x16", "--validation_chunk", "400", "--out", tmp_path / "official"]
    exported = printed("export", out, *flags)
    files = len(list((tmp_path / "official").glob("train_slim*.bin")))
    assert f"{files} of train (1,040 tokens)" in exported
    assert f"{totals['train']['tokens']:,} tokens" in printed(
        "adopt", tmp_path / "official", "--tokenizer", out / "tokenizer"
    )
    verified = printed("verify", "--folder", tmp_path / "official")
    assert "as prepared" in verified
    assert "must be a number of tokens" in refused(capsys, "export", out, "--chunk", "4k", "--out", tmp_path / "x")
    assert "only layout" in refused(capsys, "export", out, "--official", "false", "--out", tmp_path / "x")
    assert "none of bos_eos" in refused(capsys, "adopt", out, "--document_format", "x")
    assert "required: folder" in refused(capsys, "verify")
    assert "no hashes" in refused(capsys, "verify", bare_copy(tmp_path / "official", tmp_path / "bare"))


def bare_copy(folder, copy):
    copy.mkdir()
    for path in folder.glob("*.bin"):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, and what makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}k", *options]), "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if os.geteuid() or not mount(200):
        pytest.skip("takes root and mount")
    yield disk, lambda: mount(8000, "remount")
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(small_disk, tmp_path):
    disk, enlarge = small_disk
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text(text(i, words=1000), encoding="utf-8")
    flags = ["--source", tmp_path / "texts", "--train_tokenizer", 330, "--unit_bytes", 20_000, "--workers", 2]
    result = run(*flags, "--out", disk / "out")
    assert result.returncode == 2, result.stdout
    assert result.stderr == f"error: no space left on the disk of {disk / 'out'}. " + (
        "What is finished is kept: free some, run the same command again.\n"
    )
    done = len(list((disk / "out").glob("train*.json")))
    assert done and not list((disk / "out").rglob("*.tmp")) and not (disk / "out" / "manifest.json").exists()
    assert run(*flags, "--out", disk / "out").returncode == 2, "still full"
    assert enlarge()
    result = run(*flags, "--out", disk / "out")
    assert result.returncode == 0 and "continuing" in result.stdout, result.stderr
    assert run(*flags, "--out", tmp_path / "whole").returncode == 0
    assert content(disk / "out") == content(tmp_path / "whole")
