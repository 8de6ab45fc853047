"""A run of a few seconds, and its records."""

import contextlib
import multiprocessing
import os
from pathlib import Path

from lit_gpt.training.records import read_metrics

STEPS = 40
"""Steps of the run that `command_line` describes, each of 4 sequences of 32 tokens."""


def command_line(corpus: Path, model: Path, root: Path, **others) -> list[str]:
    """The command line of a run in `<root>/outputs/debug_test`."""
    values = {
        "train_data_dir": corpus,
        "output_root": root,
        "exp_name": "test",
        "model_name": model,
        "train_config": "debug",
        "sequences_per_batch": 4,
        "sequence_length": 32,
        "total_tokens": STEPS * 4 * 32,
        "learning_rate": 1e-2,
        "micro_batch_size": 2,
        "log_step_interval": 1,
        "eval_step_interval": 20,
        "save_step_interval": 17,
        "eval_iters": 1,
        "accelerator": "cpu",
    }
    return [f"--{k}={v}" for k, v in {**values, **others}.items()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged step."""
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def files_in(folder: Path) -> set[str]:
    """Every file below a run folder, and every folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def forks() -> multiprocessing.context.BaseContext:
    """Makes processes that start in milliseconds: forked off one that has imported PyTorch and the program."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain"])
    return context


def train_quietly(argv: list[str]) -> None:
    """`pretrain.py` with this command line, in a process of `forks`."""
    import pretrain

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        pretrain.setup(argv)
