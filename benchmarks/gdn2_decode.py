"""One decoding step of fused_recurrent_gdn2: time, bytes moved per second, and the floor.

python benchmarks/gdn2_decode.py --batches 1 8 64 256 --out decode.json

HV = H = 16, K = V = 128, bf16, one token; L2 norm, gate and sigmoids inside, state in place. Steps are captured in a
CUDA graph, so that what is timed is the device. The states of all steps together exceed the L2 cache, as those of a
model's layers do. The floor is the state read and written once over the copy bandwidth measured here. fla-core's
function of that name is timed if it is installed (with the sigmoids outside, and a new state for each step, as it has
it).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from gdn2_kernels import ceilings, milliseconds
from rich.console import Console
from rich.table import Table

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2 import fused_recurrent_gdn2

HEADS, SIZE = 16, 128
console = Console()


def captured(run, steps: int):
    """`run(step)` for each step as one CUDA graph."""
    for step in range(2):
        run(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in range(steps):
            run(step)
    return graph.replay


@torch.no_grad()
def measure(B: int, repeats: int, bandwidth: float, fla) -> dict[str, float]:
    """Microseconds of a step and the floor, for B sequences."""
    state_bytes = B * HEADS * SIZE * SIZE * 4
    steps = min(64, max(4, (256 << 20) // state_bytes))
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q, k, v, g, b, w = (normal(B, 1, HEADS, SIZE) for _ in range(6))
    A_log, dt_bias = torch.rand(HEADS, device="cuda"), torch.randn(HEADS * SIZE, device="cuda")
    states, out = torch.randn(steps, B, HEADS, SIZE, SIZE, device="cuda"), torch.empty_like(v)
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
    in_place = {"inplace_final_state": True, "out": out, "sigmoid_ranges": (1.0, 1.0), **options}
    ours = lambda step: fused_recurrent_gdn2(q, k, v, g, b, w, initial_state=states[step], **in_place)
    row = {"B": B, "us": 1e3 * milliseconds(captured(ours, steps), repeats) / steps}
    row["floor us"] = 2e6 * state_bytes / bandwidth
    row["TB/s"] = 2e-6 * state_bytes / row["us"]
    if fla is not None:
        b, w = b.sigmoid(), w.sigmoid()
        theirs = lambda step: fla(q, k, v, g, b, w, initial_state=states[step], output_final_state=True, **options)
        row["fla-core us"] = 1e3 * milliseconds(captured(theirs, steps), repeats) / steps
    return row


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256], help="sequences decoded at once")
    parser.add_argument("--repeats", type=int, default=20, help="timed replays; the median counts")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernel is timed on a GPU and this machine shows none.")
    try:
        from fla.ops.gdn2 import fused_recurrent_gdn2 as fla
    except ImportError as error:
        fla = None
        console.print(f"fla-core is left out: {error}.")
    bandwidth, _ = ceilings(args.repeats)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    machine["copy TB/s"] = bandwidth / 1e12
    console.print(machine)
    rows = []
    for B in args.batches:
        with console.status(f"{B} sequences"):
            rows.append(measure(B, args.repeats, bandwidth, fla))
    table = Table(title=f"one token, {HEADS} heads of {SIZE} x {SIZE}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(table)
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
