"""What a run leaves for people: metrics.jsonl, loss.png, summary.json, console lines, wandb."""

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_gpt.errors import UserError
from lit_gpt.files import explain_full_disk, write_atomically, write_json
from lit_gpt.training.health import summary_line
from lit_gpt.training.plot import plot_health, plot_losses

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s of data-center GPUs, from their data sheets, by a part of the device's name; the first that fits
counts.
"""


def peak_flops(device_name: str) -> Optional[float]:
    """Dense bf16 peak of a GPU, or None where we know none."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    records = []
    for line in lines[:-1]:  # what follows the last newline is empty or torn
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} line {len(records) + 1} is not JSON: {error}. Mend or remove it.") from error
    return records


def _finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, for which JSON has no form."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Records:
    """The records of a run, kept by its first rank; on the others every method does nothing."""

    def __init__(self, folder: Path, total_steps: int, active: bool):
        self.folder, self.total_steps, self.active = folder, total_steps, active
        self.wandb: Any = None
        self.pending: list[dict] = []
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not (active and sys.stdout.isatty()))
        self.path = folder / "metrics.jsonl"
        self.task = self.progress.add_task("training", total=total_steps, loss="-", speed="-")

    @contextmanager
    def opened(self, step: int, wandb_options: Optional[dict] = None) -> Iterator[None]:
        """Record what follows `step`: lines of later steps, which a kill left without a checkpoint, are dropped."""
        if not self.active:
            yield
            return
        path = self.path
        kept = [r for r in read_metrics(path) if r["step"] <= step]
        with explain_full_disk(self.folder):
            write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        if wandb_options is not None:
            import wandb

            self.wandb = wandb.init(**wandb_options)
        with open(path, "ab", buffering=0) as self.metrics, self.progress:
            self.progress.update(self.task, completed=step)
            yield
        if self.wandb is not None:
            self.wandb.finish()

    def step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def training(self, record: dict) -> None:
        """One log line: at least step, tokens, loss, lr, grad_norm, tokens_per_second, mfu."""
        loss, speed = f"{record['loss']:.4f}", f"{record['tokens_per_second']:,.0f}"
        self.progress.update(self.task, loss=loss, speed=speed)
        text = f"step {record['step']:>7,} / {self.total_steps:,}  tokens {record['tokens']:>13,}  loss {loss}  "
        text += f"lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3f}  {speed} tokens/s"
        text += f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        self._write(record, f"{text}  left {timedelta(seconds=round(record['seconds_left']))}")

    def validation(self, record: dict) -> None:
        """Losses by length: val_loss@4096 and so on."""
        losses = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.startswith("val_loss@"))
        self._write(
            record, f"step {record['step']:>7,}  {losses}  ({record['blocks']} blocks, {record['seconds']:.1f} s)"
        )
        self.plot()

    def health(self, record: dict) -> None:
        """What health.examine found."""
        self._write(record, f"step {record['step']:>7,}  {summary_line(record['health'])}")

    def note(self, record: dict, text: str) -> None:
        """Something out of the ordinary: at least step and tokens, and what happened under a key of its own."""
        self._write(record, text, "yellow")

    def evaluation_missing(self, step: int, interval: int) -> bool:
        """Whether the run was left at `step` before the evaluation that was due then; only its first rank knows."""
        due = self.active and step > 0 and (step % interval == 0 or step == self.total_steps)
        return due and not any(r["step"] == step and "blocks" in r for r in read_metrics(self.path))

    def checkpoints(self, ended: list[dict]) -> None:
        """Saves that ended: each has `checkpoint`, its name, or `save_error`, why there is none."""
        for record in ended:
            begin = f"step {record['step']:>7,}  "
            if "save_error" in record:
                text = (
                    f"{begin}CHECKPOINT NOT SAVED: {record['save_error']}. Training goes on; the next save tries again."
                )
                self._write(record, text, "bold red")
            else:
                text = f"{begin}checkpoint {record['checkpoint']} (written in {record['seconds']:.1f} s"
                self._write(record, f"{text}, training held up for {record['stall_seconds']:.2f} s)")

    def plot(self) -> None:
        if not self.active:
            return
        try:
            records = read_metrics(self.path)
            plot_losses(records, self.folder / "loss.png", self.folder.name)
            if any("health" in r for r in records):
                plot_health(records, self.folder / "health.png", self.folder.name)
        except OSError as error:
            self.console.print(f"a picture could not be drawn: {error.strerror or error}.", style="bold red")

    def summarize(self, facts: dict) -> None:
        """Write summary.json, of what was recorded and the facts given, and the last plot; say where all lies."""
        if not self.active:
            return
        records = read_metrics(self.path) + self.pending
        training = [r for r in records if r.get("loss") is not None]
        evaluations = [{k: r[k] for k in r if k.startswith("val_loss@")} for r in records if "blocks" in r]
        summary = dict(facts)
        if training:
            summary["loss"] = training[-1]["loss"]
            summary["median_tokens_per_second"] = statistics.median(r["tokens_per_second"] for r in training)
        if evaluations:
            summary |= evaluations[-1]
        failed = [r for r in records if "save_error" in r]
        if failed:
            summary["failed_saves"] = len(failed)
        with explain_full_disk(self.folder):
            write_json(self.folder / "summary.json", summary)
        self.plot()
        for name, value in summary.items():
            self.console.print(f"{name:>26}  {value:,.4f}" if isinstance(value, float) else f"{name:>26}  {value}")
        for name in (
            "config.yaml",
            "metrics.jsonl",
            "loss.png",
            "health.png",
            "summary.json",
            "checkpoints",
            "skipped",
        ):
            if (self.folder / name).exists():
                self.console.print(f"{'written':>26}  {self.folder / name}")
        for record in failed:
            text = f"{'not saved':>26}  the checkpoint of step {record['step']:,}: {record['save_error']}"
            self.console.print(text, style="bold red")

    def _write(self, record: dict, text: str, style: Optional[str] = None) -> None:
        if not self.active:
            return
        self.console.print(text, style=style)
        record = _finite(record)
        self.pending.append(record)
        try:
            self._append()
        except OSError as error:
            if len(self.pending) == 1:  # said once, until it works again
                text = f"metrics.jsonl cannot be written: {error.strerror or error}. Its lines wait in memory."
                self.console.print(text, style="bold red")
        if self.wandb is not None and "stall_seconds" not in record:  # a save ends some steps later: out of order there
            self.wandb.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])

    def _append(self) -> None:
        """Add the pending lines to metrics.jsonl, all or, where the disk is full or fails, none of them."""
        size = os.fstat(self.metrics.fileno()).st_size
        rest = "".join(json.dumps(record) + "\n" for record in self.pending).encode()
        try:
            while rest:
                rest = rest[self.metrics.write(rest) :]
            os.fsync(self.metrics.fileno())
        except OSError:
            os.ftruncate(self.metrics.fileno(), size)
            raise
        self.pending.clear()
