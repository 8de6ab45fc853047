"""How far the fused GDN-2 kernels, and fla-core's, are from float64: every result, mild and extreme gates.

python benchmarks/gdn2_accuracy.py --out results.json

For o, the final state and each gradient: relative error ||x - y|| / ||y||, and the signed bias <x - y, y> / ||y||^2, by
how much the result as a whole is too large or too small. dg is measured once more in decaying channels alone, there
where its own scale is small. bf16 inputs, K = V = 128, L2 norm in the kernel. Also: two runs agree bit for bit, and so
do the outputs of a prefix when all that follows it changes.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.ops.gdn2 import chunk_gdn2
from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

RESULTS = ("o", "state", "dq", "dk", "dv", "dg", "db", "dw")
DECAYING = 16
"""Channels that the regimes of constant decay apply to; the others stay mild."""
console = Console(width=160)


def draw(regime: str, B: int, T: int, H: int) -> list[Tensor]:
    """q, k, v, g, b, w of a regime, on the GPU; bf16, g in fp32."""
    rng = torch.Generator("cuda").manual_seed(0)
    normal = lambda: torch.randn(B, T, H, 128, device="cuda", generator=rng)
    uniform = lambda: torch.rand(B, T, H, 128, device="cuda", generator=rng)
    q, k, v, g, b, w = normal(), normal(), normal(), -0.3 * uniform(), normal().sigmoid(), normal().sigmoid()
    kind, _, value = regime.partition(" ")
    if kind == "uniform":
        g = -float(value) * uniform()
    elif kind == "constant":
        g[..., :DECAYING] = -float(value)
    elif kind == "isolated":
        g = torch.where(uniform() < 0.01, -float(value), g)
    elif kind == "resets":
        g[:, ::200] = -torch.inf
    elif kind == "correlated":
        g, b, k = torch.zeros_like(g), torch.ones_like(b), k[:, :1] + 0.1 * k
    elif kind == "gates":
        b, w = (uniform() < 0.5).float(), (uniform() < 0.5).float()
    elif kind == "erase":
        b = 2 * uniform()
    return [x if x is g else x.bfloat16() for x in (q, k, v, g, b, w)]


REGIMES = ["mild", "uniform 5", "constant 6.5", "constant 12", "constant 20", "isolated 100", "isolated 1000"]
REGIMES += ["isolated inf", "resets", "correlated keys, b = 1, g = 0", "gates exactly 0 or 1", "erase gate in [0, 2]"]


def results(op, tensors: list[Tensor], dtype=None) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input, for fixed gradients of both."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    o, state = op(*tensors, use_qk_l2norm_in_kernel=True, output_final_state=True)
    rng = torch.Generator("cuda").manual_seed(1)
    do, dstate = (torch.randn(x.shape, device="cuda", generator=rng).bfloat16().to(x.dtype) for x in (o, state))
    grads = torch.autograd.grad([o, state], tensors, [do, dstate])
    return dict(zip(RESULTS, (o.detach(), state.detach(), *grads)))


def compare(got: dict[str, Tensor], want: dict[str, Tensor], decaying: bool) -> dict[str, tuple[float, float]]:
    """(relative error, signed bias) of each result; `decaying` adds dg in the decaying channels alone."""
    pairs = {name: (got[name].double(), y.double()) for name, y in want.items()}
    if decaying:
        pairs["dg decaying"] = tuple(x[..., :DECAYING] for x in pairs["dg"])
    out = {}
    for name, (x, y) in pairs.items():
        norm = y.norm().clamp_min(1e-300)
        out[name] = (((x - y).norm() / norm).item(), ((x - y).mul(y).sum() / norm**2).item())
    return out


def repeatable(op, tensors: list[Tensor]) -> dict[str, bool]:
    """Whether two runs agree bit for bit, and whether a prefix ignores what follows."""
    first, second = results(op, tensors), results(op, tensors)
    same = all(torch.equal(first[name], second[name]) for name in first)
    cut = tensors[0].shape[1] // 2 + 13
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, cut:] = x[:, cut:].flip(1)
    changed[3][:, cut:] -= 7.0
    prefix = results(op, changed)["o"][:, :cut]
    return {"two runs bit-identical": same, "prefix bit-identical": torch.equal(first["o"][:, :cut], prefix)}


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1x2048x8", help="B x T x H")
    parser.add_argument("--no_fla", action="store_true", help="leave fla-core out")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels run on a GPU and this machine shows none.")
    shape = [int(n) for n in args.shape.split("x")]
    ops = {"ours": chunk_gdn2_fused}
    if not args.no_fla:
        try:
            from fla.ops.gdn2 import chunk_gdn2 as fla_chunk_gdn2

            ops["fla-core"] = fla_chunk_gdn2
        except ImportError as error:
            console.print(f"fla-core is left out: {error}. Install it with: pip install fla-core==0.6.0 einops")

    table = Table("gates", "", *RESULTS, "dg decaying", title="relative error / signed bias, in units of 0.001")
    measured = {}
    for regime in REGIMES:
        tensors = draw(regime, *shape)
        want = results(chunk_gdn2, tensors, torch.float64)
        measured[regime] = {}
        for name, op in ops.items():
            row = compare(results(op, tensors), want, regime.startswith("constant"))
            measured[regime][name] = row
            table.add_row(regime, name, *(f"{1e3 * e:.2f} / {1e3 * bias:+.2f}" for e, bias in row.values()))
    console.print(table)
    checks = repeatable(chunk_gdn2_fused, draw("mild", *shape))
    console.print(checks)
    if args.out:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        args.out.write_text(json.dumps({"machine": machine, "shape": shape, **checks, "errors": measured}, indent=1))
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
