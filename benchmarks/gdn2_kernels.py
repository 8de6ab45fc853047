"""The fused GDN-2 kernels against fla-core's chunk_gdn2 in one run: forward, training step, memory, and the floor.

python benchmarks/gdn2_kernels.py --shapes 4x4096x16x128 1x16384x16x128 --out results.json

A shape is B x T x H x K, V = K, bf16 with g in fp32 and the L2 norm in the kernel. fla-core is timed if it is
installed (its first call tunes itself for minutes) and left out, and said so, if not. The floor is the least traffic
over the copy bandwidth measured here, or the least arithmetic over the matrix rate measured here, whichever is larger.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from rich.console import Console
from rich.table import Table

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

console = Console()


def milliseconds(run, repeats: int) -> float:
    """Median time of `run` on the device, after three calls to warm up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def ceilings(repeats: int) -> tuple[float, float]:
    """Copy bandwidth (bytes/s, read plus written) and bf16 matrix rate (FLOP/s) of this device."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), repeats) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: a @ b, repeats) * 1e3


def floors(B: int, T: int, H: int, K: int) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) that a forward pass and a training step cannot do without, chunks of 64 rows and all else on chip.

    Forward reads q, k, b, v, w (bf16) and g (fp32) and writes o. A step reads them twice, reads do, and writes six
    gradients. Per chunk and head, matrix products: forward 2 (scores) + 4 (R, o, state) of 64 x 64 or 64 x K x K.
    """
    rows, C = B * T * H, 64
    forward_bytes = rows * K * (5 * 2 + 4 + 2)
    step_bytes = forward_bytes + rows * K * (5 * 2 + 4 + 2 + 5 * 2 + 4)
    forward = 2 * rows * (2 * C * K + 2 * C * K + 3 * K * K)
    backward = 2 * rows * (2 * C * K + 2 * C * K + 4 * C * K + 6 * K * K)
    return {"forward": (forward_bytes, forward), "step": (step_bytes, forward + backward)}


def measure(op, tensors, do, repeats: int) -> dict[str, float]:
    """First call (s), forward without and with gradients, forward plus backward (ms), saved and peak memory (MiB)."""
    forward = lambda: op(*tensors, use_qk_l2norm_in_kernel=True)[0]
    step = lambda: torch.autograd.grad(forward(), tensors, do)
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    row = {"first call s": time.perf_counter() - started}
    with torch.no_grad():
        row["inference ms"] = milliseconds(forward, repeats)
    row["forward ms"] = milliseconds(forward, repeats)
    row["forward+backward ms"] = milliseconds(step, repeats)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = forward()
    row["saved MiB"] = (torch.cuda.memory_allocated() - before) / 2**20
    torch.autograd.grad(o, tensors, do)
    row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def kernel_times(op, tensors, do, steps: int = 10) -> dict[str, float]:
    """Milliseconds of each kernel in one training step."""
    step = lambda: torch.autograd.grad(op(*tensors, use_qk_l2norm_in_kernel=True)[0], tensors, do)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / steps / 1e3 for event in profile.key_averages()}
    return {name: ms for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.002}


def draw(B: int, T: int, H: int, K: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Fresh random inputs q, k, v, g, b, w that need gradients, and a gradient of the output."""
    normal = lambda: torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16)
    g = -0.3 * torch.rand(B, T, H, K, device="cuda")
    tensors = [normal(), normal(), normal(), g, normal().sigmoid(), normal().sigmoid()]
    return [x.requires_grad_() for x in tensors], normal()


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4x4096x16x128"], help="B x T x H x K")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; the median counts")
    parser.add_argument("--no_fla", action="store_true", help="leave fla-core out")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU and this machine shows none.")
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes]
        assert all(len(shape) == 4 for shape in shapes)
    except (ValueError, AssertionError):
        raise UserError(f"a shape is BxTxHxK such as 4x4096x16x128; got {' '.join(args.shapes)}.") from None

    ops = {"ours": chunk_gdn2_fused}
    if not args.no_fla:
        try:
            from fla.ops.gdn2 import chunk_gdn2 as fla_chunk_gdn2

            ops["fla-core"] = fla_chunk_gdn2
        except ImportError as error:
            console.print(f"fla-core is left out: {error}. Install it with: pip install fla-core")

    bandwidth, rate = ceilings(args.repeats)
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy TB/s": bandwidth / 1e12,
        "bf16 TFLOP/s": rate / 1e12,
    }
    console.print(machine)
    results = []
    for shape in shapes:
        floor = {name: 1e3 * max(n / bandwidth, f / rate) for name, (n, f) in floors(*shape).items()}
        tensors, do = draw(*shape)
        rows = {}
        for name, op in ops.items():
            with console.status(f"{name} at {'x'.join(map(str, shape))}"):
                rows[name] = measure(op, tensors, do, args.repeats)
        table = Table(title=f"B x T x H x K = {' x '.join(map(str, shape))}")
        for column in ("", *rows["ours"]):
            table.add_column(column, justify="right")
        for name, row in rows.items():
            table.add_row(name, *(f"{x:.3f}" if x < 100 else f"{x:.0f}" for x in row.values()))
        table.add_row("floor", "", f"{floor['forward']:.3f}", f"{floor['forward']:.3f}", f"{floor['step']:.3f}", "", "")
        console.print(table)
        kernels = kernel_times(chunk_gdn2_fused, tensors, do)
        console.print("ours, ms per kernel:", {name: round(ms, 3) for name, ms in kernels.items()})
        if "fla-core" in rows:
            gains = {key: rows["fla-core"][key] / rows["ours"][key] for key in ("forward ms", "forward+backward ms")}
            console.print("faster than fla-core by", {key: f"{gain:.2f}x" for key, gain in gains.items()})
        results.append({"shape": shape, "floor ms": floor, **rows, "kernels ms": kernels})
        del tensors, do
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
