"""Turn the weights of a checkpoint into one safetensors file, the form to share, and such a file into a checkpoint.

    python scripts/convert_checkpoint.py --source runs/outputs/tsz128x4k_300M_first --out shared/first.safetensors
    python scripts/convert_checkpoint.py --source shared/first.safetensors --out runs/outputs/from_file

- Either form can be sampled from (generate.py --checkpoint) and trained on from (pretrain.py --init_from).
- The tokenizer goes along: a folder `tokenizer` beside the file, or in the run folder.
- Nothing in either form is executed when it is opened, whoever made it.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch.distributed.checkpoint import CheckpointException

from lit_gpt.command_line import parse
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.files import explain_unwritable
from lit_gpt.model import GPT
from lit_gpt.tokens.storage import copy_folder
from lit_gpt.training.checkpoint import write_checkpoint
from lit_gpt.training.weights import Weights, save_weights

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass
class ConvertArgs:
    """From where, to where."""

    source: Path
    """A run folder, whose newest checkpoint is taken, one of its checkpoints/step-* folders, or a safetensors file."""
    out: Path
    """A new file that ends in .safetensors; or a new run folder, which will hold the weights as a checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the matrices of a file are stored as. Norms, biases, convolutions, A_log and dt_bias always stay float32."""


@exit_on_user_error
def main(argv: Optional[list[str]] = None) -> None:
    """Load the weights into their model, write them in the other form, sum up."""
    args = parse(ConvertArgs, sys.argv[1:] if argv is None else argv, __doc__.splitlines()[0])
    began, to_file = time.perf_counter(), args.out.suffix == ".safetensors"
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already. Remove it, or give another name.")
    if not to_file and args.dtype != "float32":
        raise UserError("--dtype is for files: a checkpoint, from which training goes on, is float32.")
    weights = Weights.find(args.source, console.print)
    model = GPT(ModelConfig.from_dict(weights.meta["model"], str(weights.path)))
    weights.load_into(model)
    tensors = model.state_dict()
    meta = {key: weights.meta.get(key) for key in ("model", "step", "tokens", "document_format")}

    if to_file:
        _write_file(args.out, tensors, meta, getattr(torch, args.dtype))
        written, tokenizer = args.out, args.out.parent / "tokenizer"
    else:
        written = args.out / "checkpoints" / f"step-{meta['step']:08d}"
        _write_folder(written, tensors, meta)
        tokenizer = args.out / "tokenizer"
    size = written.stat().st_size if to_file else sum(file.stat().st_size for file in written.iterdir())
    trained = f"trained on {meta['tokens']:,} tokens"
    console.print(f"from     {weights.path}: {model.num_parameters():,} parameters, {trained}")
    console.print(f"written  {written}: {size:,} bytes in {time.perf_counter() - began:.1f} s")
    _bring_tokenizer(weights.tokenizer, tokenizer)


def _write_file(out: Path, tensors: dict[str, torch.Tensor], meta: dict, dtype: torch.dtype) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    total = sum(t.numel() * (dtype.itemsize if t.ndim == 2 else 4) for t in tensors.values())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("writing", total=total)
        save_weights(out, tensors, meta, dtype, lambda count: progress.advance(task, count))


def _write_folder(path: Path, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    named = {f"model.{name}": tensor for name, tensor in tensors.items()}
    try:
        with console.status("writing"):
            write_checkpoint(path, named, named, meta)
    except CheckpointException as error:
        with explain_unwritable(path):
            raise next(iter(error.failures.values()))[0] from error


def _bring_tokenizer(source: Path, target: Path) -> None:
    if not source.is_dir():
        console.print(f"tokenizer  none: {source} is missing. Sample with generate.py --tokenizer.")
    elif source.resolve() == target.resolve() or target.exists():
        console.print(f"tokenizer  {target}, as it was there")
    else:
        copy_folder(source, target)
        console.print(f"tokenizer  {target}")


if __name__ == "__main__":
    main()
