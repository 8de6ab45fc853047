"""The cases that fla-core 0.6.0 tests its chunk_gdn2 and chunk_kda on: shapes, options, tolerances; and their errors.

KDA is GDN-2 with one gate per head in place of b and w. The reference is in float64, not in float32 as fla's is.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

GDN2 = {"o": 5e-3, "ht": 5e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2, "dh0": 1e-2, "dg": 2e-2, "db": 2e-2, "dw": 2e-2}
GDN2 |= {"dA_log": 2e-2, "ddt_bias": 2e-2}
GDN2_PACKED = {**GDN2, "o": 6e-3, "ht": 6e-3, "dq": 1.2e-2, "dk": 1.2e-2, "dv": 1.2e-2, "dh0": 1.2e-2}
KDA = {"o": 5e-3, "ht": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dh0": 8e-3, "dg": 2e-2, "db": 2e-2}
KDA |= {"dA_log": 8e-3, "ddt_bias": 8e-3}  # of dA_log theirs warn above 3e-3 and fail on nothing
KDA_PACKED = {**KDA, "dg": 1.5e-2, "db": 1.5e-2}


@dataclass(frozen=True)
class Case:
    T: int
    D: int
    """K, and V."""
    B: int = 1
    H: int = 2
    HV: Optional[int] = None
    dtype: torch.dtype = torch.float16
    tolerances: Optional[dict] = None
    scale: float = 1.0
    l2norm: bool = True
    gate: bool = False
    """-exp(A_log) softplus(g + dt_bias) in the kernel."""
    lower_bound: Optional[float] = None
    """With it, lower_bound sigmoid(exp(A_log) (g + dt_bias)) instead."""
    offsets: Optional[tuple[int, ...]] = None
    tied: bool = False
    """KDA: b = w, one per head."""
    normalizer: Optional[float] = None
    """Log-decays are logsigmoid(normal) / normalizer; None: uniform from -5 to -0.1."""
    mask_p: float = 0.0
    """Share of the log-decays that are replaced..."""
    mask_value: float = 0.0
    """...by this."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"{self.B}x{self.T}x{self.H}" + (f":{self.HV}" if self.HV else "") + f"x{self.D}", dtype]
        parts += [f"scale{self.scale:g}"] * (self.scale != 1) + ["nol2norm"] * (not self.l2norm)
        parts += ["gate"] * self.gate + [f"lower{self.lower_bound}"] * (self.lower_bound is not None)
        parts += ["packed" + "-".join(map(str, self.offsets))] if self.offsets else []
        parts += ["kda"] * self.tied + [f"logsigmoid{self.normalizer}"] * (self.normalizer is not None)
        return "-".join(parts + [f"mask{self.mask_p}of{self.mask_value:g}"] * (self.mask_p > 0))

    def small(self) -> "Case":
        """The same options at a size for Triton's interpreter, in float32."""
        T = 70 if self.T > 64 else min(self.T, 20)
        offsets = self.offsets and tuple(T * n // self.T for n in self.offsets)
        HV = self.HV and 2
        return replace(self, B=1, T=T, H=1, HV=HV, D=16, dtype=torch.float32, offsets=offsets, scale=1.0)


def _gdn2_cases() -> Iterator[Case]:
    fp32, fp16, gate = torch.float32, torch.float16, {"gate": True}
    yield Case(64, 32, B=1, H=2, dtype=fp32, tolerances=GDN2, l2norm=False)
    yield Case(256, 64, B=2, H=2, dtype=fp32, tolerances=GDN2, scale=0.5)
    yield Case(100, 64, B=2, H=3, dtype=fp16, tolerances=GDN2)
    yield Case(256, 64, B=2, H=2, dtype=fp32, tolerances=GDN2, **gate)
    yield Case(128, 64, B=1, H=2, dtype=fp32, tolerances=GDN2, lower_bound=-5.0, **gate)
    yield Case(128, 64, H=2, dtype=fp32, tolerances=GDN2_PACKED, offsets=(0, 64, 128))
    yield Case(256, 64, H=2, dtype=fp16, tolerances=GDN2_PACKED, offsets=(0, 15, 100, 256))
    yield Case(512, 64, H=2, dtype=fp16, tolerances=GDN2_PACKED, offsets=(0, 100, 300, 512), **gate)
    # No case of theirs has the size and type that models have.
    yield Case(4096, 128, B=4, H=16, dtype=torch.bfloat16, tolerances=GDN2, scale=128**-0.5)
    yield Case(4096, 128, B=1, H=16, dtype=torch.bfloat16, tolerances=GDN2, **gate)


def _kda_cases() -> Iterator[Case]:
    bf16, common = torch.bfloat16, {"tied": True, "tolerances": KDA}
    yield Case(63, 64, B=1, H=1, normalizer=1.0, **common)
    yield Case(160, 60, B=2, H=3, normalizer=1.0, scale=0.1, **common)
    yield Case(500, 60, B=2, H=3, normalizer=1.0, mask_p=0.5, **common)
    yield Case(1000, 64, B=2, H=3, normalizer=0.1, scale=0.1, mask_p=0.5, **common)
    yield Case(1024, 100, B=3, H=4, normalizer=1.0, scale=0.1, **common)
    yield Case(1024, 128, B=4, H=4, normalizer=0.1, scale=1.0, **common)
    yield Case(1024, 128, B=4, H=4, normalizer=10.0, scale=0.1, l2norm=True, **common)
    yield Case(1500, 128, B=2, H=2, HV=4, normalizer=1.0, dtype=bf16, **common)
    yield Case(2048, 64, B=1, H=2, HV=8, normalizer=1.0, dtype=bf16, scale=0.1, **common)
    yield Case(2048, 64, B=4, H=8, dtype=bf16, gate=True, normalizer=1.0, scale=0.1, **common)
    yield Case(1500, 128, B=2, H=4, dtype=bf16, gate=True, lower_bound=-5.0, normalizer=1.0, scale=0.1, **common)
    packed = {"tied": True, "tolerances": KDA_PACKED, "mask_value": -1000.0, "normalizer": 1.0}
    yield Case(15, 60, H=4, offsets=(0, 15), mask_p=0.1, **packed)
    yield Case(1000, 64, H=4, offsets=(0, 256, 500, 1000), mask_p=0.9, **packed)
    yield Case(2000, 100, H=4, offsets=(0, 15, 100, 300, 1200, 2000), mask_p=0.5, **packed)
    yield Case(4096, 256, H=4, offsets=(0, 100, 300, 1200, 3000, 4096), mask_p=0.5, dtype=bf16, **packed)
    yield Case(160, 64, H=2, offsets=(0, 31, 96, 160), mask_p=0.1, **packed)


CASES = [*_gdn2_cases(), *_kda_cases()]
SMALL = list({str(case.small()): case.small() for case in CASES}.values())


def draw(case: Case, device: str) -> dict[str, Tensor]:
    """The leaves: q, k, v, g, gates, h0, and with a gate A_log and dt_bias; g and the states in float32."""
    rng = torch.Generator().manual_seed(case.T)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(shape, generator=rng)
    B, T, H, HV, D = case.B, case.T, case.H, case.HV or case.H, case.D
    N = B if case.offsets is None else len(case.offsets) - 1
    q, k, v, h0 = normal(B, T, H, D), normal(B, T, H, D), 0.5 * normal(B, T, HV, D), normal(N, HV, D, D)
    if not case.l2norm:  # by the caller then: without any norm the state explodes
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if case.gate:
        g = normal(B, T, HV, D)
    elif case.normalizer is None:
        g = uniform(-5, -0.1, B, T, HV, D)
    else:
        g = F.logsigmoid(normal(B, T, HV, D)) / case.normalizer
    g = torch.where(uniform(0, 1, *g.shape) < case.mask_p, case.mask_value, g)
    leaves = {"q": q, "k": k, "v": v, "g": g}
    if case.tied:
        leaves |= {"b": normal(B, T, HV, 1).sigmoid()}
    else:
        leaves |= {"b": uniform(0, 1, B, T, HV, D), "w": uniform(0, 1, B, T, HV, D)}
    leaves = {name: x if name == "g" and not case.gate else x.to(case.dtype) for name, x in leaves.items()}
    if case.gate:
        leaves |= {"A_log": uniform(1, 16, HV).log(), "dt_bias": normal(HV * D)}
    return {name: x.to(device) for name, x in (leaves | {"h0": h0}).items()}


def results(op: Callable, case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """o, the final state, and the gradient of every leaf for fixed random gradients of both."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    q, k, v, g, b, h0 = (leaves[name] for name in ("q", "k", "v", "g", "b", "h0"))
    w = b.expand_as(v) if case.tied else leaves["w"]
    options = {"use_qk_l2norm_in_kernel": case.l2norm, "use_gate_in_kernel": case.gate}
    if case.gate:
        options |= {"A_log": leaves["A_log"], "dt_bias": leaves["dt_bias"]}
        options |= {"lower_bound": case.lower_bound} if case.lower_bound is not None else {}
    if case.offsets is not None:
        options["cu_seqlens"] = torch.tensor(case.offsets, device=q.device)
    o, ht = op(
        q, k, v, g, b.expand_as(g), w, scale=case.scale, initial_state=h0, output_final_state=True, **options
    )  # fmt: skip
    rng = torch.Generator().manual_seed(1)
    do, dht = (torch.randn(x.shape, generator=rng).to(x) for x in (o, ht))
    torch.autograd.backward([o, ht], [do, dht])
    return {"o": o.detach(), "ht": ht.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected; 0 for differences up to 1e-6; nan if any."""
    difference = found.double() - expected
    if not found.isfinite().all():
        return math.nan
    if difference.abs().max() <= 1e-6:
        return 0.0
    return (difference.square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)).item()


def errors(op: Callable, reference: Callable, case: Case, device: str) -> dict[str, float]:
    """Of every result of `op`, against `reference` in float64."""
    leaves = draw(case, device)
    found = results(op, case, leaves)
    expected = results(reference, case, {name: x.double() for name, x in leaves.items()})
    return {name: error(x, expected[name]) for name, x in found.items()}
