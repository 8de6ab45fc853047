"""What keeping documents apart costs: training tokens per second of the demo's model on this CPU, with and without.

python benchmarks/document_reset.py --train_data_dir runs/demo/corpus [--rounds 10]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import TrainData
from lit_gpt.model import GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--model_name", default="swa_gdn2_3M")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    model = GPT.from_name(args.model_name)
    data = TrainData(args.train_data_dir, sequence_length=512, seed=0)
    batches = data.micro_batches(0, 4, 4, 0, 1, prefetch=True, pin_memory=False)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    documents = []
    for _ in range(args.rounds + 1):  # in turn, so that whatever else the machine does falls on both
        tokens, cu_seqlens = next(batches)
        documents.append(len(cu_seqlens.unique()) - 1)
        for reset, offsets in (("off", None), ("on", cu_seqlens)):
            began = time.perf_counter()
            model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=offsets, rows_apart=True).mean().backward()
            seconds[reset].append(time.perf_counter() - began)
            model.zero_grad()
    batches.close()
    speed = {reset: 4 * 512 / statistics.median(times[1:]) for reset, times in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model_name}, micro-batches of 4 x 512")
    print(f"{statistics.mean(documents):.1f} segments in a micro-batch")
    print(f"document_reset off {speed['off']:8,.0f} tokens/s")
    print(f"document_reset on  {speed['on']:8,.0f} tokens/s   {speed['on'] / speed['off']:.3f} of that")


if __name__ == "__main__":
    main()
