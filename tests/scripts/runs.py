"""Long runs of a small model, to disturb and to compare with one that nothing disturbs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lit_gpt.training.records import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}


def long_run(corpus: Path, folder: Path) -> list[str]:
    """Flags of a run that goes on for longer than any test watches it."""
    model = folder / "model.yaml"
    shutil.copy(ROOT / "configs" / "models" / "swa_gdn2_3M.yaml", model)
    values = {"train_data_dir": corpus, "model_name": model, "train_config": "debug", "accelerator": "cpu"}
    values |= {"total_tokens": 10**7, "save_step_interval": 25, "eval_step_interval": 10**6}
    return [f"--{name}={value}" for name, value in values.items()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step that a run has logged."""
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it has come true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def undisturbed(flags: list[str], root: Path, steps: int) -> list[tuple[int, float]]:
    """The first losses of that run on two ranks of its own."""
    command = [sys.executable, "pretrain.py", *flags, f"--output_root={root}", "--exp_name=whole", "--devices=2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    folder = root / "outputs" / "debug_whole"
    try:
        wait_until(lambda: len(losses(folder)) >= steps or process.poll() is not None, 600)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        errors = process.communicate()[1].decode()
    found = losses(folder)
    assert len(found) >= steps, errors
    return found[:steps]
