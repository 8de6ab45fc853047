"""AdamW with named parameter groups."""

from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn


@dataclass(kw_only=True)
class OptimizerArgs:
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings. Norms, biases, convolutions, A_log and dt_bias have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    grad_clip: float = 1.0
    """Norm to which the gradient of all parameters together is clipped; 0: no clipping."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Every parameter once, in groups `matrices`, `embeddings` and `no decay`, with the names of the parameters in
    each.

    Only weights of linear layers and embeddings decay: whatever else there is (norms, biases, convolutions, A_log,
    dt_bias) sets scales and time constants, which have no business near zero.
    """
    kind = {id(m.weight): "matrices" for m in model.modules() if isinstance(m, nn.Linear)}
    kind |= {id(m.weight): "embeddings" for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {
        name: {"name": name, "params": [], "parameter_names": []} for name in ("matrices", "embeddings", "no decay")
    }
    for name, parameter in model.named_parameters():
        group = groups[kind.get(id(parameter), "no decay")]
        group["params"].append(parameter)
        group["parameter_names"].append(name)
    for name, group in groups.items():
        group["weight_decay"] = 0.0 if name == "no decay" else weight_decay
    return list(groups.values())


def adamw(model: nn.Module, args: OptimizerArgs) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over parameter_groups; the learning rate is set at every step.

    Fused on every device: that form leaves a step out, moments and all, where `optimizer.found_inf` is 1 on the device.
    """
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"]} for g in parameter_groups(model, args.weight_decay)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(args.beta1, args.beta2), eps=1e-8, fused=True)


def describe_groups(groups: list[dict]) -> Table:
    """What decays and what does not, for people."""
    table = Table("parameter group", "tensors", "parameters", "weight decay", "for example", title="AdamW")
    for g in groups:
        count = f"{sum(p.numel() for p in g['params']):,}"
        kinds = sorted({".".join(n.split(".")[-2:]) for n in g["parameter_names"]})
        table.add_row(g["name"], str(len(g["params"])), count, str(g["weight_decay"]), ", ".join(kinds[:6]))
    return table
