"""The fused GDN-2 kernels beside fla-core's in one run: forward, training step, memory, first call, and the floor.

python benchmarks/gdn2_kernels.py --shapes 4x4096x16 1x16384x16 --packed 16384x16 --out results.json --picture roof.png

A shape is B x T x H, K = V = 128, bf16 with g in fp32 and the L2 norm in the kernel; --packed adds one row of T tokens
holding about five documents per 4096. At the first shape the same kernels also run as KDA (one gate for both sides) and
as Gated DeltaNet (a scalar decay besides), against fla-core's own. fla-core is timed if it is installed (its first call
tunes itself for minutes) and left out, and said so, if not. The floor is the least traffic over the copy bandwidth
measured here, or the least arithmetic over the matrix rate measured here, whichever is larger.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

K = 128
console = Console(width=140)


@dataclass
class Case:
    """One set of inputs, and who computes on it: {name: op(*tensors) -> o}."""

    title: str
    tensors: list[Tensor]
    ops: dict[str, Callable]
    tokens: int
    """Tokens times heads."""
    kind: str = "GDN-2"


def milliseconds(run: Callable, repeats: int) -> float:
    """Median time of `run` on the device. All calls are queued before any is waited for, as in training."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def ceilings(repeats: int) -> tuple[float, float]:
    """Copy bandwidth (bytes/s, read plus written) and bf16 matrix rate (FLOP/s) of this device."""
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), repeats) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: a @ b, repeats) * 1e3


def floors(tokens: int) -> dict[str, tuple[float, float]]:
    """(bytes, FLOPs) that a forward pass and a training step cannot do without, chunks of 64 rows and all else on chip.

    Forward reads q, k, b, v, w (bf16) and g (fp32) and writes o. A step reads them twice, reads do, and writes six
    gradients. Per chunk and head, matrix products: forward 2 (scores) + 4 (R, o, state) of 64 x 64 or 64 x K x K.
    """
    C = 64
    forward_bytes = tokens * K * (5 * 2 + 4 + 2)
    step_bytes = forward_bytes + tokens * K * (5 * 2 + 4 + 2 + 5 * 2 + 4)
    forward = 2 * tokens * (2 * C * K + 2 * C * K + 3 * K * K)
    backward = 2 * tokens * (2 * C * K + 2 * C * K + 4 * C * K + 6 * K * K)
    return {"forward": (forward_bytes, forward), "step": (step_bytes, forward + backward)}


def measure(op: Callable, tensors: list[Tensor], repeats: int) -> dict[str, float]:
    """First call (s), forward without and with gradients, forward plus backward (ms), saved and peak memory (MiB)."""
    forward = lambda: op(*tensors)
    started = time.perf_counter()
    do = torch.randn_like(forward())
    step = lambda: torch.autograd.grad(forward(), tensors, do)
    step()
    torch.cuda.synchronize()
    row = {"first call s": time.perf_counter() - started}
    with torch.no_grad():
        row["inference ms"] = milliseconds(forward, repeats)
    row["forward ms"] = milliseconds(forward, repeats)
    row["step ms"] = milliseconds(step, repeats)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = forward()
    row["saved MiB"] = (torch.cuda.memory_allocated() - before) / 2**20
    torch.autograd.grad(o, tensors, do)
    row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def measured(name: str, op: Callable, tensors: list[Tensor], repeats: int) -> Optional[dict[str, float]]:
    """`measure`; of a peer that refuses this device or Triton, its reason and nothing."""
    try:
        return measure(op, tensors, repeats)
    except RuntimeError as error:
        if not name.startswith("fla-core"):
            raise
        console.print(f"{name} is left out: {str(error).splitlines()[0]}")
        return None


def kernel_times(op: Callable, tensors: list[Tensor], steps: int = 10) -> dict[str, float]:
    """Milliseconds of each kernel in one training step."""
    do = torch.randn_like(op(*tensors))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            torch.autograd.grad(op(*tensors), tensors, do)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / steps / 1e3 for event in profile.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms > 0.002}


def draw(B: int, T: int, H: int, scalar_g: bool = False, tied: bool = False) -> list[Tensor]:
    """Fresh random q, k, v, g and b, w (or, tied, one beta per head) that need gradients."""
    normal = lambda *shape: torch.randn(B, T, H, *shape, device="cuda", dtype=torch.bfloat16)
    g = -0.3 * torch.rand(B, T, H, *(() if scalar_g else (K,)), device="cuda")
    gates = [normal().sigmoid()] if tied else [normal(K).sigmoid(), normal(K).sigmoid()]
    return [x.requires_grad_() for x in (normal(K), normal(K), normal(K), g, *gates)]


