"""Checkpoints are complete or absent, and hold everything."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric

from lit_gpt import GPT
from lit_gpt.errors import UserError
from lit_gpt.training.checkpoint import Checkpoints, complete_checkpoints, load_model, newest_checkpoint, read_meta
from lit_gpt.training.optimizer import OptimizerArgs, adamw


def trained(seed: int, steps: int = 2):
    torch.manual_seed(seed)
    model = GPT.from_name("swa_gdn2_3M", n_layer=2, n_embd=32, intermediate_size=32, vocab_size=64)
    optimizer = adamw(model, OptimizerArgs())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 17))
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2, fabric=Fabric(accelerator="cpu"))


def test_model_and_optimizer_come_back_to_the_bit(checkpoints):
    model, optimizer = trained(seed=1)
    checkpoints.save(model, optimizer, {"step": 3})
    other, other_optimizer = trained(seed=2, steps=0)
    checkpoints.load(newest_checkpoint(checkpoints.folder), other, other_optimizer)
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key in ours:
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_the_model_alone_can_be_read(checkpoints):
    model, optimizer = trained(seed=1)
    checkpoints.save(model, optimizer, {"step": 3, "tokens": 9})
    other, _ = trained(seed=2, steps=0)
    load_model(newest_checkpoint(checkpoints.folder), other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert read_meta(newest_checkpoint(checkpoints.folder))["tokens"] == 9


def test_only_the_last_ones_are_kept_and_nothing_else_is_left(checkpoints):
    model, optimizer = trained(seed=1)
    for step in (1, 2, 3, 10):
        checkpoints.save(model, optimizer, {"step": step})
    assert [p.name for p in complete_checkpoints(checkpoints.folder)] == ["step-00000003", "step-00000010"]
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("moment", ["before the data", "after the data", "before the rename"])
def test_a_save_that_dies_leaves_the_one_before_and_the_next_save_cleans_up(checkpoints, monkeypatch, moment):
    model, optimizer = trained(seed=1)
    checkpoints.save(model, optimizer, {"step": 1})

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    target, replacement = {
        "before the data": ("dcp.save", fail),
        "after the data": ("write_json", fail),
        "before the rename": ("os", SimpleNamespace(rename=fail)),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(f"lit_gpt.training.checkpoint.{target}", replacement)
        with pytest.raises(OSError):
            checkpoints.save(model, optimizer, {"step": 2})
    assert newest_checkpoint(checkpoints.folder).name == "step-00000001"
    checkpoints.save(model, optimizer, {"step": 3})
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000001", "step-00000003"]


def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoints):
    model, optimizer = trained(seed=1)
    checkpoints.save(model, optimizer, {"step": 1})
    path = newest_checkpoint(checkpoints.folder)
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read") as error:
        checkpoints.load(path, model, optimizer)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_folder_that_is_no_checkpoint_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_meta(tmp_path)
