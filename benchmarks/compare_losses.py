"""Losses of two runs on the same batches, side by side: a table, and a picture.

python benchmarks/compare_losses.py RUN_A RUN_B --out losses.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lit_gpt.training.records import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, help="run folders, or metrics.jsonl files")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in args.runs]
    curves = [{r["step"]: r["loss"] for r in read_metrics(file) if "loss" in r} for file in files]
    names = [run.stem for run in args.runs]
    shared = sorted(curves[0].keys() & curves[1].keys())

    print(f"{'step':>6} {names[0]:>12} {names[1]:>12} {'difference':>12}")
    for step in [s for s in shared if s <= 5 or s % 5 == 0]:
        a, b = curves[0][step], curves[1][step]
        print(f"{step:>6} {a:>12.4f} {b:>12.4f} {b - a:>12.4f}")
    for first, last in ((1, 20), (21, 100), (101, shared[-1])):
        last = min(last, shared[-1])
        differences = [abs(curves[0][s] - curves[1][s]) for s in shared if first <= s <= last]
        if differences:
            mean = sum(differences) / len(differences)
            print(f"steps {first} to {last}: absolute difference {mean:.4f} on average, {max(differences):.4f} at most")
    for name, curve in zip(names, curves):
        print(f"{name}: step {min(curve)} {curve[min(curve)]:.4f}, step {max(curve)} {curve[max(curve)]:.4f}")

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in zip(names, curves):
        axes.plot(list(curve), list(curve.values()), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
