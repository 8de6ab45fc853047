"""The data loader at full size: start-up, resume, speed into batches with document boundaries, memory.

The corpus has a manifest, shards of 62.5M tokens and an index entry for every document, 1,000 tokens on average. Shards
are sparse files: full size to every reader, no bytes on disk (so all tokens are 0, from memory). Indices are real.

python benchmarks/loader.py [--tokens 100_000_000_000] [--seconds 5] [--folder DIR]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.progress import track

from data import TrainData
from lit_gpt.tokens.manifest import read_manifest, write_manifest
from lit_gpt.tokens.shards import CODES, HEADER, MAGIC, VERSION

SHARD, DOCUMENT, LENGTH = 62_500_000, 1_000, 4096


def write_corpus(folder: Path, tokens: int) -> None:
    """Sparse shards, real indices, a manifest."""
    units = []
    for number in track(range(tokens // SHARD), description="writing indices"):
        path = folder / f"train_sparse_{number:06d}.bin"
        with open(path, "wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype(np.uint16)], SHARD))
            file.truncate(HEADER.size + 2 * SHARD)
        lengths = np.random.default_rng(number).lognormal(np.log(DOCUMENT) - 0.5, 1.0, 2 * SHARD // DOCUMENT)
        ends = np.cumsum(lengths.astype(np.int64) + 2)
        ends = np.append(ends[ends < SHARD], SHARD)
        path.with_suffix(".idx").write_bytes(ends.astype("<u8").tobytes())
        train = {"file": path.name, "tokens": SHARD, "documents": len(ends), "characters": 4 * SHARD}
        train |= {"sha256": "0" * 64, "idx_sha256": "0" * 64}
        units.append({"unit": number, "source": path.stem, "files": 1, "bytes": 4 * SHARD, "train": train})
        units[-1] |= {"validation": None, "not_text": 0, "empty": 0}
    tokenizer = {"file": "tokenizer/tokenizer.model", "sha256": "0" * 64, "bos_id": 1, "eos_id": 2}
    content = {"name": "sparse", "dtype": "uint16", "vocab_size": 32000, "document_format": "bos_eos"}
    write_manifest(folder, {**content, "tokenizer": tokenizer, "units": units})


def tokens_per_second(data: TrainData, consumed: int, micro_batch: int, prefetch: bool, seconds: float) -> float:
    batches = data.micro_batches(consumed, micro_batch, micro_batch, 0, 1, prefetch, pin_memory=False)
    next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += next(batches).tokens[:, 1:].numel()
    elapsed = time.perf_counter() - began
    batches.close()
    return count / elapsed


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, what: str, seconds: float) -> None:
    """One measurement, in a process of its own; prints a line of JSON."""
    before, began = megabytes(), time.perf_counter()
    data = TrainData(folder, LENGTH, seed=0)
    started = time.perf_counter() - began
    last = (data.corpus.num_tokens - 1) // LENGTH - 8
    result = {}
    if what == "resume":
        state = json.loads(json.dumps(data.state(last)))
        began = time.perf_counter()
        data = TrainData(folder, LENGTH, seed=0)
        data.load_state(state)
        next(data.micro_batches(last, 8, 8, 0, 1, prefetch=False, pin_memory=False))
        result["resume at the end, to the first batch"] = f"{time.perf_counter() - began:8.2f} s"
    else:
        result["start-up (open, check every shard)"] = f"{started:8.2f} s"
        for micro_batch, prefetch in ((8, False), (8, True), (1, True)):
            speed = tokens_per_second(data, last // 2, micro_batch, prefetch, seconds)
            how = "in a prefetch thread" if prefetch else "in the training loop"
            result[f"{micro_batch} x {LENGTH}, {how}"] = f"{speed / 1e6:8.1f} M tokens/s"
        imported = f"{before:.0f} MB of them before the data was opened"
        result["memory: peak of the process"] = f"{megabytes():8.0f} MB, {imported}"
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, help="keep the corpus here, and use it if it is there")
    parser.add_argument("--measure", choices=["speed", "resume"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.folder, args.measure, args.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists():
            write_corpus(folder, args.tokens)
        parts = [unit["train"] for unit in read_manifest(folder)["units"]]
        documents = sum(part["documents"] for part in parts)
        print(f"{_cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, ", end="")
        print(f"numpy {np.__version__}, torch {torch.__version__}")
        print(f"{sum(part['tokens'] for part in parts):,} tokens, {documents:,} documents, {len(parts):,} shards")
        for what in ("speed", "resume"):
            command = [sys.executable, __file__, "--folder", str(folder), "--measure", what]
            command += ["--seconds", str(args.seconds)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, value in json.loads(lines).items():
                print(f"{name:42} {value}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
