"""Search offline for the launch configuration of each GDN-2 kernel, on the GPU at hand.

python benchmarks/tune_gdn2.py --shape 4x4096x16x128 --out tuned.json

Every candidate first has to match float64: output, final state and all gradients, in mild and extreme decay. The right
ones are then timed, each kernel alone while the others keep their present configuration, and the fastest are printed as
the row to put into lit_gpt/ops/gdn2/kernels/config.py.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2 import chunk_gdn2
from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused
from lit_gpt.ops.gdn2.kernels.config import Config, Launch, config_for

TOLERANCE = 0.01
"""Relative error against float64 that bf16 operands stay below with a margin of two."""
DECAYS = (0.3, 6.0, 40.0)
"""Checked with g uniform between 0 and minus this."""
REGISTERS = (None, 168, 128)
SEARCH = {
    "block_scores": {"warps": (1, 2, 4), "stages": (2, 3, 4), "tile": (16, 32), "registers": (None, 224)},
    "chunk_scores": {"warps": (1, 2, 4), "stages": (1, 2), "tile": (32, 64)},
    "forward_scan": {"stages": (1, 2, 3)},
    "backward_scan": {"stages": (1, 2, 3)},
    "score_gradients": {"warps": (4, 8), "stages": (1, 2), "registers": REGISTERS},
    "state_gradients": {"stages": (1, 2, 3), "registers": REGISTERS},
    "input_gradients": {"stages": (1, 2, 3), "registers": (None, 208, 168)},
}

console = Console()


def candidates(config: Config) -> list[tuple[str, Launch]]:
    """Every (kernel, launch) to try, the present one of each kernel first."""
    found = []
    for kernel, choices in SEARCH.items():
        present = getattr(config, kernel)
        variants = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
        launches = [dataclasses.replace(present, **variant) for variant in variants]
        found += [(kernel, launch) for launch in dict.fromkeys([present, *launches])]
    return found


def draw(B: int, T: int, H: int, K: int, decay: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Fresh random q, k, v, g, b, w that need gradients, and a gradient of the output."""
    normal = lambda: torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16)
    g = -decay * torch.rand(B, T, H, K, device="cuda")
    tensors = [normal(), normal(), normal(), g, normal().sigmoid(), normal().sigmoid()]
    return [x.requires_grad_() for x in tensors], normal()


def results(op, tensors, do, dtype=None, **options) -> list[torch.Tensor]:
    """Output, final state and the gradients of every input."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    o, state = op(*tensors, use_qk_l2norm_in_kernel=True, output_final_state=True, **options)
    return [o.detach(), state.detach(), *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def worst_error(config: Config) -> float:
    """The largest relative error of any result against float64; infinite if the kernels do not run."""
    torch.manual_seed(0)
    worst = 0.0
    for decay in DECAYS:
        tensors, do = draw(1, 500, 2, 128, decay)
        want = results(chunk_gdn2, tensors, do, torch.float64)
        try:
            got = results(chunk_gdn2_fused, tensors, do, config=config)
        except Exception:  # out of shared memory, an illegal access: this candidate is none
            return float("inf")
        errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, want)]
        worst = max(worst, *(e if e == e else float("inf") for e in errors))
    return worst


def kernel_milliseconds(config: Config, kernel: str, tensors, do, steps: int = 5) -> float:
    """Time of one kernel in a training step."""
    step = lambda: torch.autograd.grad(
        chunk_gdn2_fused(*tensors, use_qk_l2norm_in_kernel=True, config=config)[0], tensors, do
    )
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in profile.key_averages() if kernel in e.key) / steps / 1e3


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4x4096x16x128", help="B x T x H x K")
    parser.add_argument("--kernels", nargs="+", choices=[*SEARCH], default=[*SEARCH], help="only these")
    parser.add_argument("--processes", type=int, default=12, help="candidates compiled and checked at once")
    parser.add_argument("--out", type=Path, help="write every candidate with its error and time as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels are tuned on a GPU and this machine shows none.")
    shape = [int(n) for n in args.shape.split("x")]
    config = config_for(torch.bfloat16, shape[3], torch.cuda.get_device_capability())
    tried = [(kernel, launch) for kernel, launch in candidates(config) if kernel in args.kernels]
    configs = [dataclasses.replace(config, **{kernel: launch}) for kernel, launch in tried]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        errors = list(track(pool.map(worst_error, configs), "checking", len(configs), console=console))

    torch.manual_seed(0)
    tensors, do = draw(*shape, decay=0.3)
    rows = []
    for (kernel, launch), candidate, error in zip(tried, configs, errors):
        ms = kernel_milliseconds(candidate, kernel, tensors, do) if error <= TOLERANCE else None
        rows.append({"kernel": kernel, **dataclasses.asdict(launch), "error": error, "ms": ms})
    table = Table("kernel", "warps", "stages", "tile", "registers", "error", "ms", title=torch.cuda.get_device_name())
    best = {}
    for row in rows:
        table.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()))
        if row["ms"] and row["ms"] < best.get(row["kernel"], row)["ms"] + 1e-9:
            best[row["kernel"]] = row
    console.print(table)
    for kernel, row in best.items():
        launch = Launch(row["warps"], row["stages"], row["tile"], row["registers"])
        console.print(f"{kernel} = {launch}  # {row['ms']:.3f} ms")
    if args.out:
        args.out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "shape": shape, "rows": rows}, indent=1)
        )
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
