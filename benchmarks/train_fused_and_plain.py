"""swa_gdn2_125M on one GPU, GDN-2 by the fused kernels and by the plain chunk path: do the losses fall alike?

    python benchmarks/train_fused_and_plain.py CORPUS OUTPUT --steps 500

CORPUS is what prepare_data.py --train_tokenizer 32000 makes of a text. Both runs have the same seed, batches of
4 x 1024 tokens, bf16; they share the GPU, so their speed says nothing.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from lit_gpt.errors import UserError, exit_on_user_error

SEQUENCES, LENGTH = 4, 1024


def train(path: str, corpus: Path, output: Path, steps: int) -> None:
    """One run, in this process."""
    import pretrain
    from lit_gpt.ops.gdn2 import chunk

    if path == "plain":
        chunk.runs_fused = lambda *tensors: False
    flags = {"train_data_dir": corpus, "output_root": output, "exp_name": path, "model_name": "swa_gdn2_125M"}
    flags |= {"train_config": "debug", "sequences_per_batch": SEQUENCES, "sequence_length": LENGTH, "devices": 1}
    flags |= {"micro_batch_size": SEQUENCES, "learning_rate": 5e-4, "warmup_tokens": 20 * SEQUENCES * LENGTH}
    flags |= {"total_tokens": steps * SEQUENCES * LENGTH, "log_step_interval": 1, "document_reset": "false"}
    flags |= {"eval_iters": 1, "eval_step_interval": 100, "save_step_interval": steps}
    pretrain.setup([*(f"--{name}={value}" for name, value in flags.items()), "--interactive_job"])


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--path", choices=("fused", "plain"), help="only this run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the fused kernels run on a GPU and this machine shows none.")
    if args.path:
        return train(args.path, args.corpus, args.output, args.steps)
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, args.corpus, args.output, f"--steps={args.steps}", f"--path={path}"]
        )
        for path in ("fused", "plain")
    ]
    if any([run.wait() for run in runs]):
        raise UserError("a run failed; what it printed is above.")
    folders = [args.output / "outputs" / f"debug_{path}" for path in ("fused", "plain")]
    compare = [sys.executable, ROOT / "benchmarks" / "compare_losses.py", *folders, "--out", args.output / "loss.png"]
    subprocess.run(compare, check=True)


if __name__ == "__main__":
    main()
