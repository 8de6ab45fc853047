"""Checkpoints: folders `step-%08d` that are complete or not there.

A checkpoint is written into a hidden folder beside its place and renamed when every rank has written its part. It holds
the model and the optimizer (torch.distributed.checkpoint) and `meta.json`: the position, the model's config, the data's
fingerprint. There is no generator state to keep: data order is a closed form of the position, and the model draws
nothing while it trains.
"""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lit_gpt.errors import UserError
from lit_gpt.files import sync_folder, write_json

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path, keep: int, fabric: Fabric):
        self.folder, self.keep, self.fabric = folder, keep, fabric

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> dict:
        """Write the checkpoint of meta["step"], all ranks together, then drop those older than the last `keep`.

        Returns its name and the seconds that it took.
        """
        began = time.perf_counter()
        path = self.folder / f"step-{meta['step']:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self.fabric.is_global_zero:
            self._sweep()
            temporary.mkdir(parents=True)
        self.fabric.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with _quiet():
            dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=temporary)
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            write_json(temporary / "meta.json", {"format": FORMAT, **meta})
            if path.exists():  # left by a run that was set back to an earlier checkpoint
                _remove(path)
            os.rename(temporary, path)
            sync_folder(self.folder)
            for old in complete_checkpoints(self.folder)[: -self.keep]:
                _remove(old)
        self.fabric.barrier()
        return {"checkpoint": path.name, "seconds": time.perf_counter() - began}

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill model and optimizer from a checkpoint, all ranks together. Raises UserError if it cannot be read."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        _load(state, path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _sweep(self) -> None:
        """Remove what a kill during a save or a removal left behind."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)


def load_model(path: Path, model: nn.Module) -> None:
    """Fill only the model from a checkpoint. Raises UserError if it cannot be read."""
    state = {"model": model.state_dict()}
    _load(state, path)
    model.load_state_dict(state["model"])


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest complete checkpoint in a folder, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def read_meta(path: Path) -> dict:
    """What a checkpoint says of itself. Raises UserError if the folder is not a checkpoint of a format that we read."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint: {error}. Remove the folder to go on from the one before."
        ) from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {meta.get('format')!r}; this version reads {FORMAT}.")
    return meta


def _load(state: dict, path: Path) -> None:
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=path)
    except (Exception, CheckpointException) as error:  # the latter, no Exception, wraps whatever went wrong on any rank
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}). Remove the folder to go on from the one before."
        ) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no incomplete folder under its name."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


@contextmanager
def _quiet() -> Iterator[None]:
    """Saving without torch.distributed is intended on one process; the library warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
