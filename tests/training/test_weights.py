"""Weights in each of their forms: from a run to a file, back, sampled from, trained on."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import generate
import pretrain
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError
from lit_gpt.model import GPT
from lit_gpt.tensor_file import write_tensors
from lit_gpt.training.records import read_metrics
from lit_gpt.training.weights import Weights
from tests.runs import command_line

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import convert_checkpoint


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take longer than the training."""
    monkeypatch.setattr(pretrain.Records, "plot", lambda self: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_corpus, tiny_model):
    """A run folder with two checkpoints of a tiny model."""
    root = tmp_path_factory.mktemp("run")
    pretrain.setup(command_line(tiny_corpus, tiny_model, root, total_tokens=6 * 128, save_step_interval=3))
    return root / "outputs" / "debug_test"


def convert(source: Path, out: Path, *flags: str) -> Path:
    convert_checkpoint.main([f"--source={source}", f"--out={out}", *flags])
    return out


def loaded(path: Path) -> GPT:
    weights = Weights.find(path, lambda line: pytest.fail(line))
    torch.manual_seed(7)
    model = GPT(ModelConfig.from_dict(weights.meta["model"]))
    weights.load_into(model)
    return model


def same(a: GPT, b: GPT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def refused(capsys, main, argv) -> str:
    """The one line of error with which a program ends."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and err[-1].startswith("error: ")
    return err[-1]


def sampled(capsys, path: Path) -> str:
    flags = ["--temperature=0", "--max_new_tokens=20", "--prompt=Document", "--accelerator=cpu"]
    generate.main([f"--checkpoint={path}", *flags])
    return capsys.readouterr().out


def test_to_a_file_and_back_nothing_changes(run, tmp_path, capsys):
    file = convert(run, tmp_path / "shared" / "model.safetensors")
    again = convert(file, tmp_path / "again")
    out = capsys.readouterr().out
    assert "768 tokens" in out and str(file) in out
    assert same(loaded(run), loaded(file)) and same(loaded(run), loaded(again))
    metas = [Weights.find(path, print).meta for path in (run, file, again)]
    for key in ("model", "step", "tokens", "document_format"):
        assert metas[0][key] == metas[1][key] == metas[2][key]
    assert sorted(os.listdir(tmp_path / "shared")) == ["model.safetensors", "tokenizer"]
    assert sampled(capsys, run) == sampled(capsys, file) == sampled(capsys, again)


def test_the_file_is_what_others_expect(run, tmp_path):
    file = convert(run / "checkpoints" / "step-00000003", tmp_path / "model.safetensors")
    tensors, expected = safetensors.torch.load_file(file), loaded(run / "checkpoints" / "step-00000003").state_dict()
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["step"] == "3" and metadata["tokens"] == "384"
    assert ModelConfig.from_dict(json.loads(metadata["model"])).n_embd == 16


def test_bfloat16_rounds_matrices_alone(run, tmp_path):
    file = convert(run, tmp_path / "model.safetensors", "--dtype=bfloat16")
    for name, tensor in safetensors.torch.load_file(file).items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 2 else torch.float32), name
    rounded = loaded(convert(file, tmp_path / "again"))
    for ours, theirs in zip(rounded.parameters(), loaded(run).parameters()):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float() if theirs.ndim == 2 else theirs)


@pytest.mark.parametrize("form", ["run", "checkpoint", "file", "folder"])
def test_a_new_run_starts_from_any_form(form, run, tmp_path, tiny_corpus, tiny_model, capsys):
    """Its first loss is that of the trained weights, and its position, schedule and optimizer begin anew."""
    source = {"run": run, "checkpoint": run / "checkpoints" / "step-00000006"}.get(form)
    if source is None:
        source = convert(run, tmp_path / "model.safetensors")
        source = convert(source, tmp_path / "folder") if form == "folder" else source
    command = command_line(tiny_corpus, tiny_model, tmp_path, init_from=source, total_tokens=2 * 128)
    pretrain.setup(command)
    assert "starting from the weights" in capsys.readouterr().out
    from_scratch, ours = (
        read_metrics(run / "metrics.jsonl"),
        read_metrics(tmp_path / "outputs/debug_test/metrics.jsonl"),
    )
    assert ours[0]["step"] == 1 and ours[0]["tokens"] == 128 and ours[0]["lr"] == from_scratch[0]["lr"]
    assert ours[0]["loss"] < from_scratch[0]["loss"] - 0.2
    pretrain.setup(command)
    assert "finished" in capsys.readouterr().out  # from its own checkpoint now


def test_wrong_weights_end_in_one_line(run, tmp_path, tiny_corpus, tiny_model, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(tiny_model.read_text().replace("intermediate_size: 32", "intermediate_size: 48"))
    pretrain_with = lambda **flags: command_line(tiny_corpus, tiny_model, tmp_path, **flags)
    line = refused(capsys, pretrain.setup, pretrain_with(init_from=run, model_name=other))
    assert "intermediate_size (32 there)" in line
    assert "not there" in refused(capsys, pretrain.setup, pretrain_with(init_from="absent"))
    assert not (tmp_path / "outputs").exists()

    convert_with = lambda source, out, *flags: [f"--source={source}", f"--out={tmp_path / out}", *flags]
    assert "is there already" in refused(capsys, convert_checkpoint.main, convert_with(run, "other.yaml"))
    assert "--dtype" in refused(capsys, convert_checkpoint.main, convert_with(run, "new", "--dtype=bfloat16"))
    for out in ("other.yaml/new.safetensors", "other.yaml/new"):
        assert "cannot write to" in refused(capsys, convert_checkpoint.main, convert_with(run, out))
    write_tensors(tmp_path / "plain.safetensors", {"a": torch.zeros(2)}, {"format": "pt"})
    assert "of which model" in refused(
        capsys, convert_checkpoint.main, convert_with(tmp_path / "plain.safetensors", "x")
    )
    for model in ("null", "[" * 100_000, json.dumps("model")):
        metadata = {"lit_gpt_format": "1", "model": model, "step": "1", "tokens": "1"}
        write_tensors(tmp_path / "odd.safetensors", {"a": torch.zeros(2)}, metadata)
        assert "nothing sensible" in refused(
            capsys, convert_checkpoint.main, convert_with(tmp_path / "odd.safetensors", "x")
        )
    cut = tmp_path / "cut.safetensors"
    convert(run, cut)
    cut.write_bytes(cut.read_bytes()[:-4])
    assert "not a whole" in refused(capsys, convert_checkpoint.main, convert_with(cut, "x"))
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_of_a_run_is_passed_over_and_told(run, tmp_path):
    copy, told = shutil.copytree(run, tmp_path / "copy"), []
    file = copy / "checkpoints" / "step-00000006" / "model-00000.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    assert Weights.find(copy, told.append).path.name == "step-00000003"
    assert len(told) == 1 and "step-00000006 is damaged" in told[0] and "checksum" in told[0]
    with pytest.raises(UserError, match="step-00000006 is damaged"):
        Weights.find(file.parent, told.append)
