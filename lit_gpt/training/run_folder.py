"""The folder of a run: whose it is, and where its training left off."""

import fcntl
import shutil
from pathlib import Path
from typing import IO, Optional

import yaml

from lit_gpt.errors import UserError
from lit_gpt.files import write_atomically
from lit_gpt.training.checkpoint import newest_checkpoint, read_meta
from lit_gpt.training.records import read_metrics

LOCK = ".lock"


def open_run_folder(folder: Path, resolved: dict, tokenizer: Path, fresh: bool) -> IO:
    """Make the run folder this process's own while the returned lock is open; leave config.yaml and the tokenizer in
    it.

    Args:
        resolved: what config.yaml is to say.
        tokenizer: folder to copy, if it is there, so that a checkpoint can be sampled from without its data.
        fresh: empty the folder first.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / LOCK, "w")  # noqa: SIM115, held open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is training in {folder}. Wait for it, or use another --exp_name.") from error
    for item in folder.iterdir() if fresh else ():
        if item.name != LOCK:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    write_atomically(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    return lock


def checkpoint_to_resume(folder: Path) -> Optional[Path]:
    """The newest complete checkpoint of a run, None if it has not saved any yet.

    Raises:
        UserError: it has, and they are gone; such a run is not started over.
    """
    newest = newest_checkpoint(folder / "checkpoints")
    saved = [r["checkpoint"] for r in read_metrics(folder / "metrics.jsonl") if "checkpoint" in r]
    if newest is None and saved:
        raise UserError(
            f"{folder} has trained up to {saved[-1]}, but its checkpoints are gone. "
            "Put them back, or start over with another --exp_name."
        )
    return newest


def step_of(checkpoint: Path, identity: dict) -> int:
    """The step of a checkpoint. Raises UserError unless its model, data and batch are those of `identity`."""
    meta = read_meta(checkpoint)
    then, now = _flat({key: meta.get(key) for key in identity}), _flat(identity)
    other = [
        f"{key} ({then.get(key)} then, {now.get(key)} now)"
        for key in sorted({**then, **now})
        if then.get(key) != now.get(key)
    ]
    if other:
        raise UserError(
            f"{checkpoint} was trained with another {', '.join(other)}. Use the same, or another --exp_name."
        )
    return meta["step"]


def _flat(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
