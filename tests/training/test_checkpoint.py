"""Checkpoints are complete or absent, hold everything, and say so when they do not."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import threading

import pytest
import torch
from lightning.fabric import Fabric

from lit_gpt import GPT
from lit_gpt.errors import UserError
from lit_gpt.training import checkpoint as checkpoint_module
from lit_gpt.training.checkpoint import Checkpoints, load_model
from lit_gpt.training.checkpoint_manifest import complete_checkpoints, damage, newest_sound, read_meta, write_manifest
from lit_gpt.training.optimizer import OptimizerArgs, adamw


def trained(seed: int, steps: int = 2):
    torch.manual_seed(seed)
    model = GPT.from_name("swa_gdn2_3M", n_layer=2, n_embd=32, intermediate_size=32, vocab_size=64)
    optimizer = adamw(model, OptimizerArgs())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 17))
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(folder, **options) -> Checkpoints:
    return Checkpoints(folder, **{"keep": 2, "fabric": Fabric(accelerator="cpu", devices=1), **options})


@pytest.fixture
def checkpoints(tmp_path):
    return make(tmp_path / "checkpoints")


def save(checkpoints: Checkpoints, model, optimizer, step: int, **meta) -> dict:
    """Save, wait, and return how it went."""
    checkpoints.save(model, optimizer, {"step": step, "tokens": 10 * step, **meta})
    checkpoints.wait()
    return checkpoints.finished()[-1]


def steps_in(checkpoints: Checkpoints) -> list[int]:
    """The steps of the checkpoints, if nothing else lies beside them."""
    return [int(name.removeprefix("step-")) for name in sorted(os.listdir(checkpoints.folder))]


def test_model_and_optimizer_come_back_to_the_bit(checkpoints):
    model, optimizer = trained(seed=1)
    save(checkpoints, model, optimizer, 3)
    other, other_optimizer = trained(seed=2, steps=0)
    checkpoints.load(newest_sound(checkpoints.folder)[0], other, other_optimizer)
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key in ours:
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_options_of_the_optimizer_are_those_of_the_run_that_loads(checkpoints):
    save(checkpoints, *trained(seed=1), 3)
    model, _ = trained(seed=2, steps=0)
    optimizer = adamw(model, OptimizerArgs(weight_decay=0.5, beta2=0.99))
    checkpoints.load(newest_sound(checkpoints.folder)[0], model, optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert all(g["betas"] == (0.9, 0.99) for g in optimizer.param_groups)


def test_the_model_alone_can_be_read(checkpoints):
    model, optimizer = trained(seed=1)
    save(checkpoints, model, optimizer, 3)
    path, other = newest_sound(checkpoints.folder)[0], trained(seed=2, steps=0)[0]
    for file in path.glob("optimizer-*"):
        file.unlink()
    assert damage(path, parts=("model",)) is None and "optimizer-00000" in damage(path)
    load_model(path, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert read_meta(path)["tokens"] == 30


def test_what_is_saved_is_the_state_at_the_call_though_training_goes_on(checkpoints, monkeypatch):
    """The thread is held up until the model has changed."""
    changed, real = threading.Event(), checkpoint_module.dcp.save
    monkeypatch.setattr(checkpoint_module.dcp, "save", lambda *a, **k: (changed.wait(30), real(*a, **k)))
    for step in (1, 2):  # the second one copies into the memory of the first
        model, optimizer = trained(seed=step)
        before = [p.detach().clone() for p in model.parameters()]
        changed.clear()
        checkpoints.save(model, optimizer, {"step": step})
        train(model, optimizer, 1)
        assert checkpoints.thread.is_alive()
        changed.set()
        checkpoints.wait()
        other, _ = trained(seed=3, steps=0)
        load_model(newest_sound(checkpoints.folder)[0], other)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
        assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_there_is_never_more_than_one_save_at_a_time(checkpoints, monkeypatch):
    running, most, real = [], [], checkpoint_module.dcp.save

    def counted(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        real(*args, **kwargs)
        running.pop()

    monkeypatch.setattr(checkpoint_module.dcp, "save", counted)
    model, optimizer = trained(seed=1)
    with checkpoints:
        for step in range(1, 6):
            checkpoints.save(model, optimizer, {"step": step})
    assert most == [1] * 5 and steps_in(checkpoints) == [4, 5]
    assert [r["step"] for r in checkpoints.finished()] == [1, 2, 3, 4, 5] and checkpoints.finished() == []


def test_only_the_last_ones_are_kept_and_nothing_else_is_left(checkpoints):
    model, optimizer = trained(seed=1)
    for step in (1, 2, 3, 10):
        save(checkpoints, model, optimizer, step)
    assert steps_in(checkpoints) == [3, 10]


def test_milestones_stay(tmp_path):
    """The first save at or after each multiple of 35 tokens, with ten tokens a step; also over a restart."""
    model, optimizer = trained(seed=1)
    checkpoints = make(tmp_path, milestone_tokens=35, keep=1)
    for step in (1, 2, 3, 4, 5, 6):
        save(checkpoints, model, optimizer, step)
    assert steps_in(checkpoints) == [4, 6]
    checkpoints = make(tmp_path, milestone_tokens=35, keep=1)
    checkpoints.go_on_from(60, ())
    for step in (7, 8, 9, 14, 22, 23):
        save(checkpoints, model, optimizer, step)
    assert steps_in(checkpoints) == [4, 7, 14, 22, 23]


def test_a_failed_save_passes_its_milestone_on(tmp_path, monkeypatch):
    model, optimizer = trained(seed=1)
    checkpoints = make(tmp_path, milestone_tokens=35, keep=1)
    save(checkpoints, model, optimizer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_json", full)
        save(checkpoints, model, optimizer, 4)
    for step in (5, 6):
        save(checkpoints, model, optimizer, step)
    assert steps_in(checkpoints) == [5, 6]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["dcp.save", "write_json", "write_manifest", "os.rename"])
def test_a_save_that_fails_leaves_the_one_before_and_the_next_one_works(checkpoints, monkeypatch, moment):
    model, optimizer = trained(seed=1)
    save(checkpoints, model, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"lit_gpt.training.checkpoint.{moment}", full)
        record = save(checkpoints, model, optimizer, 2)
    assert record["save_error"] == "No space left on device" and "checkpoint" not in record and record["step"] == 2
    assert steps_in(checkpoints) == [1] and damage(checkpoints.folder / "step-00000001") is None
    with pytest.raises(UserError, match=r"No space left.*step-00000001") as error:
        checkpoints.require_saved()
    assert "\n" not in str(error.value)
    assert save(checkpoints, model, optimizer, 3)["checkpoint"] == "step-00000003"
    checkpoints.require_saved()
    assert steps_in(checkpoints) == [1, 3]


def test_old_ones_go_only_when_the_new_one_is_complete(checkpoints, monkeypatch):
    model, optimizer = trained(seed=1)
    for step in (1, 2):
        save(checkpoints, model, optimizer, step)
    seen, real = [], checkpoint_module._remove
    monkeypatch.setattr(checkpoint_module, "_remove", lambda path: (seen.append(steps_in(checkpoints)), real(path)))
    save(checkpoints, model, optimizer, 3)
    assert seen == [[1, 2, 3]] and steps_in(checkpoints) == [2, 3]


def test_what_a_kill_left_is_swept_at_the_start(tmp_path):
    for name in (".step-00000002.tmp", ".step-00000001.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00000.safetensors").write_bytes(b"x")
    make(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    checkpoints = make(folder, keep=3)
    for step in (1, 2, 3):
        save(checkpoints, *trained(seed=step), step)
    return folder


FILES = ("model-00000.safetensors", "optimizer-00000.safetensors", "meta.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "extend"])
def test_a_damaged_checkpoint_is_passed_over_and_left(three, tmp_path, name, how):
    folder = shutil.copytree(three, tmp_path / "copy")
    file = folder / "step-00000003" / name
    content = file.read_bytes()
    assert sorted(os.listdir(file.parent)) == sorted(FILES)
    places = range(0, len(content), max(1, len(content) // 8)) if how == "flip" else [len(content) // 2]
    for place in [*places, len(content) - 1]:
        flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        damaged = {"flip": flipped, "truncate": content[:place], "extend": content + b"\n", "remove": b""}[how]
        file.write_bytes(damaged)
        if how == "remove":
            file.unlink()
        newest, found = newest_sound(folder)
        assert newest.name == "step-00000002" and list(found) == ["step-00000003"]
        assert name in found["step-00000003"] and "\n" not in found["step-00000003"]
        assert how == "remove" or file.read_bytes() == damaged


def test_every_byte_of_a_manifest_counts(three, tmp_path):
    path = shutil.copytree(three / "step-00000003", tmp_path / "step-00000003")
    content = (path / "manifest.json").read_bytes()
    for place in range(len(content)):
        for flip in (1, 0x20, 0x80):
            (path / "manifest.json").write_bytes(
                content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
            )
            assert damage(path) is not None, (place, flip)


def test_all_damaged_is_an_error_in_one_line(three, tmp_path):
    folder = shutil.copytree(three, tmp_path / "copy")
    for path in complete_checkpoints(folder):
        (path / "model-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"step-00000003 .*step-00000002 .*step-00000001") as error:
        newest_sound(folder)
    assert "\n" not in str(error.value)
    assert newest_sound(tmp_path / "empty") == (None, {})


def test_damaged_ones_are_neither_counted_nor_removed_until_saved_again(three, tmp_path):
    folder = shutil.copytree(three, tmp_path / "copy")
    (folder / "step-00000002" / "meta.json").write_text("")
    (folder / "step-00000003" / "meta.json").write_text("")
    _, damaged = newest_sound(folder)
    checkpoints = make(folder, keep=1)
    checkpoints.go_on_from(10, damaged)
    model, optimizer = trained(seed=1)
    save(checkpoints, model, optimizer, 2)
    assert steps_in(checkpoints) == [2, 3] and damage(folder / "step-00000002") is None
    save(checkpoints, model, optimizer, 4)
    assert steps_in(checkpoints) == [3, 4] and damage(folder / "step-00000003") is not None


def test_another_model_is_refused_in_one_line(checkpoints):
    save(checkpoints, *trained(seed=1), 1)
    model = GPT.from_name("swa_gdn2_3M", n_layer=2, n_embd=64, intermediate_size=32, vocab_size=64)
    with pytest.raises(UserError, match=r"cannot be read.*[Ss]ize mismatch") as error:
        checkpoints.load(checkpoints.folder / "step-00000001", model, adamw(model, OptimizerArgs()))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_checkpoint_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_meta(tmp_path)


def test_nothing_is_pickled_and_no_pickle_is_opened(three, tmp_path, monkeypatch):
    """The files are plain, and a pickle put in their place, with a manifest that vouches for it, is not executed."""
    folder = shutil.copytree(three, tmp_path / "copy")
    path = folder / "step-00000003"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    bomb = pickle.dumps(Payload())
    for name in ("model-00000.safetensors", ".metadata"):
        (path / name).write_bytes(bomb)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["model-00000.safetensors"] = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
    write_manifest(path, files)
    assert damage(path) is None
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(path, trained(seed=1, steps=0)[0])
    assert not (tmp_path / "executed").exists()
