"""What each rank of test_checkpoint_ranks.py does, in a process of its own."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_gpt.model import GPT
from lit_gpt.training import checkpoint_storage
from lit_gpt.training.checkpoint import Checkpoints
from lit_gpt.training.optimizer import OptimizerArgs, adamw
from lit_gpt.training.strategy import shard


def trained(seed: int, layout: str = "ddp") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after two steps down gradients that depend on each weight alone: the same however it is spread."""
    torch.manual_seed(seed)
    model = GPT.from_name("swa_gdn2_3M", n_layer=2, n_embd=32, intermediate_size=32, vocab_size=64)
    if layout != "ddp":
        world = dist.get_world_size()
        shape, names = ((2, world // 2), ("replicate", "shard")) if layout == "hsdp" else ((world,), ("shard",))
        shard(model, init_device_mesh("cpu", shape, mesh_dim_names=names), None)
    optimizer = adamw(model, OptimizerArgs())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.1 + 0.01
        optimizer.step()
    return model, optimizer


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every weight and every moment, gathered from the ranks."""
    moments = [optimizer.state[p][key] for p in model.parameters() for key in ("step", "exp_avg", "exp_avg_sq")]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in [*model.parameters(), *moments]]


def work(rank: int, world: int, folder: Path, save_as: str, load_as: str, broken: int | None) -> None:
    """Save steps 1 and 2 in one layout, load step 2 in another. The disk of rank `broken` is full during step 1."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    fabric = SimpleNamespace(global_rank=rank, world_size=world, is_global_zero=rank == 0, device=torch.device("cpu"))
    model, optimizer = trained(1, save_as)
    checkpoints, ended = Checkpoints(folder / "checkpoints", 3, fabric), []
    real = checkpoint_storage.write_tensors
    for step in (1, 2):

        def write(path, *args, step=step):
            if step == 1 and rank == broken:
                path.write_bytes(b"the beginning")
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, *args)

        checkpoint_storage.write_tensors = write
        checkpoints.save(model, optimizer, {"step": step, "tokens": step})
        checkpoints.wait()
        ended += checkpoints.finished()
    (folder / f"rank{rank}.json").write_text(json.dumps(ended))

    other, other_optimizer = trained(2, load_as)
    checkpoints.load(folder / "checkpoints" / "step-00000002", other, other_optimizer)
    for ours, theirs in zip(whole(model, optimizer), whole(other, other_optimizer)):
        assert torch.equal(ours, theirs)
    dist.barrier()
    dist.destroy_process_group()
