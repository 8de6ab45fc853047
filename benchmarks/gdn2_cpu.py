"""The GDN-2 operator in plain PyTorch on this CPU: chunkwise form against the recurrence, forward and backward.

python benchmarks/gdn2_cpu.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lit_gpt.ops.gdn2 import chunk_gdn2, naive_recurrent_gdn2


def milliseconds(work: Callable, repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def main() -> None:
    B, T, H, K = 8, 512, 3, 64
    torch.manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1).requires_grad_() for _ in range(3))
    g = (-torch.rand(B, T, H, K)).requires_grad_()
    b, w = (torch.rand(B, T, H, K).requires_grad_() for _ in range(2))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, B={B} T={T} H={H} K=V={K}; medians")
    for name, operator, repeats in (("chunk_gdn2", chunk_gdn2, 10), ("naive_recurrent_gdn2", naive_recurrent_gdn2, 1)):

        def forward(operator: Callable = operator) -> torch.Tensor:
            with torch.no_grad():
                return operator(q, k, v, g, b, w)[0]

        def both(operator: Callable = operator) -> None:
            operator(q, k, v, g, b, w)[0].sum().backward()

        alone, with_backward = milliseconds(forward, repeats), milliseconds(both, repeats)
        print(f"{name:>22}: forward {alone:9.1f} ms, forward and backward {with_backward:9.1f} ms")


if __name__ == "__main__":
    main()
