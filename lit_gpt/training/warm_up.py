"""Kernels compiled once: the cache of a run, and --warm_up, which fills it ahead of the run."""

import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from cache import CompileCache
from lit_gpt.config import ModelConfig
from lit_gpt.tokens.batch import Batch, segment_offsets
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.health import gate_statistics
from lit_gpt.training.optimizer import adamw
from lit_gpt.training.plan import Plan
from lit_gpt.training.strategy import build_model


def open_cache(fabric: Fabric, folder: Path) -> Optional[CompileCache]:
    """The compile cache in `folder`, mended, before any rank compiles; None on a CPU, for which nothing is compiled."""
    if fabric.device.type != "cuda":
        return None
    cache = CompileCache(folder, torch.cuda.get_device_capability(fabric.device))
    if fabric.is_global_zero:
        cache.mend()
    fabric.barrier()
    return cache


def warm_up(fabric: Fabric, args: PretrainArgs, plan: Plan, config: ModelConfig, cache: Optional[CompileCache]) -> str:
    """A training step on one micro-batch, a look at its health and, where the run evaluates, a validation block, of
    random tokens at the run's shapes. Returns a line that says what was compiled, on all ranks together.
    """
    if cache is None:
        return "warm-up: nothing to compile, as this run uses no GPU."
    began = time.perf_counter()
    model = build_model(fabric, config, args, args.seed)
    optimizer = fabric.setup_optimizers(adamw(model.module, args))
    fabric.backward(_losses(fabric, args, config.vocab_size, model, plan.micro_batch, args.sequence_length).mean())
    fabric.clip_gradients(model, optimizer, max_norm=args.grad_clip or float("inf"), error_if_nonfinite=False)
    optimizer.step()
    if args.health_step_interval:
        gate_statistics(fabric, model, _random_batch(args, config.vocab_size, 1, args.sequence_length))
    if plan.eval_blocks:
        model.eval()
        with torch.no_grad():
            _losses(fabric, args, config.vocab_size, model, 1, args.sequence_length * args.num_extrapol)
    counts = torch.tensor([cache.compiled, cache.found], device=fabric.device)
    compiled, found = fabric.all_reduce(counts, reduce_op="sum").tolist()
    seconds = time.perf_counter() - began
    ranks = f" by {fabric.world_size} ranks" if fabric.world_size > 1 else ""
    return f"warm-up: {compiled} kernels compiled{ranks}, {found} found in {cache.folder}, {seconds:.1f} s."


def _losses(
    fabric: Fabric, args: PretrainArgs, vocab_size: int, model: nn.Module, rows: int, length: int
) -> torch.Tensor:
    """[rows, length]: losses on random tokens."""
    tokens, bounds = fabric.to_device(_random_batch(args, vocab_size, rows, length))
    return model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=bounds, rows_apart=True)


def _random_batch(args: PretrainArgs, vocab_size: int, rows: int, length: int) -> Batch:
    """Random tokens, two documents to a row."""
    bounds = segment_offsets([np.array([length // 2])] * rows, length) if args.document_reset else None
    return Batch(torch.randint(vocab_size, (rows, length + 1)), bounds)
