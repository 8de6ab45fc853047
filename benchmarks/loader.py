"""Tokens per second of the data loader, from a corpus of random tokens on local disk.

python benchmarks/loader.py [--tokens 67108864] [--seconds 5]
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data import TrainData
from lit_gpt.tokens.shards import write_shard


def tokens_per_second(data: TrainData, micro_batch: int, prefetch: bool, seconds: float) -> float:
    batches = data.micro_batches(0, micro_batch, micro_batch, rank=0, world_size=1, prefetch=prefetch, pin_memory=False)
    next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += next(batches)[:, 1:].numel()
    elapsed = time.perf_counter() - began
    batches.close()
    return count / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2**26)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 32000, args.tokens // 4, dtype=np.uint16)
        for shard in range(4):
            write_shard(Path(folder) / f"train_slim_{shard:010d}.bin", [tokens], tokens.dtype)
        data = TrainData(folder, sequence_length=4096, seed=0)
        for prefetch in (False, True):
            speed = tokens_per_second(data, 8, prefetch, args.seconds)
            how = "a prefetch thread" if prefetch else "the training loop"
            print(f"batches of 8 x 4096 in {how}: {speed / 1e6:8.1f} M tokens/s")


if __name__ == "__main__":
    main()
