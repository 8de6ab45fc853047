"""The batch of a skipped step: kept by the rank that had it, and run again to see what was wrong with it."""

import contextlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.files import write_atomically
from lit_gpt.model import GPT
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.checkpoint_manifest import complete_checkpoints, damage, read_meta
from lit_gpt.training.health import block_of, grouped, kind_of, norms_of


@dataclass
class KeptBatch:
    """One rank's part of the batch of `step`, whose loss and gradient norm, over all ranks, were these."""

    step: int
    rank: int
    world_size: int
    loss: float
    grad_norm: float
    sequences: list[np.ndarray]
    """For each micro-batch, the numbers of its sequences in the run [micro_batch]."""
    batches: list[Batch]

    def save(self, path: Path) -> None:
        """Write it as a NumPy archive, without pickles; token ids are kept as uint32."""
        arrays = {name: getattr(self, name) for name in ("step", "rank", "world_size", "loss", "grad_norm")}
        for i, (sequences, batch) in enumerate(zip(self.sequences, self.batches)):
            arrays |= {f"sequences_{i}": sequences, f"tokens_{i}": batch.tokens.numpy().astype(np.uint32)}
            if batch.cu_seqlens is not None:
                arrays[f"cu_seqlens_{i}"] = batch.cu_seqlens.numpy()
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())

    @classmethod
    def open(cls, path: Path) -> "KeptBatch":
        """Raises UserError if the file is not one that `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                count = sum(name.startswith("tokens_") for name in arrays)
                batches, sequences = [], []
                for i in range(count):
                    offsets = torch.from_numpy(arrays[f"cu_seqlens_{i}"]) if f"cu_seqlens_{i}" in arrays else None
                    batches.append(Batch(torch.from_numpy(arrays[f"tokens_{i}"].astype(np.int64)), offsets))
                    sequences.append(arrays[f"sequences_{i}"])
                facts = {name: arrays[name].item() for name in ("step", "rank", "world_size", "loss", "grad_norm")}
                return cls(**facts, sequences=sequences, batches=batches)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is no batch that a run kept: those are in <run folder>/skipped.") from error


def checkpoint_before(folder: Path, step: int) -> tuple[Path, dict]:
    """The newest sound checkpoint of a run at or before `step`, and its meta.

    One of the step itself has the weights that the step was tried with, since it was skipped.

    Raises:
        UserError: there is none.
    """
    for path in reversed(complete_checkpoints(folder / "checkpoints")):
        if int(path.name.removeprefix("step-")) <= step and damage(path, ("model",)) is None:
            return path, read_meta(path)
    raise UserError(
        f"{folder} has no sound checkpoint at or before step {step}: the weights that the batch met are not kept."
    )


@dataclass
class Replay:
    """What a batch does to a model."""

    losses: list[Tensor]
    """For each micro-batch, the mean loss of each sequence [micro_batch]."""
    grad_norms: dict[str, float]
    """Norm of the gradient of this rank's mean loss: `total`, by kind and by block."""
    first_not_finite: Optional[str]
    """The first tensor, in the order of computation, with a number that is not finite."""


def replay(model: GPT, batches: Sequence[Batch], bf16: bool, on_batch: Callable[[], None]) -> Replay:
    """Run batches forward and backward as a training step does. `on_batch` is called after each."""
    device, found, losses = model.lm_head.weight.device, [], []
    found += [f"parameter {name}" for name, p in model.named_parameters() if not p.isfinite().all()]

    def look_at_output(name: str, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"output of {name or 'the model'}")

    def look_at_gradient(name: str, parameter: Tensor) -> None:
        if not parameter.grad.isfinite().all():
            found.append(f"gradient of {name}")

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look_at_output(name, output))
        for name, module in model.named_modules()
    ]
    hooks += [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: look_at_gradient(name, p))
        for name, parameter in model.named_parameters()
    ]
    for batch in batches:
        tokens = batch.tokens.to(device)
        offsets = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=offsets, rows_apart=True)
        (loss.mean() / len(batches)).backward()
        losses.append(loss.detach().float().mean(dim=1).cpu())
        on_batch()
    for hook in hooks:
        hook.remove()
    names, gradients = zip(*((name, p.grad) for name, p in model.named_parameters()))
    norms = norms_of(gradients).tolist()
    by_kind = grouped(norms, [kind_of(name, model.config) for name in names])
    by_block = grouped(norms, [block_of(name) for name in names])
    return Replay(losses, by_kind | by_block, found[0] if found else None)
