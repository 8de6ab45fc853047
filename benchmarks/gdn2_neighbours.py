"""The GDN-2 layer's neighbours, short convolution and gated norm: the kernels, plain PyTorch, compiled, and the floor.

python benchmarks/gdn2_neighbours.py --out neighbours.json
python benchmarks/gdn2_neighbours.py --tune     also times other tile sizes, to choose the constants of the kernels by

At 4 x 4096 tokens, 16 heads of 128, bf16; inputs are slices of a projection as wide as the layer's. The floor is each
input read once and each output written once, over the copy bandwidth measured here. Calls are captured in CUDA graphs,
so that what is timed is the device. Errors are relative, against float64.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from gdn2_kernels import ceilings, milliseconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops import gated_norm, short_conv
from lit_gpt.ops.gated_norm import kernels as norm_kernels
from lit_gpt.ops.short_conv import kernels as conv_kernels

B, T, HEADS, SIZE, TAPS = 4, 4096, 16, 128, 4
C = HEADS * SIZE
WIDTH = 3 * C + 128 + 2 * C + 128  # q, k, v, decay, erase, write, output gate
console = Console()


class Case(NamedTuple):
    name: str
    fused: Callable[..., list[Tensor]]
    plain: Callable[..., list[Tensor]]
    leaves: list[Tensor]
    module: object
    """Whose constants are tuned."""
    choices: dict[str, list[int]]
    """Values for each constant, or for several by the names between the spaces."""


def cases() -> list[Case]:
    projection = torch.randn(B, T, WIDTH, device="cuda", dtype=torch.bfloat16)
    x, taps = projection[..., : 3 * C].requires_grad_(), torch.randn(3 * C, TAPS, device="cuda", requires_grad=True)
    positions = torch.arange(T, device="cuda").remainder(800).expand(B, T).contiguous()
    sizes = [C, C, C]
    o = torch.randn(B, T, HEADS, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate = torch.randn(B, T, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(SIZE, device="cuda", requires_grad=True)

    def conv(where):
        at = lambda x: None if where is None else where[: len(x)]
        plain = lambda x, taps: [y.contiguous() for y in short_conv._plain(x, taps, at(x), None).split(sizes, dim=-1)]
        return lambda x, taps: short_conv.short_conv(x, taps, sizes, at(x)), plain

    def norm(x, weight, gate):
        return [(gated_norm.rms_norm(x, weight, 1e-5) * torch.nn.functional.silu(gate.view_as(x))).to(x.dtype)]

    tiles = {"FORWARD_BT BACKWARD_BT": [32, 64, 128], "FORWARD_STAGES BACKWARD_STAGES": [1, 2, 3], "BC": [128, 256]}
    fused_norm = lambda x, weight, gate: [gated_norm.gated_rms_norm(x, weight, gate, 1e-5, "silu")]
    return [
        Case("conv + SiLU", *conv(None), [x, taps], conv_kernels, tiles),
        Case("conv + SiLU, documents of 800", *conv(positions), [x, taps], conv_kernels, tiles),
        Case("norm x SiLU gate", fused_norm, norm, [o, weight, gate], norm_kernels,
             {"ELEMENTS": [1024, 2048, 4096], "TILES": [8, 16, 32], "WARPS": [2, 4, 8]}),
    ]  # fmt: skip


def times(op, leaves: list[Tensor], grads: list[Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds forward (with gradients wanted) and backward."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outputs = op(*leaves)
        runs = lambda: op(*leaves), lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        for run in runs:
            run()
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in runs]
    for graph, run in zip(graphs, runs):
        with torch.cuda.graph(graph, stream=stream):
            run()
    forward, backward = (milliseconds(graph.replay, repeats) for graph in graphs)
    return forward, backward


def errors(case: Case, grads: list[Tensor]) -> tuple[float, float]:
    """Largest relative error of outputs and of gradients, on the first sequence, against the plain code in float64."""
    whole = [x if x.ndim < 3 else x[:1] for x in case.leaves]
    results = []
    for op, dtype in ((case.fused, None), (case.plain, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in whole]
        outputs = op(*leaves)
        results.append((outputs, torch.autograd.grad(outputs, leaves, [g[:1].to(y) for g, y in zip(grads, outputs)])))
    relative = lambda found, wanted: max(((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted))
    return relative(results[0][0], results[1][0]), relative(results[0][1], results[1][1])


def tune(case: Case, grads: list[Tensor], repeats: int) -> list[dict]:
    """The kernels' times for every choice of their constants, fastest first."""
    kept, rows = {name: getattr(case.module, name) for names in case.choices for name in names.split()}, []
    for values in itertools.product(*case.choices.values()):
        chosen = {name: value for names, value in zip(case.choices, values) for name in names.split()}
        for name, value in chosen.items():
            setattr(case.module, name, value)
        forward, backward = times(case.fused, case.leaves, grads, repeats)
        rows.append({**chosen, "forward ms": forward, "backward ms": backward, "error": max(errors(case, grads))})
    for name, value in kept.items():
        setattr(case.module, name, value)
    return sorted(rows, key=lambda row: row["forward ms"] + row["backward ms"])


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed calls; the median counts")
    parser.add_argument("--tune", action="store_true", help="time other constants of the kernels too")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels are timed on a GPU and this machine shows none.")
    bandwidth, _ = ceilings(args.repeats)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    machine["copy TB/s"] = bandwidth / 1e12
    console.print(machine)
    table = Table(title=f"{B} x {T} tokens, {HEADS} heads of {SIZE}, bf16: milliseconds (TB/s of the floor's bytes)")
    for column in ("", "direction", "kernel", "plain", "compiled", "floor", "error"):
        table.add_column(column, justify="left" if column in ("", "direction") else "right")
    results, tuned = [], []
    for case in cases():
        with console.status(case.name), torch.no_grad():
            grads = [torch.randn_like(y) for y in case.fused(*case.leaves)]
        with console.status(case.name):
            compiled = torch.compile(case.plain, fullgraph=True)
            measured = [times(op, case.leaves, grads, args.repeats) for op in (case.fused, case.plain, compiled)]
            found = errors(case, grads)
        inputs, outputs = (sum(x.numel() * x.element_size() for x in xs) for xs in (case.leaves, grads))
        for way, direction in enumerate(("forward", "backward")):
            moved = inputs + outputs if direction == "forward" else 2 * inputs + outputs
            row = dict(zip(("kernel", "plain", "compiled"), (both[way] for both in measured)))
            row["floor"] = 1e3 * moved / bandwidth
            cells = [f"{ms:.3f} ({moved / ms / 1e9:.2f})" for ms in row.values()]
            table.add_row(case.name, direction, *cells, f"{found[way]:.1e}")
            results.append({"op": case.name, "direction": direction, "bytes": moved, "error": found[way], **row})
        if args.tune:
            with console.status(f"tuning {case.name}"):
                tuned.append({"op": case.name, "choices": tune(case, grads, args.repeats)})
    console.print(table)
    for tuning in tuned:
        console.print(tuning["op"], *map(str, tuning["choices"][:6]), sep="\n  ")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "results": results, "tuned": tuned}, indent=1))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
