"""What a run leaves for people: metrics.jsonl, loss.png, summary.json, console lines, wandb."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_gpt.errors import UserError
from lit_gpt.files import write_atomically, write_json
from lit_gpt.training.plot import plot_losses

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H20": 148e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bf16 FLOP/s of data-center GPUs, from their data sheets, by a part of the device's name; the first that fits counts."""


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


class Records:
    """The open records of a run, on the first rank only; elsewhere every method does nothing."""

    def __init__(self, folder: Path, active: bool, total_steps: int):
        self.folder, self.active, self.total_steps = folder, active, total_steps
        self.wandb: Any = None
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, disable=not (active and sys.stdout.isatty()))
        self.task = self.progress.add_task("training", total=total_steps, loss="-", speed="-")

    def open(self, step: int, wandb_options: Optional[dict] = None) -> None:
        """Start recording after `step`: lines of later steps, which a kill left without a checkpoint, are dropped."""
        if not self.active:
            return
        kept = [r for r in read_metrics(self.folder / "metrics.jsonl") if r["step"] <= step]
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept).encode())
        self.metrics = open(self.folder / "metrics.jsonl", "a")
        self.progress.update(self.task, completed=step)
        self.progress.start()
        if wandb_options is not None:
            import wandb

            self.wandb = wandb.init(**wandb_options)

    def step(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def training(self, record: dict) -> None:
        """One log line: at least step, tokens, loss, lr, grad_norm, tokens_per_second, mfu."""
        speed = f"{record['tokens_per_second']:,.0f}"
        self.progress.update(self.task, loss=f"{record['loss']:.4f}", speed=speed)
        text = f"step {record['step']:>7,} / {self.total_steps:,}  tokens {record['tokens']:>13,}  loss {record['loss']:.4f}  "
        text += f"lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3f}  {speed} tokens/s"
        text += f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        self._write(record, f"{text}  left {duration(record['seconds_left'])}")

    def validation(self, record: dict) -> None:
        """Losses by length: val_loss@4096 and so on."""
        losses = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k.startswith("val_loss@"))
        self._write(record, f"step {record['step']:>7,}  {losses}  ({record['blocks']} blocks, {record['seconds']:.1f} s)")
        self.plot()

    def checkpoint(self, record: dict) -> None:
        self._write(record, f"step {record['step']:>7,}  checkpoint {record['checkpoint']} ({record['seconds']:.1f} s)")

    def plot(self) -> None:
        if self.active:
            plot_losses(read_metrics(self.folder / "metrics.jsonl"), self.folder / "loss.png", self.folder.name)

    def say(self, *things: Any) -> None:
        if self.active:
            self.console.print(*things)

    def close(self, summary: Optional[dict] = None) -> None:
        """End the progress bar; with a summary, write summary.json and the last plot."""
        self.progress.stop()
        if self.active and summary is not None:
            write_json(self.folder / "summary.json", summary)
            self.plot()
        if self.wandb is not None:
            self.wandb.finish()

    def _write(self, record: dict, text: str) -> None:
        if not self.active:
            return
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        self.console.print(text)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=record["step"])


def duration(seconds: float) -> str:
    """1:02:03, or 2d 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{h}:{m:02d}:{s:02d}"
