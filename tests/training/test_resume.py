"""Resumes after damage, on a full disk, with milestones: the training entry and its checkpoints together."""

import contextlib
import errno
import gc
import json
import os
import shutil
import subprocess

import pytest

import pretrain
from lit_gpt.training import checkpoint as checkpoint_module
from lit_gpt.training.checkpoint_manifest import damage
from lit_gpt.training.records import read_metrics
from tests.runs import STEPS, command_line, losses


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus, tiny_model):
    """The output root of a run with checkpoints of steps 17, 34 and 40."""
    root = tmp_path_factory.mktemp("undisturbed")
    pretrain.setup(command_line(tiny_corpus, tiny_model, root))
    return root


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(pretrain.Records, "plot", lambda self: None)


@pytest.fixture
def copy(undisturbed, tmp_path):
    """Its run folder, to be damaged."""
    return shutil.copytree(undisturbed / "outputs", tmp_path / "outputs") / "debug_test"


@pytest.fixture
def command(tiny_corpus, tiny_model, tmp_path):
    return lambda **flags: command_line(tiny_corpus, tiny_model, tmp_path, **flags)


def refused(argv: list[str], capsys) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(argv)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in err
    del stop
    gc.collect()  # its frames hold the lock of the run folder
    return err


def flip(path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("file", ["model-00000.safetensors", "optimizer-00000.safetensors", "meta.json"])
def test_the_one_before_a_damaged_checkpoint_is_used_and_that_is_said(file, undisturbed, copy, command, capsys):
    flip(copy / "checkpoints" / "step-00000040" / file)
    pretrain.setup(command())
    out = capsys.readouterr().out
    assert f"step-00000040 is damaged and left as it is: the checksum of {file} is wrong." in out.splitlines()
    assert "resuming: step-00000034" in out
    assert losses(copy) == losses(undisturbed / "outputs" / "debug_test")
    assert damage(copy / "checkpoints" / "step-00000040") is None  # trained and saved again


def test_when_all_are_damaged_the_run_is_not_started_over(copy, command, capsys):
    damaged = {path: flip(path) for path in copy.glob("checkpoints/*/model-00000.safetensors")}
    before = (copy / "metrics.jsonl").read_bytes()
    err = refused(command(), capsys)
    assert err.startswith("error: no checkpoint in ")
    assert all(name in err for name in ("step-00000017", "step-00000034", "step-00000040"))
    assert all(path.read_bytes() == content for path, content in damaged.items())
    assert (copy / "metrics.jsonl").read_bytes() == before


def fail_at(steps, monkeypatch) -> None:
    """Let the saves of these steps find a full disk."""
    real = checkpoint_module.write_json

    def write(path, value):
        if value.get("step") in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, value)

    monkeypatch.setattr(checkpoint_module, "write_json", write)


def test_a_failed_save_is_loud_and_training_goes_on(undisturbed, tmp_path, command, monkeypatch, capsys):
    fail_at({34}, monkeypatch)
    pretrain.setup(command())
    folder = tmp_path / "outputs" / "debug_test"
    assert losses(folder) == losses(undisturbed / "outputs" / "debug_test")
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000017", "step-00000040"]
    out = capsys.readouterr().out
    assert "CHECKPOINT NOT SAVED: No space left on device" in out.split("checkpoint step-00000040")[0]
    assert "not saved  the checkpoint of step 34" in out.split("parameters")[-1]
    assert json.loads((folder / "summary.json").read_text())["failed_saves"] == 1
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "save_error" in r] == [34]


def test_a_last_save_that_fails_is_an_error_that_the_same_command_mends(tmp_path, command, capsys, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        fail_at({STEPS}, patch)
        err = refused(command(), capsys)
    assert "No space left" in err and "step-00000034" in err
    pretrain.setup(command())
    folder = tmp_path / "outputs" / "debug_test"
    assert losses(folder) == losses(undisturbed / "outputs" / "debug_test")
    assert "step-00000040" in os.listdir(folder / "checkpoints")


def test_milestones_are_kept_over_resumes(tmp_path, command):
    """At each multiple of 1,000 tokens: steps 8 (1,024 tokens), 16, 24, 32 and 40 of 128 tokens each."""
    flags = {"save_step_interval": 4, "keep_checkpoints": 1, "milestone_tokens": 1000}
    for steps in (12, 27, STEPS):  # the ends of the two first parts are saved too
        pretrain.setup(command(**flags, total_tokens=steps * 128))
    folder = tmp_path / "outputs" / "debug_test" / "checkpoints"
    assert sorted(os.listdir(folder)) == [f"step-{step:08d}" for step in (8, 16, 24, 32, 40)]


def test_leftovers_of_kills_are_removed_even_where_nothing_is_left_to_train(copy, command):
    (copy / "checkpoints" / ".step-00000041.tmp").mkdir()
    (copy / "metrics.jsonl.123.tmp").write_text("x")
    (copy / ".loss.png.tmp").write_text("x")
    before = set(os.listdir(copy)) - {"metrics.jsonl.123.tmp", ".loss.png.tmp"}
    pretrain.setup(command())
    assert set(os.listdir(copy)) == before
    assert ".step-00000041.tmp" not in os.listdir(copy / "checkpoints")


@contextlib.contextmanager
def tmpfs(folder):
    """A disk of four megabytes at `folder`."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_during_saves_and_lines(undisturbed, tmp_path, command, monkeypatch, capsys):
    """The disk has no byte left from the end of step 18 to that of step 30; saves are due at 20, 25 and 30."""
    disk, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
    disk.mkdir()
    real = pretrain.Records.step

    def step(self, current):
        real(self, current)
        if current == 18:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if current == 28:
            checkpoints = disk / "outputs" / "debug_test" / "checkpoints"
            names = sorted(p.name for p in checkpoints.glob("step-*"))
            assert names == ["step-00000010", "step-00000015"]
            assert all(damage(checkpoints / name) is None for name in names)
        if current == 31:
            ballast.unlink()

    with tmpfs(disk):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain.Records, "step", step)
            pretrain.setup(command(output_root=disk, save_step_interval=5, keep_checkpoints=2))
        folder, reference = disk / "outputs" / "debug_test", undisturbed / "outputs" / "debug_test"
        assert losses(folder) == losses(reference)
        failed = [r for r in read_metrics(folder / "metrics.jsonl") if "save_error" in r]
        assert [r["step"] for r in failed] == [20, 25, 30] and "No space left" in failed[0]["save_error"]
        assert sorted(os.listdir(folder / "checkpoints")) == ["step-00000035", "step-00000040"]
        out = capsys.readouterr().out
        assert out.count("CHECKPOINT NOT SAVED: No space left on device") == 3
        assert (
            out.count("metrics.jsonl cannot be written: No space left") == 1
            and out.count("not saved  the checkpoint") == 3
        )


def test_a_start_on_a_full_disk_is_an_error_in_one_line(tmp_path, command, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    with tmpfs(disk):
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert "no space left on the disk of" in refused(command(output_root=disk), capsys)
        (disk / "ballast").unlink()
        pretrain.setup(command(output_root=disk, total_tokens=128))
