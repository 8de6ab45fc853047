"""What a save costs the steps beside it: pretrain.py's own loop on random tokens, with a checkpoint every few steps.

    python benchmarks/checkpoint_stall.py --model_name swa_gdn2_125M --sequences 64 --length 4096 [--folder DIR]

The time of a step runs from the end of the one before to its own end, copying to host memory included, and counts as
one with a save if one was being written at any moment of it. DIR is where the checkpoints go: the disk matters.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import pretrain
from lit_gpt.config import ModelConfig
from lit_gpt.tokens.shards import CODES, HEADER, MAGIC, VERSION, dtype_for
from lit_gpt.training.records import read_metrics

WARM_UP = 5
"""Steps that do not count: they compile kernels, and the first save allocates host memory."""


class Checkpoints(pretrain.Checkpoints):
    """Knows whether a save has been going on since it was last asked."""

    of_the_run: "Checkpoints"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Checkpoints.of_the_run, self.seen = self, 0

    def saved_since(self) -> bool:
        """A save is being written, or has been begun or ended since the last call."""
        state = (id(self.thread), self.thread is not None and self.thread.is_alive())
        before, self.seen = self.seen, state
        return state[1] or state != before


class Records(pretrain.Records):
    """Takes the time of every step."""

    steps: list[tuple[float, bool]]

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        Records.steps = []

    def training(self, record: dict) -> None:
        """Every step is logged, and its loss has arrived: the device has done it."""
        self.steps.append((time.perf_counter(), Checkpoints.of_the_run.saved_since()))
        super().training(record)


def write_corpus(folder: Path, vocab_size: int, tokens: int) -> None:
    """One shard of random ids."""
    dtype = dtype_for(vocab_size)
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens, dtype=dtype)
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], tokens)
    (folder / "train_random_000000.bin").write_bytes(header + ids.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", default="swa_gdn2_125M")
    parser.add_argument("--sequences", type=int, default=64, help="sequences in a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save_step_interval", type=int, default=20)
    parser.add_argument("--folder", help="where to write the run, which is removed afterwards; default: TMPDIR")
    args = parser.parse_args()
    pretrain.Checkpoints, pretrain.Records = Checkpoints, Records
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        tokens = args.steps * args.sequences * args.length
        write_corpus(corpus, ModelConfig.from_name(args.model_name).vocab_size, tokens + args.length)
        command = [f"--model_name={args.model_name}", f"--train_data_dir={corpus}", f"--output_root={folder}"]
        command += ["--exp_name=stall", "--train_config=debug", "--document_reset=false", "--interactive_job"]
        command += [f"--sequences_per_batch={args.sequences}", f"--sequence_length={args.length}", "--devices=1"]
        command += [f"--total_tokens={tokens}", f"--save_step_interval={args.save_step_interval}"]
        pretrain.setup(command)
        saves = read_metrics(Path(folder) / "outputs" / "debug_stall" / "metrics.jsonl")
        saves = [record for record in saves if "checkpoint" in record]
        newest = Path(folder) / "outputs" / "debug_stall" / "checkpoints" / saves[-1]["checkpoint"]
        size = sum(file.stat().st_size for file in newest.iterdir())

    times: dict[bool, list[float]] = {False: [], True: []}
    for (before, _), (now, saving) in itertools.pairwise(Records.steps[WARM_UP:]):
        times[saving].append(now - before)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    print(f"\n{device}, torch {torch.__version__}; {args.model_name}, {args.sequences} x {args.length} tokens a step")
    print(f"{len(saves)} saves of {size:,} bytes, written in {statistics.median(s['seconds'] for s in saves):.2f} s")
    stalls = [s["stall_seconds"] for s in saves]
    print(f"loop held up by a save: first {stalls[0]:.3f} s, then {statistics.median(stalls[1:]):.3f} s")
    for saving, name in ((False, "without"), (True, "with   ")):
        milliseconds = [1000 * t for t in times[saving]]
        median, worst = statistics.median(milliseconds), max(milliseconds)
        print(f"{len(milliseconds):4} steps {name} a save: median {median:8.1f} ms, longest {worst:8.1f} ms")
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    print(f"median with a save / median without: {ratio:.3f}")


if __name__ == "__main__":
    main()
