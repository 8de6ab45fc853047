"""The compile cache on a GPU: two processes that start cold at once in one folder, one that finds it warm, and a run.

python benchmarks/compile_cache.py [--model_name swa_gdn2_125M] [--sequence_length 4096] [--out results.json]

The starts are `pretrain.py --warm_up` on random tokens; the run is four steps, an evaluation and a checkpoint. Fails if
one of them does, or if the warm start or the run compiles anything.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import cache
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.tokens.shards import ShardWriter

console = Console(highlight=False)


def random_corpus(folder: Path, tokens: int) -> Path:
    """A bare folder of token shards in documents of 100 to 2000 random tokens."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        shard = ShardWriter(folder / f"{split}_0.bin", np.dtype("<u2"))
        while shard.num_tokens < tokens:
            shard.append(random.integers(3, 1000, random.integers(100, 2000)))
        shard.close()
    return folder


def start(folder: Path, corpus: Path, args: argparse.Namespace, *more: str) -> subprocess.Popen:
    flags = {"train_data_dir": corpus, "output_root": folder, "exp_name": "run", "model_name": args.model_name}
    flags |= {
        "train_config": "debug",
        "sequence_length": args.sequence_length,
        "total_tokens": 16 * args.sequence_length,
    }
    flags |= {"health_step_interval": 2, "devices": 1}
    command = [sys.executable, ROOT / "pretrain.py", *(f"--{k}={v}" for k, v in flags.items()), "--interactive_job"]
    return subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def output_of(process: subprocess.Popen) -> str:
    out, _ = process.communicate()
    if process.returncode:
        raise UserError(f"exit code {process.returncode} of {' '.join(map(str, process.args))}\n{out}")
    return out


def warmed(name: str, process: subprocess.Popen, began: float) -> dict:
    """What a start compiled and found, in how many seconds of warm-up and of the whole process."""
    told = re.search(r"warm-up: (\d+) kernels compiled, (\d+) found in .*, ([\d.]+) s\.", output_of(process))
    whole = time.perf_counter() - began
    return {"start": name, "compiled": int(told[1]), "found": int(told[2]), "warm-up s": float(told[3]), "all s": whole}


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="swa_gdn2_125M")
    parser.add_argument("--sequence_length", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("nothing is compiled without a GPU, so there is nothing to measure here.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = random_corpus(folder / "corpus", 40 * args.sequence_length)
        began = time.perf_counter()
        with console.status("two cold starts at once"):
            processes = [start(folder, corpus, args, "--warm_up") for _ in range(2)]
            rows = [warmed(f"cold, {i} of 2 at once", p, began) for i, p in enumerate(processes, 1)]
        began = time.perf_counter()
        with console.status("a warm start"):
            rows.append(warmed("warm", start(folder, corpus, args, "--warm_up"), began))
        began = time.perf_counter()
        with console.status("a run"):
            output_of(start(folder, corpus, args))
        summary = json.loads((folder / "outputs" / "debug_run" / "summary.json").read_text())
        counts = {"compiled": summary["kernels_compiled"], "found": summary["kernels_found_compiled"]}
        rows.append({"start": "run", **counts, "warm-up s": 0.0, "all s": time.perf_counter() - began})
        (section,) = cache.sections(folder / "compile_cache")

    machine = f"{torch.cuda.get_device_name()}, {section.name}"
    table = Table(title=f"{args.model_name}, sequences of {args.sequence_length}: {machine}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    console.print(f"the folder: {section.kernels} kernels, {section.bytes / 1e6:.1f} MB")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "model": args.model_name, "starts": rows}, indent=2) + "\n")
    for row in rows[2:]:
        if row["compiled"]:
            raise UserError(f"{row['start']}: {row['compiled']} kernels were compiled, though the cache was warm.")


if __name__ == "__main__":
    main()
