"""The pictures of a run: loss.png and health.png."""

import math
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_losses(records: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss against tokens into a PNG, replaced in one step."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    training = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    if training:
        axes.plot(*zip(*training), color="0.6", linewidth=1, label="training")
    for name in sorted(
        {k for r in records for k in r if k.startswith("val_loss@")}, key=lambda k: int(k.split("@")[1])
    ):
        axes.plot(*zip(*[(r["tokens"], r[name]) for r in records if name in r]), marker="o", markersize=3, label=name)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    _replace(figure, path)


def plot_health(records: list[dict], path: Path, title: str) -> None:
    """Draw what health.examine recorded against tokens into a PNG, replaced in one step; blocks from dark to light."""
    records = [r for r in records if "health" in r]
    tokens, healths = [r["tokens"] for r in records], [r["health"] for r in records]
    last = healths[-1]
    kinds = {name: {k: [h[name].get(k) for h in healths] for k in last[name]} for name in ("grad_norm", "param_norm")}
    panels = [
        ("gradient norm", kinds["grad_norm"], "log"),
        ("parameter norm", kinds["param_norm"], "log"),
        (
            "gradient norm of each block",
            _columns(healths, "block_grad_norm", range(len(last["block_grad_norm"]))),
            "log",
        ),
    ]
    if "gdn2_layers" in last:
        layers = last["gdn2_layers"]
        shares = {
            f"{gate} {end}": [sum(h[f"{gate}_{end}"]) / len(layers) for h in healths]
            for gate in ("b", "w")
            for end in ("low", "high")
        }
        panels += [
            ("GDN-2: mean decay exp(g)", _columns(healths, "decay", layers), "linear"),
            ("GDN-2: share of saturated gates", shares, "linear"),
            ("GDN-2: largest A = exp(A_log)", _columns(healths, "A_max", layers), "linear"),
            ("GDN-2: smallest A = exp(A_log)", _columns(healths, "A_min", layers), "linear"),
            ("GDN-2: mean state norm", _columns(healths, "state", layers), "log"),
        ]
    figure, grid = plt.subplots(2, (len(panels) + 1) // 2, figsize=(18, 8), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axes, panel in zip_longest(grid.flat, panels):
        if panel is None:
            axes.axis("off")
            continue
        name, curves, scale = panel
        by_block = all(label.isdigit() for label in curves)
        for i, (label, values) in enumerate(curves.items()):
            color = plt.cm.viridis(i / len(curves)) if by_block else f"C{i}"
            values = [math.nan if v is None else v for v in values]
            axes.plot(tokens, values, color=color, linewidth=1, marker="o", markersize=2, label=label)
        axes.set(title=name, xlabel="tokens", yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    _replace(figure, path)


def _columns(healths: list[dict], name: str, labels: Sequence[int]) -> dict[str, list[float]]:
    """A curve for each column of a statistic that has one for each block."""
    return {str(label): [h[name][i] for h in healths] for i, label in enumerate(labels)}


def _replace(figure: plt.Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
