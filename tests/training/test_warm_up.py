"""--warm_up: the run's own shapes, once, and nothing left in the run folder."""

import types

import pytest
import torch
from lightning.fabric import Fabric

import pretrain
from lit_gpt.config import ModelConfig
from lit_gpt.model import GPT
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.plan import Plan
from lit_gpt.training.warm_up import open_cache, warm_up


def flags(root, corpus, model, **more) -> dict:
    values = {"train_data_dir": str(corpus), "output_root": root, "exp_name": "x", "model_name": str(model)}
    values |= {"train_config": "debug", "sequences_per_batch": 4, "sequence_length": 32, "micro_batch_size": 2}
    return values | {"total_tokens": 1280, "num_extrapol": 2, "accelerator": "cpu", **more}


@pytest.mark.parametrize("document_reset", [True, False])
def test_a_step_a_look_at_health_and_a_validation_block_at_the_shapes_of_the_run(
    document_reset, tiny_corpus, tiny_model, tmp_path, monkeypatch
):
    args = PretrainArgs(**flags(tmp_path, tiny_corpus, tiny_model, document_reset=document_reset))
    validation = types.SimpleNamespace(num_blocks=3)
    calls, forward = [], GPT.forward

    def watched(self, idx, targets=None, cu_seqlens=None, **options):
        calls.append((tuple(idx.shape), cu_seqlens is not None, torch.is_grad_enabled(), self.training))
        return forward(self, idx, targets, cu_seqlens, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    fabric = Fabric(accelerator="cpu", devices=1)
    cache = types.SimpleNamespace(compiled=5, found=7, folder="there")
    said = warm_up(fabric, args, Plan.make(args, 1, validation), ModelConfig.from_name(str(tiny_model)), cache)
    step, health, evaluation = ((2, 32), True, True), ((1, 32), False, True), ((1, 64), False, False)
    assert calls == [(shape, document_reset, *modes) for shape, *modes in (step, health, evaluation)]
    assert "5 kernels compiled, 7 found in there" in said


def test_without_a_gpu_it_says_so_and_leaves_nothing(tiny_corpus, tiny_model, tmp_path, capsys):
    assert open_cache(Fabric(accelerator="cpu", devices=1), tmp_path / "cache") is None
    values = flags(tmp_path, tiny_corpus, tiny_model)
    pretrain.setup([*(f"--{name}={value}" for name, value in values.items()), "--warm_up"])
    assert "warm-up: nothing to compile, as this run uses no GPU." in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
