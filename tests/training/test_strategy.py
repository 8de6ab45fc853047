"""Strategies compute the same: one process here, the same checks on several ranks in strategy_worker.py."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt import GPT
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError
from lit_gpt.training.memory import estimate
from lit_gpt.training.optimizer import OptimizerArgs, adamw
from lit_gpt.training.strategy import Layout, StrategyArgs, build_fabric, build_model

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
TINY = {"n_layer": 2, "n_embd": 32, "intermediate_size": 48, "vocab_size": 64}


@pytest.mark.parametrize(
    "asked, parameters, nodes, devices, memory, expected",
    [
        ("auto", 1.4e9, 1, 1, 80, ("single", 1, 1)),
        ("auto", 1.4e9, 1, 8, 80, ("ddp", 8, 1)),
        ("auto", 1.4e9, 4, 8, 80, ("ddp", 32, 1)),
        ("auto", 1.4e9, 1, 8, 40, ("fsdp2", 1, 8)),
        ("auto", 7e9, 1, 8, 80, ("fsdp2", 1, 8)),
        ("auto", 7e9, 4, 8, 80, ("hsdp", 4, 8)),
        ("auto", 7e9, 1, 2, None, ("ddp", 2, 1)),
        ("fsdp2", 3e6, 2, 4, 80, ("fsdp2", 1, 8)),
        ("hsdp", 3e6, 2, 4, 80, ("hsdp", 2, 4)),
        ("ddp", 7e9, 1, 1, 80, ("ddp", 1, 1)),
    ],
)
def test_a_strategy_is_chosen_by_size_and_nodes(asked, parameters, nodes, devices, memory, expected):
    memory = memory and memory * GIB
    layout = Layout.choose(StrategyArgs(strategy=asked), int(parameters), nodes, devices, memory)
    assert (layout.strategy, layout.replicas, layout.shards) == expected


def test_a_shard_size_of_ones_own_and_those_that_do_not_fit():
    layout = Layout.choose(StrategyArgs(strategy="hsdp", shard_size=2), 1, 1, 8, None)
    assert (layout.replicas, layout.shards) == (4, 2)
    with pytest.raises(UserError, match=r"--shard_size 3 does not divide 8 devices\. Use 1, 2, 4, 8\."):
        Layout.choose(StrategyArgs(strategy="hsdp", shard_size=3), 1, 1, 8, None)
    with pytest.raises(UserError, match="--strategy hsdp only"):
        Layout.choose(StrategyArgs(strategy="fsdp2", shard_size=2), 1, 1, 8, None)


def single(recompute: str = "none", **overrides):
    config = ModelConfig.from_name("swa_gdn2_3M", **{**TINY, **overrides})
    layout = Layout.choose(StrategyArgs(), 1, 1, 1, None)
    fabric = build_fabric(layout, 1, 1, cuda=False, environment=None)
    return fabric, build_model(fabric, config, StrategyArgs(activation_checkpointing=recompute), seed=7), layout


@pytest.mark.parametrize("tied", [True, False])
def test_a_seed_means_the_weights_that_building_the_model_on_a_cpu_gives(tied):
    _, model, _ = single(tie_embeddings=tied)
    torch.manual_seed(7)
    expected = GPT.from_name("swa_gdn2_3M", **TINY, tie_embeddings=tied)
    ours = dict(model.module.named_parameters())
    assert ours.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(ours[name], parameter) for name, parameter in expected.named_parameters())
    assert (model.module.lm_head.weight is model.module.transformer.wte.weight) == tied


class Products(TorchDispatchMode):
    """Counts matrix products and softmax attentions."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count["products"] += name in ("mm", "addmm")
        self.count["attentions"] += name == "_scaled_dot_product_flash_attention_for_cpu"
        self.count["norms"] += name in ("rms_norm", "_fused_rms_norm")
        return func(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_what_is_computed_again_and_no_gradient():
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 13, 40, 80])
    gradients, forward, backward = {}, {}, {}
    for mode in ("none", "selective", "full"):
        _, model, _ = single(mode, attention={"num_heads": 2, "head_dim": 16, "window": 16})
        with Products() as seen:
            loss = model(ids, ids, cu_seqlens=offsets, rows_apart=True).mean()
        forward[mode] = seen.count
        with Products() as seen:
            loss.backward()
        backward[mode] = seen.count
        gradients[mode] = {name: p.grad for name, p in model.module.named_parameters()}
    for mode in ("selective", "full"):
        assert gradients[mode].keys() == gradients["none"].keys()
        assert all(torch.equal(gradients[mode][name], g) for name, g in gradients["none"].items())
    products = {mode: count["products"] for mode, count in backward.items()}
    assert products["selective"] == products["none"] < products["full"]
    attentions = {mode: count["attentions"] for mode, count in backward.items()}
    assert attentions == {"none": 0, "selective": 0, "full": forward["none"]["attentions"]} and attentions["full"] > 0


def test_the_estimate_of_the_states_is_what_they_take():
    _, model, layout = single()
    optimizer = adamw(model.module, OptimizerArgs())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids, ids).mean().backward()
    optimizer.step()
    memory = estimate(model.module.config, layout, 8, 8, "none", cuda=False, documents=False)
    parameters = list(model.module.parameters())
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters)
    assert memory.adam == sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def test_the_estimate_grows_with_the_micro_batch_and_shrinks_with_shards_and_checkpointing():
    config = ModelConfig.from_name("swa_gdn2_1.3B")

    def total(tokens=4096, recompute="none", strategy="ddp"):
        layout = Layout.choose(StrategyArgs(strategy=strategy), 1, 1, 8, None)
        return estimate(config, layout, tokens, 4096, recompute, cuda=True, documents=True).total

    assert total(8192) - total(4096) == total(12288) - total(8192) > 0
    assert total(16384) > total(16384, "selective") > total(16384, "full") > total(16384, "full", "fsdp2")
    assert 20 * GIB < total() < 60 * GIB


def on_ranks(ranks: int, strategy: str, shard_size: int = 0) -> None:
    """Run strategy_worker.py, in a process of its own since a supervisor takes over signals."""
    worker = [sys.executable, str(ROOT / "tests" / "training" / "strategy_worker.py"), strategy, str(shard_size)]
    program = f"import sys; from lit_gpt.training.ranks import supervise; sys.exit(supervise({worker}, 1, {ranks}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=300)


def test_two_shards_hold_the_same_model_and_the_same_gradient():
    on_ranks(2, "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, strategy, shard_size", [(3, "fsdp2", 0), (4, "hsdp", 2), (4, "ddp", 0), (3, "hsdp", 1)]
)
def test_the_same_on_more_ranks(ranks, strategy, shard_size):
    on_ranks(ranks, strategy, shard_size)
