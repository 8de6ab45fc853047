"""Norms and gate statistics against direct computation."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

from lit_gpt.config import ModelConfig
from lit_gpt.model import GPT
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.health import GATES, examine, summary_line
from lit_gpt.training.plot import plot_health


@pytest.fixture
def examined(tiny_model):
    """A model with gradients, its first layer's gates pushed to their limits, a batch, and what examine says."""
    torch.manual_seed(0)
    config = ModelConfig.from_name(str(tiny_model))
    model = GPT(config)
    with torch.no_grad():
        model.transformer.h[0].mixer.in_proj.weight.mul_(200)
    tokens = torch.randint(0, config.vocab_size, (2, 33))
    batch = Batch(tokens, torch.tensor([0, 10, 32, 40, 64, 64], dtype=torch.int32))
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    fabric = Fabric(accelerator="cpu")
    return model, batch, examine(fabric, fabric.setup_module(model), batch)["health"]


def test_norms_add_up_to_those_of_all_parameters(examined):
    model, _, health = examined
    for which, tensors in (("grad", [p.grad for p in model.parameters()]), ("param", list(model.parameters()))):
        norms = health[f"{which}_norm"]
        total = torch.cat([t.detach().flatten() for t in tensors]).norm().item()
        assert norms["total"] == pytest.approx(total, rel=1e-4)
        assert math.hypot(*(v for k, v in norms.items() if k != "total")) == pytest.approx(total, rel=1e-4)
    assert set(norms) == {"total", "embedding", "head", "norms", "mlp", "gdn2", "swa"}
    block = torch.cat([p.grad.flatten() for p in model.transformer.h[1].parameters()]).norm().item()
    assert health["block_grad_norm"][1] == pytest.approx(block, rel=1e-4)


def test_gate_statistics_are_those_of_the_first_sequence(examined):
    model, batch, health = examined
    block = model.transformer.h[0]
    mixer = block.mixer
    x = block.norm_1(model.transformer.wte(batch.tokens[:1, :-1]))
    _, decay, erase, write, _ = mixer.in_proj(x).split(mixer.branches, dim=-1)
    g = -mixer.A_log.exp()[:, None] * F.softplus(mixer.decay_up(decay) + mixer.dt_bias).unflatten(-1, (2, -1))
    b, w = erase.sigmoid(), write.sigmoid()
    expected = {
        "decay": g.exp().mean(),
        "b_low": (b < 0.01).float().mean(),
        "b_high": (b > 0.99).float().mean(),
        "w_low": (w < 0.01).float().mean(),
        "w_high": (w > 0.99).float().mean(),
        "A_min": mixer.A_log.exp().min(),
        "A_max": mixer.A_log.exp().max(),
    }
    assert health["gdn2_layers"] == [0] and set(GATES) <= health.keys()
    assert expected["b_low"] > 0.05 and expected["w_high"] > 0.05  # the case is worth its name
    for name, value in expected.items():
        assert health[name] == pytest.approx([value.item()], rel=1e-4, abs=1e-6), name


def test_the_state_is_the_one_that_decoding_would_go_on_from(examined):
    """Of the last document of the first sequence, tokens 10 to 31."""
    model, batch, health = examined
    cache = model.new_cache(1)
    with torch.no_grad():
        model(batch.tokens[:1, 10:32], cache=cache)
    norms = cache[0].state.flatten(2).norm(dim=-1)
    assert health["state"] == pytest.approx([norms.mean().item()], rel=1e-3)
    assert health["state_max"] == pytest.approx([norms.max().item()], rel=1e-3)


def test_looking_leaves_no_hook_and_no_gradient_behind(examined):
    model, _, _ = examined
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_line_and_one_picture_for_people(examined, tmp_path):
    _, _, health = examined
    assert "decay" in summary_line(health) and "gradient" in summary_line(health)
    without = {k: v for k, v in health.items() if k.endswith("norm")} | {
        "grad_norm": {**health["grad_norm"], "mlp": None}
    }
    for i, last in enumerate((health, without)):
        plot_health([{"tokens": 1, "health": last}, {"tokens": 2, "health": last}], tmp_path / f"{i}.png", "run")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
