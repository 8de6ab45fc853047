"""One rank of a strategy, checked against a whole model: python strategy_worker.py <strategy> <shard size>"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed.tensor import DTensor

from lit_gpt import GPT
from lit_gpt.config import ModelConfig
from lit_gpt.training.memory import estimate
from lit_gpt.training.optimizer import OptimizerArgs, adamw
from lit_gpt.training.ranks import ending_together
from lit_gpt.training.strategy import Layout, StrategyArgs, build_fabric, build_model

MICRO_BATCHES, LENGTH = 3, 24


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def nbytes(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def main(strategy: str, shard_size: int) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    layout = Layout.choose(StrategyArgs(strategy=strategy, shard_size=shard_size), 1, 1, world_size, None)
    fabric = build_fabric(layout, 1, world_size, False, LightningEnvironment())
    fabric.launch()
    with ending_together():
        for tied in (True, False):
            check(fabric, layout, tied)


def check(fabric, layout: Layout, tied: bool) -> None:
    # 33 rows and 50 tokens divide by nothing, so that shards are uneven
    sizes = {"n_layer": 2, "n_embd": 33, "intermediate_size": 50, "vocab_size": 50, "tie_embeddings": tied}
    config = ModelConfig.from_name("swa_gdn2_3M", **sizes)
    model = build_model(fabric, config, StrategyArgs(activation_checkpointing="selective"), seed=7)
    optimizer = adamw(model.module, OptimizerArgs())
    wrapped = fabric.setup_optimizers(optimizer)
    torch.manual_seed(7)
    reference = GPT(config)
    expected = adamw(reference, OptimizerArgs())
    for group in (*optimizer.param_groups, *expected.param_groups):
        group["lr"] = 1e-2
    for name, parameter in reference.named_parameters():  # the same weights
        assert torch.equal(whole(model.module.get_parameter(name)), parameter), name

    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        ids = torch.randint(0, 50, (fabric.world_size * MICRO_BATCHES, LENGTH), generator=generator)
        mine = ids.chunk(fabric.world_size)[fabric.global_rank]
        for i, row in enumerate(mine.split(1)):
            with fabric.no_backward_sync(model, enabled=i < MICRO_BATCHES - 1):
                fabric.backward(model(row, row).mean() / MICRO_BATCHES)
        norm = fabric.clip_gradients(model, wrapped, max_norm=0.5, error_if_nonfinite=False)
        reference(ids, ids).mean().backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)  # the gradient of the global batch
        for name, parameter in reference.named_parameters():
            ours = model.module.get_parameter(name)
            torch.testing.assert_close(whole(ours.grad), parameter.grad, rtol=1e-4, atol=1e-6)
        wrapped.step()
        expected.step()
        states = (model.module.parameters(), [p.grad for p in model.module.parameters()], moments(optimizer))
        taken = [sum(nbytes(t) for t in tensors) for tensors in states]
        wrapped.zero_grad()
        expected.zero_grad()
        for name, parameter in reference.named_parameters():
            ours = whole(model.module.get_parameter(name))
            torch.testing.assert_close(ours, parameter, rtol=1e-3, atol=2e-4)  # Adam divides by what is next to nothing
            parameter.data.copy_(ours)  # the next gradients are then of the same weights

    memory = estimate(config, layout, LENGTH, LENGTH, "none", cuda=False, documents=False)
    if fabric.is_global_zero:  # the fullest
        assert taken == [memory.weights, memory.gradients, memory.adam], (taken, memory)

    before = {name: whole(p).clone() for name, p in model.module.named_parameters()}
    optimizer.found_inf = torch.ones(())  # as the guard does: the step is left out on shards too
    fabric.backward(model(mine[:1], mine[:1]).mean())
    wrapped.step()
    assert all(torch.equal(whole(p), before[name]) for name, p in model.module.named_parameters())


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
