"""Checkpoints: folders `step-%08d` that are complete or not there, written while training goes on.

    step-00001000/
        model-00000.safetensors      the pieces of the model that rank 0 wrote, and so on for the other ranks
        optimizer-00000.safetensors  the same of AdamW's moments
        meta.json                    the position, the model's config, the data's fingerprint
        manifest.json                size and SHA-256 of each file, written last

- A save copies what this rank is to write to host memory at the end of a step; a thread writes it into a hidden folder,
  which is renamed when every rank has written. A kill at any instant leaves a whole checkpoint or none.
- A save that fails, as on a full disk, leaves the older checkpoints and the training alone; the next one tries again.
- Saved under any number of ranks and any sharding, loaded under any other (torch.distributed.checkpoint plans it).
- There is no generator state to keep: data order is a closed form of the position, and the model draws nothing while
  it trains. Nor is there a pickle: a checkpoint from anywhere can be opened without running anything of it.
"""

import contextlib
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

from lit_gpt.errors import UserError
from lit_gpt.files import sha256_of_file, sync_folder, write_json
from lit_gpt.training.checkpoint_manifest import FORMAT, META, complete_checkpoints, files_of, read_meta, write_manifest
from lit_gpt.training.checkpoint_storage import Reader, StagedPlanner, Writer, local, own_part

warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)  # on one process


