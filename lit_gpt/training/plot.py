"""The loss curve of a run."""

import os
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