def documents(T: int) -> Tensor:
    """Offsets of about five documents per 4096 tokens."""
    rng = torch.Generator().manual_seed(0)
    cuts = torch.randperm(T - 1, generator=rng)[: 5 * T // 4096 - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([T])]).to("cuda", torch.int64)


def tied(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """KDA (g [B, T, H, K]) and Gated DeltaNet (g [B, T, H]) by the GDN-2 kernels: one gate beta [B, T, H] for all."""
    gate = beta[..., None].expand(v.shape)
    g = g if g.ndim == 4 else g[..., None].expand(k.shape)
    return chunk_gdn2_fused(q, k, v, g, gate, gate, use_qk_l2norm_in_kernel=True)[0]


def cases(shapes: list[tuple[int, ...]], packed: list[tuple[int, ...]], peers: dict[str, Callable]) -> list[Callable]:
    """Builders of the cases, so that the inputs of one are freed before the next."""

    def gdn2(title: str, B: int, T: int, H: int, cu_seqlens: Optional[Tensor] = None, recompute: bool = False) -> Case:
        options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
        policies = ["none", "scores", "all"] if recompute else ["none"]
        first = lambda op, **more: lambda *tensors: op(*tensors, **options, **more)[0]
        ops = {f"ours, recompute {p}": first(chunk_gdn2_fused, recompute=p) for p in policies}
        if "gdn2" in peers:
            ops["fla-core chunk_gdn2"] = first(peers["gdn2"])
        return Case(title, draw(B, T, H), ops, B * T * H)

    def other(kind: str, peer: str, B: int, T: int, H: int) -> Case:
        fla = lambda *tensors: peers[peer](*tensors, use_qk_l2norm_in_kernel=True)[0]
        ops = {f"ours as {kind}": tied, **({f"fla-core {peers[peer].__name__}": fla} if peer in peers else {})}
        tensors = draw(B, T, H, scalar_g=kind == "Gated DeltaNet", tied=True)
        return Case(f"{kind}, {B} x {T} x {H}", tensors, ops, B * T * H, kind)

    name = lambda shape: " x ".join(map(str, shape))
    found = [partial(gdn2, name(s), *s, recompute=i == 0) for i, s in enumerate(shapes)]
    found += [partial(lambda T, H: gdn2(f"packed {T} x {H}", 1, T, H, documents(T)), *s) for s in packed]
    found += [
        partial(other, "KDA", "kda", *shapes[0]),
        partial(other, "Gated DeltaNet", "gated delta rule", *shapes[0]),
    ]
    return found


def fla_ops() -> dict[str, Callable]:
    """fla-core's operators, none if it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gdn2 import chunk_gdn2
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        console.print(f"fla-core is left out: {error}. Install it with: pip install fla-core==0.6.0 einops")
        return {}
    return {"gdn2": chunk_gdn2, "kda": chunk_kda, "gated delta rule": chunk_gated_delta_rule}


def draw_roofline(path: Path, results: list[dict], bandwidth: float, rate: float, device: str) -> None:
    """Achieved FLOP/s over arithmetic intensity, both counted as the floor counts, under the device's two ceilings."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    x = [1, rate / bandwidth, 1e4]
    axes.plot(x, [min(rate, bandwidth * i) / 1e12 for i in x], color="black", label="ceiling (copy, matrix product)")
    for who, marker, color in (("ours", "o", "tab:blue"), ("fla-core", "s", "tab:orange")):
        for what, column, fill in (("forward", "forward ms", "none"), ("step", "step ms", color)):
            points = [
                (flops / size, flops / row[column] / 1e9)
                for result in results
                for size, flops in [result["least"][what]]
                for name, row in result["rows"].items()
                if name.startswith(who) and result["kind"] == "GDN-2"
            ]
            label = f"{who}, {'forward' if what == 'forward' else 'forward + backward'}"
            axes.scatter(
                *zip(*points), marker=marker, facecolors=fill, edgecolors=color, label=label
            ) if points else None
    axes.set(xscale="log", yscale="log", xlim=(10, 1e4), xlabel="least FLOPs / least bytes", ylabel="TFLOP/s")
    axes.set_title(f"GDN-2 kernels, {device}, bf16, K = V = {K}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=140)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4x4096x16"], help="B x T x H")
    parser.add_argument("--packed", nargs="*", default=[], help="T x H of one row of packed documents")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; the median counts")
    parser.add_argument("--no_fla", action="store_true", help="leave fla-core out")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    parser.add_argument("--picture", type=Path, help="draw the roofline as PNG")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU and this machine shows none.")
    try:
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes]
        packed = [tuple(int(n) for n in shape.split("x")) for shape in args.packed]
        assert all(len(shape) == 3 for shape in shapes) and all(len(shape) == 2 for shape in packed)
    except (ValueError, AssertionError):
        raise UserError("a shape is BxTxH such as 4x4096x16, or TxH such as 16384x16 after --packed.") from None

    peers = {} if args.no_fla else fla_ops()
    bandwidth, rate = ceilings(args.repeats)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    machine |= {"copy TB/s": bandwidth / 1e12, "bf16 TFLOP/s": rate / 1e12}
    console.print(machine)
    results = []
    for build in cases(shapes, packed, peers):
        case = build()
        least = floors(case.tokens)
        floor = {name: 1e3 * max(n / bandwidth, f / rate) for name, (n, f) in least.items()}
        rows = {name: measured(name, op, case.tensors, args.repeats) for name, op in case.ops.items()}
        rows = {name: row for name, row in rows.items() if row}
        table = Table("", *next(iter(rows.values())), title=case.title)
        for name, row in rows.items():
            table.add_row(name, *(f"{x:.3f}" if x < 100 else f"{x:.0f}" for x in row.values()))
        table.add_row("floor", "", f"{floor['forward']:.3f}", f"{floor['forward']:.3f}", f"{floor['step']:.3f}", "", "")
        console.print(table)
        ours, peer = next(iter(rows)), list(rows)[-1]
        if peer.startswith("fla-core"):
            gains = {key: rows[peer][key] / rows[ours][key] for key in ("forward ms", "step ms")}
            console.print(f"faster than {peer} by", {key: f"{gain:.2f}x" for key, gain in gains.items()})
        kernels = kernel_times(case.ops[ours], case.tensors)
        console.print("ours, ms per kernel:", kernels)
        results.append({"case": case.title, "kind": case.kind, "least": least, "floor ms": floor, "rows": rows})
        results[-1]["kernels ms"] = kernels
        del case
        if args.out:  # after every case, so that an interruption loses one
            args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    if args.picture:
        draw_roofline(args.picture, results, bandwidth, rate, machine["device"])
    console.print("wrote", *filter(None, (args.out, args.picture)))


if __name__ == "__main__":
    main()