class Checkpoints:
    """The checkpoints of one run, in a folder that it alone writes to. Every method is for all ranks together.

    Args:
        keep: newest checkpoints to keep.
        milestone_tokens: the first checkpoint at or after each multiple of this many tokens is kept for good; 0: none.

    As a context, it waits at its end for the save that is being written.
    """

    def __init__(self, folder: Path, keep: int, fabric: Fabric, milestone_tokens: int = 0):
        self.folder, self.keep, self.fabric, self.milestone_tokens = folder, keep, fabric, milestone_tokens
        self.tokens, self.damaged = 0, set()
        # A group of its own, so that what the writing threads agree on never meets what training does.
        self.group = dist.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.staged: dict[str, Tensor] = {}
        self.thread: Optional[threading.Thread] = None
        self.ended: list[dict] = []
        self.failure: Optional[str] = None
        """Why the last save failed, if it did."""
        if fabric.is_global_zero:
            sweep(self.folder)

    def go_on_from(self, tokens: int, damaged: Iterable[str]) -> None:
        """Say how many tokens the newest sound checkpoint has seen, and which checkpoints are damaged: those are
        neither counted nor removed.
        """
        self.tokens, self.damaged = tokens, set(damaged)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, meta: dict) -> None:
        """Take the state after meta["step"] and begin to write it; first wait until the save before is done.

        How it went is told by `finished`. meta: step, tokens and whatever else JSON can hold.
        """
        began = time.perf_counter()
        self.wait()
        tensors = own_part(_tensors(model, optimizer)[0], self.fabric.global_rank, self.fabric.world_size)
        copied = self._stage(tensors)
        if self.milestone_tokens:
            meta = {**meta, "milestone": meta["tokens"] // self.milestone_tokens > self.tokens // self.milestone_tokens}
        stall = time.perf_counter() - began
        self.thread = threading.Thread(target=self._write, args=(tensors, copied, meta, stall), daemon=True)
        self.thread.start()

    def finished(self) -> list[dict]:
        """The saves that ended since the last call, for the records: with `checkpoint`, its name, or `save_error`."""
        ended, self.ended = self.ended, []
        return ended

    def wait(self) -> None:
        """Wait until no save is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def require_saved(self) -> None:
        """Wait for the last save. Raises UserError if it failed."""
        self.wait()
        if self.failure:
            newest = max((p.name for p in complete_checkpoints(self.folder)), default=None)
            raise UserError(
                f"the last checkpoint could not be saved: {self.failure}. The newest in {self.folder} is "
                f"{newest or 'none at all'}. Mend that, and run the same command to go on from there."
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Optional[type], *rest) -> None:
        if kind is not None and self.thread is not None:
            self.thread.join(timeout=60)  # after an error another rank may never answer
        else:
            self.wait()

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill model and optimizer from a checkpoint. Raises UserError if it does not hold them."""
        tensors, state = _tensors(model, optimizer)
        files = [(f"{part}.", file) for part in ("model", "optimizer") for file in files_of(path, part)]
        _load(tensors, files, path, self.group)
        set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1])

    def _stage(self, tensors: dict[str, Tensor]) -> Optional[torch.cuda.Event]:
        """Begin to copy tensors to host memory, the same one at every save. Returns an event to wait for, if any.

        Copies from a GPU are queued behind the step that made the state and ahead of the next one, which changes it:
        this process does not wait for them.
        """
        cuda = self.fabric.device.type == "cuda"
        for name, tensor in tensors.items():
            source = local(tensor)
            if name not in self.staged:
                self.staged[name] = torch.empty_like(source, device="cpu", pin_memory=cuda)
            self.staged[name].copy_(source, non_blocking=True)
        if not cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, tensors: dict[str, Tensor], copied: Optional[torch.cuda.Event], meta: dict, stall: float) -> None:
        """Write what was staged. In a thread; its outcome goes to `ended` and `failure`."""
        began = time.perf_counter()
        path = self.folder / f"step-{meta['step']:08d}"
        record = {"step": meta["step"], "tokens": meta.get("tokens")}
        try:
            if copied is not None:
                copied.synchronize()
            write_checkpoint(path, tensors, self.staged, meta, self.fabric.global_rank, self.group)
            self.failure, self.tokens = None, meta.get("tokens", 0)
            record["checkpoint"] = path.name
            if self.fabric.is_global_zero:
                self._prune(path)
        except (Exception, CheckpointException) as error:  # the latter, no Exception, tells what failed on any rank
            self.failure = record["save_error"] = _reason(error)
        self.ended.append({**record, "seconds": time.perf_counter() - began, "stall_seconds": stall})

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints older than the last `keep`, but no milestones. What resists stays, for the next time."""
        self.damaged.discard(newest.name)
        older = [p for p in complete_checkpoints(self.folder) if p.name not in self.damaged and p <= newest]
        for path in older[: -self.keep]:
            with contextlib.suppress(OSError, UserError):
                if not read_meta(path).get("milestone"):
                    _remove(path)


def write_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    staged: dict[str, Tensor],
    meta: dict,
    rank: int = 0,
    group: Optional[dist.ProcessGroup] = None,
) -> None:
    """Write one checkpoint folder, all ranks of the group together: complete, or not at all.

    Args:
        tensors: {"model.<name>" or "optimizer.<name>": tensor}, those of which this rank saves its piece.
        staged: the same names and this rank's pieces on the CPU.
        meta: what the checkpoint says of itself.

    Raises:
        CheckpointException: some rank could not write.
    """
    temporary = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        sweep(path.parent)
        temporary.mkdir(parents=True)

    def commit(files: dict[str, dict]) -> None:
        write_json(temporary / META, {"format": FORMAT, **meta})
        size, digest = (temporary / META).stat().st_size, sha256_of_file(temporary / META)
        write_manifest(temporary, {**files, META: {"bytes": size, "sha256": digest}})
        if path.exists():  # a damaged one, or left by a run that was set back to an earlier checkpoint
            _remove(path)
        os.rename(temporary, path)
        sync_folder(path.parent)

    try:
        writer = Writer(temporary, rank, begin, commit)
        dcp.save(tensors, storage_writer=writer, planner=StagedPlanner(staged), process_group=group)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # there only after a failure


def sweep(folder: Path) -> None:
    """Remove what a kill during a save or a removal left behind."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def load_model(path: Path, model: nn.Module) -> None:
    """Fill only the model, from a checkpoint or one safetensors file, all ranks together. Raises UserError if they do
    not fit.
    """
    state = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    files = files_of(path, "model") if path.is_dir() else [path]
    _load(state, [("model.", file) for file in files], path, None)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], tuple[dict, dict]]:
    """Every tensor of model and optimizer by one name, and the two state dicts that they come from."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model_state.items()}
    for parameter, state in optimizer_state["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": tensor for name, tensor in state.items()}
    return tensors, (model_state, optimizer_state)


def _load(tensors: dict[str, Tensor], files: list, path: Path, group: Any) -> None:
    """Fill tensors from files, all ranks of the group together."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=Reader(files), planner=planner, process_group=group)
    except (Exception, CheckpointException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"checkpoint {path} cannot be read ({_reason(error)}).") from error


def _reason(error: BaseException) -> str:
    """One line of what went wrong, on whichever rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves no incomplete folder under its name."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
