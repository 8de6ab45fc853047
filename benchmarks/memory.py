"""The memory estimate of --dry_run against what a GPU really takes, for models and ways of recomputing.

python benchmarks/memory.py [model ...]
"""

import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lit_gpt.config import ModelConfig
from lit_gpt.model import count_parameters
from lit_gpt.training.memory import estimate
from lit_gpt.training.optimizer import OptimizerArgs, adamw
from lit_gpt.training.strategy import Layout, StrategyArgs, build_fabric, build_model

LENGTH = 4096
GIB = 2**30


def measure(fabric: Fabric, model: nn.Module, stepper: Optimizer, rows: int, documents: bool) -> tuple[int, float]:
    """Peak bytes of three steps of two micro-batches, and the last loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.module.config.vocab_size, (rows, LENGTH + 1), generator=generator).to(fabric.device)
    offsets = torch.arange(0, rows * LENGTH + 1, 512, device=fabric.device) if documents else None
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        for last in (False, True):
            with fabric.no_backward_sync(model, enabled=fabric.world_size > 1 and not last):
                loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=offsets, rows_apart=True).mean()
                fabric.backward(loss)
        fabric.clip_gradients(model, stepper, max_norm=1.0, error_if_nonfinite=False)
        stepper.step()
        stepper.zero_grad()
    return torch.cuda.max_memory_allocated(), loss.item()


def main(names: list[str]) -> None:
    console = Console(width=150)
    table = Table(
        "model", "strategy", "rows", "recompute", "documents", "states", "estimate", "measured", "ratio", "loss"
    )
    for name in names or ["swa_gdn2_125M", "swa_gdn2_1.3B"]:
        config = ModelConfig.from_name(name)
        for strategy in ("auto", "fsdp2"):
            layout = Layout.choose(StrategyArgs(strategy=strategy), count_parameters(config)[1], 1, 1, None)
            fabric = build_fabric(layout, 1, 1, cuda=True, environment=None)
            fabric.launch()
            for recompute in ("none", "selective", "full"):
                began = time.perf_counter()
                model = build_model(fabric, config, StrategyArgs(activation_checkpointing=recompute), seed=1)
                built = time.perf_counter() - began
                stepper = fabric.setup_optimizers(adamw(model.module, OptimizerArgs()))
                print(f"{name}: built in {built:.1f} s", flush=True)
                for rows, documents in ((1, False), (4, False), (4, True)):
                    peak, loss = measure(fabric, model, stepper, rows, documents)
                    guess = estimate(config, layout, rows * LENGTH, LENGTH, recompute, True, documents)
                    cells = [f"{x / GIB:.2f}" for x in (guess.states, guess.total, peak)]
                    shown = [name, layout.strategy, str(rows), recompute, str(documents), *cells]
                    table.add_row(*shown, f"{guess.total / peak:.2f}", f"{loss:.5f}")
                    print(*shown, f"{loss:.6f}", {k: round(v / GIB, 3) for k, v in vars(guess).items()}, flush=True)
                del model, stepper
                gc.collect()  # modules and their hooks refer to each other
                torch.cuda.empty_cache()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
