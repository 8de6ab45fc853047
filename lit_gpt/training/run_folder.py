"""The folder of a run: whose it is, and where its training left off."""

import fcntl
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Optional, TypeVar

import yaml
from lightning.fabric import Fabric
from rich.console import Console

from lit_gpt.errors import UserError
from lit_gpt.files import explain_unwritable, write_atomically
from lit_gpt.tokens.storage import AnyPath, copy_folder
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.checkpoint_manifest import newest_sound, read_meta
from lit_gpt.training.records import read_metrics
from lit_gpt.training.weights import Weights

Answer = TypeVar("Answer")
LOCK = ".lock"
DATA_CHANGES = ("data.corpora.", "data.sequence_length", "data.shuffle_unit", "data.document_reset")
"""What of a run's identity --allow_data_change lets a resume change, and the batch with it."""


def open_run_folder(folder: Path, resolved: dict, tokenizer: AnyPath, fresh: bool) -> IO:
    """Make the run folder this process's own while the returned lock is open; leave config.yaml and the tokenizer in
    it.

    Args:
        resolved: what config.yaml is to say.
        tokenizer: folder or file to copy, if it is there, so that a checkpoint can be sampled from without its data.
        fresh: empty the folder first.

    Raises:
        UserError: another process has it, or nothing can be written there.
    """
    with explain_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115, held open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is training in {folder}. Wait for it, or use another --exp_name.") from error
    except OSError as error:  # as on Lustre mounted without -o flock
        text = (
            f"the file system of {folder} has no locks ({error.strerror}): make sure that one run alone trains there."
        )
        print(text, file=sys.stderr, flush=True)
    for item in folder.iterdir():
        if (fresh and item.name != LOCK) or item.suffix == ".tmp":  # the latter left by a kill
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    with explain_unwritable(folder):
        write_atomically(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
        copy_folder(tokenizer, folder / "tokenizer")
    return lock


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    checkpoint: Optional[Path] = None
    """Its own newest sound checkpoint, if it has saved any."""
    damaged: tuple[str, ...] = ()
    """Names of newer checkpoints, which are damaged."""
    weights: Optional[Weights] = None
    """Else those of --init_from, if given."""


def where_to_start(folder: Path, args: PretrainArgs, architecture: dict, console: Console) -> Start:
    """Look for the newest sound checkpoint of a run and for --init_from, and say what is wrong with newer ones.

    Raises:
        UserError: all checkpoints are damaged, or they are gone: such a run is not started over. Or the weights of
            --init_from are damaged, or of another model.
    """
    checkpoint, damaged = None, {}
    if not args.debug:
        with console.status("checking the newest checkpoint"):
            checkpoint, damaged = newest_sound(folder / "checkpoints")
        saved = [r["checkpoint"] for r in read_metrics(folder / "metrics.jsonl") if "checkpoint" in r]
        if checkpoint is None and saved:
            raise UserError(
                f"{folder} has trained up to {saved[-1]}, but its checkpoints are gone. "
                "Put them back, or start over with another --exp_name."
            )
    for name, reason in damaged.items():
        console.print(f"{name} is damaged and left as it is: {reason}.", soft_wrap=True)
    if checkpoint or not args.init_from:
        return Start(checkpoint, tuple(damaged))
    weights = Weights.find(args.init_from, console.print)
    then, now = _flat({"model": weights.meta["model"]}), _flat({"model": architecture})
    changed = [f"{key} ({then.get(key)} there)" for key in sorted({**then, **now}) if then.get(key) != now.get(key)]
    if changed:
        raise UserError(f"--init_from {args.init_from} is another model: {', '.join(changed)}. Use its --model_name.")
    return Start(weights=weights)


def decided_by_first(fabric: Fabric, decide: Callable[[], Answer]) -> Answer:
    """What `decide` returns on the first rank, on every rank; likewise the UserError that it raises."""
    answer = None
    if fabric.is_global_zero:
        try:
            answer = decide()
        except UserError as error:
            answer = error
    answer = fabric.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def resumable(checkpoint: Path, identity: dict, allow_data_change: bool) -> tuple[dict, list[str]]:
    """What a checkpoint says of itself, and in what its data differs from that of `identity`.

    Raises:
        UserError: it is of another model, or of other data or batches and that is not allowed.
    """
    meta = read_meta(checkpoint)
    then, now = _flat({key: meta.get(key) for key in identity}), _flat(identity)
    changed = [key for key in sorted({**then, **now}) if then.get(key) != now.get(key)]
    told = [
        f"{key[:32]} ({then.get(key)} then, {now.get(key)} now)" for key in changed
    ]  # not the whole hash of a corpus
    only_data = all(key.startswith(DATA_CHANGES) or key == "sequences_per_batch" for key in changed)
    if changed and not (only_data and allow_data_change):
        choice = "--allow_data_change, to go on with the new ones," if only_data else "the same,"
        raise UserError(f"{checkpoint} was trained with another {', '.join(told)}. Use {choice} or another --exp_name.")
    return meta, told


def _flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
