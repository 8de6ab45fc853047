"""What a run is watched by besides its loss: norms of gradients and parameters, gates and states of GDN-2 layers.

An examination looks at the gradients of the step under way and runs one sequence forward with hooks that it takes away
again; between two of them a step does nothing for it.
"""

import re
from collections.abc import Sequence
from typing import Any, Optional

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_gpt.config import ModelConfig
from lit_gpt.mixers.gdn2 import GatedDeltaNet2
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.delayed import mean_over_ranks

SATURATED = 0.01  # a gate is saturated below this share of its range, and above 1 less this
GATES = ("decay", "b_low", "b_high", "w_low", "w_high", "A_min", "A_max", "state", "state_max")
"""Of a GDN-2 layer: mean decay exp(g); shares of b and w that are saturated low and high; the range of A = exp(A_log);
mean and largest norm over the heads of their state after the last token.
"""


def examine(fabric: Fabric, model: _FabricModule, batch: Batch) -> dict:
    """Norms and gate statistics, for metrics.jsonl. All ranks together, between backward pass and clipping.

    Args:
        model: a GPT as Fabric runs it, its gradients of the whole batch.
        batch: of this rank; its first sequence is run. Statistics are means over the ranks, maxima where they say so.

    Returns:
        {"health": {"grad_norm": {kind: norm}, "param_norm": {kind: norm}, "block_grad_norm": [by block],
        "gdn2_layers": [numbers of the GDN-2 blocks], and for each name of GATES a list over those}}
    """
    gates = gate_statistics(fabric, model, batch)
    config = model.module.config
    names, parameters = zip(*((name, p.detach()) for name, p in model.module.named_parameters()))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.module.parameters()]
    of_parameters, of_gradients = torch.stack([norms_of(parameters), norms_of(gradients)]).tolist()
    blocks = [f"block {layer}" for layer in range(config.n_layer)]
    by_block = grouped(of_gradients, [block_of(name) for name in names])
    kinds = [kind_of(name, config) for name in names]
    record = {
        "grad_norm": grouped(of_gradients, kinds),
        "param_norm": grouped(of_parameters, kinds),
        "block_grad_norm": [by_block[block] for block in blocks],
    }
    if gates is not None:
        record["gdn2_layers"] = [layer for layer in range(config.n_layer) if config.mixer(layer) == "gdn2"]
        record |= dict(zip(GATES, gates.T.tolist()))
    return {"health": _rounded(record)}


@torch.no_grad()
def gate_statistics(fabric: Fabric, model: nn.Module, batch: Batch) -> Optional[Tensor]:
    """GATES of each GDN-2 layer [layers, len(GATES)] on the first sequence of a batch; None without such layers."""
    mixers = [module for module in model.modules() if isinstance(module, GatedDeltaNet2)]
    if not mixers:
        return None
    seen: dict[GatedDeltaNet2, Tensor] = {}

    def look(mixer: GatedDeltaNet2, inputs: tuple) -> None:
        x, documents, _ = inputs
        seen[mixer] = _statistics(mixer, *mixer.inspect(x, documents))

    hooks = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    try:
        length = batch.tokens.shape[1] - 1
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.clamp(max=length)
        tokens, cu_seqlens = fabric.to_device((batch.tokens[:1], cu_seqlens))
        model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens, rows_apart=True)
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            if isinstance(module, FSDPModule):  # without a backward pass the outermost would stay whole,
                module.reshard()  # and hide its gradients from whoever asks for parameters
    statistics = torch.stack([seen[mixer] for mixer in mixers])
    largest = statistics[:, -1].clone()
    mean_over_ranks(statistics)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, ReduceOp.MAX)
    statistics[:, -1] = largest
    return statistics


def _statistics(mixer: GatedDeltaNet2, g: Tensor, b: Tensor, w: Tensor, state: Tensor) -> Tensor:
    """GATES of one layer, from g, b [B, T, HV, K], w [B, T, HV, V] and the state [B, HV, K, V]."""
    b = b.float() / mixer.config.erase_range
    w = w.float() / (mixer.config.erase_range if mixer.config.write == "tied" else 1)
    saturated = [x for gate in (b, w) for x in (gate < SATURATED, gate > 1 - SATURATED)]
    A, norms = mixer.A_log.float().exp(), state.float().flatten(2).norm(dim=-1)
    values = [g.exp().mean(), *(s.float().mean() for s in saturated), A.min(), A.max(), norms.mean(), norms.max()]
    return torch.stack([value.float() for value in values])


def _rounded(value: Any) -> Any:
    """Every float to five digits, which is what a picture shows and a line of metrics.jsonl has room for."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor [n], whole, however it is sharded."""
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensors])
    return norms.full_tensor() if isinstance(norms, DTensor) else norms


def grouped(norms: list[float], groups: list[str]) -> dict[str, float]:
    """The norm of all, and of the members of each group, from the norms of single tensors."""
    squares = {"total": 0.0}
    for norm, group in zip(norms, groups):
        squares["total"] += norm**2
        squares[group] = squares.get(group, 0.0) + norm**2
    return {group: square**0.5 for group, square in squares.items()}


def block_of(name: str) -> str:
    """`block 3` of a parameter in the fourth block, `outside` of one in none."""
    match = re.search(r"\bh\.(\d+)\.", name)
    return f"block {match[1]}" if match else "outside"


def kind_of(name: str, config: ModelConfig) -> str:
    """What a parameter belongs to: embedding, head, norms, mlp, or the kind of mixer."""
    if ".mixer." in name:
        return config.mixer(int(block_of(name).removeprefix("block ")))
    kinds = {"wte": "embedding", "lm_head": "head", "mlp": "mlp"}
    return next((kind for part, kind in kinds.items() if part in name.split(".")), "norms")


def summary_line(health: dict) -> str:
    """One line of it for people."""
    grad, kinds = health["grad_norm"], [kind for kind in health["grad_norm"] if kind != "total"]
    parts = [f"gradient {grad['total']:.3f}, most in {max(kinds, key=grad.get)}"]
    parts += [f"weights {health['param_norm']['total']:.1f}"]
    if "gdn2_layers" in health:
        mean = lambda name: sum(health[name]) / len(health[name])
        parts += [f"decay {min(health['decay']):.3f} to {max(health['decay']):.3f}"]
        parts += [f"saturated b {mean('b_low') + mean('b_high'):.1%}, w {mean('w_low') + mean('w_high'):.1%}"]
        parts += [f"A {min(health['A_min']):.2f} to {max(health['A_max']):.2f}"]
        parts += [f"state {mean('state'):.2f}, at most {max(health['state_max']):.2f}"]
    return "  ".join(parts)
