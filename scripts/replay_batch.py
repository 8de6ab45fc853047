"""Run the batch of a skipped step again, and say what is wrong with it.

    python scripts/replay_batch.py runs/outputs/tsz128x4k_100B_first \\
        runs/outputs/tsz128x4k_100B_first/skipped/step-00012345-rank3.npz

Takes the newest checkpoint at or before that step. Prints the loss and the beginning of each sequence, the gradient
norm of each part of the model, and the first tensor with a number that is not finite. Writes nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lit_gpt.command_line import parse
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training.checkpoint import load_model
from lit_gpt.training.replay import KeptBatch, Replay, checkpoint_before, replay

SHOWN = 60  # characters of a sequence


@dataclass
class ReplayArgs:
    run_folder: Path
    """The run, whose checkpoints give the weights."""
    batch: Path
    """A file of <run folder>/skipped."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto: bf16 on a GPU, fp32 on a CPU, as in training."""


@exit_on_user_error
def main(argv: Optional[list[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) >= 2 and not argv[0].startswith("-") and not argv[1].startswith("-"):
        argv = [f"--run_folder={argv[0]}", f"--batch={argv[1]}", *argv[2:]]
    args = parse(ReplayArgs, argv, __doc__.splitlines()[0])
    if args.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda, but PyTorch sees no GPU here. Use --accelerator cpu.")
    device = torch.device("cuda" if args.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    kept = KeptBatch.open(args.batch)
    checkpoint, meta = checkpoint_before(args.run_folder, kept.step)

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"step {kept.step:,}, rank {kept.rank} of {kept.world_size}, was skipped.", end=" ")
    console.print(f"Its loss was {kept.loss:.4f} and its gradient norm {kept.grad_norm:.3f}, over all ranks.")
    age = kept.step - 1 - meta["step"]
    before = f"{age:,} steps before those it met" if age > 0 else "those it met"
    where = f"on {device.type} in {'bf16' if bf16 else 'fp32'}"
    console.print(f"Weights of {checkpoint.name}: {before}. Running {where}.")

    with torch.device(device):
        model = GPT(ModelConfig.from_dict(meta["model"], str(checkpoint / "meta.json")))
    load_model(checkpoint, model)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("micro-batches", total=len(kept.batches))
        result = replay(model, kept.batches, bf16, lambda: progress.advance(task))
    report(console, kept, result, Tokenizer(args.run_folder / "tokenizer"))


def report(console: Console, kept: KeptBatch, result: Replay, tokenizer: Tokenizer) -> None:
    """Tables of sequences and gradients, and the verdict."""
    table = Table("sequence", "loss", title="sequences, the highest loss first")
    table.add_column("text", no_wrap=True)
    rows = []
    for numbers, batch, losses in zip(kept.sequences, kept.batches, result.losses):
        rows += zip(losses.tolist(), numbers.tolist(), batch.tokens.tolist())
    for loss, number, tokens in sorted(rows, key=lambda row: (row[0] == row[0], -row[0])):  # not a number: first
        text = " ".join(tokenizer.decode(tokens[: 4 * SHOWN]).split())[:SHOWN]
        table.add_row(f"{number:,}", f"{loss:.4f}", text.replace("[", "\\["))
    console.print(table)
    table = Table("part", "gradient norm", title="gradient of this rank's sequences")
    for part, norm in result.grad_norms.items():
        table.add_row(part, f"{norm:.4g}")
    console.print(table)
    if result.first_not_finite:
        console.print(f"The first that is not finite: {result.first_not_finite}.")
    else:
        console.print("All is finite here: it takes the weights of that very step, another rank's part, or the device.")


if __name__ == "__main__":
    main()
