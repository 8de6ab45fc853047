"""From raw text to a trained, evaluated, sampled GDN-2 model: what `make demo` runs.

The text is the Python standard library of this very interpreter: sources and documentation, about 30 MB, on every
machine. Every step is a command that you can type yourself, and is printed before it runs. Run it again: what is done
is not done twice.
"""

import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console

from data import ValidationData
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.ngrams import ngram_losses
from lit_gpt.training.records import read_metrics

MODEL, RECIPE, VOCABULARY = "swa_gdn2_3M", "demo", 1024
PROMPTS = ["def read_file(path", "class Connection("]

console = Console(highlight=False, soft_wrap=True)


def run(title: str, *command: str) -> None:
    """Print a command as one would type it, then run it; the demo ends with it if it fails."""
    console.rule(f"[bold]{title}")
    console.print(
        "$ python " + " ".join(f'"{word}"' if " " in word else word for word in command), style="dim", markup=False
    )
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def main() -> None:
    began = time.perf_counter()
    library = sysconfig.get_paths()["stdlib"]
    corpus, runs = "runs/demo/corpus", "runs/demo"
    run_folder = ROOT / runs / "outputs" / f"{RECIPE}_stdlib"

    run(
        "1. text to token shards",
        *("scripts/prepare_data.py", "--source", library, "--exclude", "site-packages,dist-packages"),
        *("--train_tokenizer", str(VOCABULARY), "--validation_fraction", "0.02", "--out", corpus),
    )
    run(
        "2. pretrain",
        *("pretrain.py", "--train_data_dir", corpus, "--output_root", runs, "--exp_name", "stdlib"),
        *("--model_name", MODEL, "--train_config", RECIPE, "--interactive_job"),
    )
    for number, prompt in enumerate(PROMPTS, start=3):
        run(
            f"{number}. sample",
            *("generate.py", "--checkpoint", str(run_folder.relative_to(ROOT)), "--prompt", prompt),
            *("--max_new_tokens", "120", "--temperature", "0.7"),
        )
    report(ROOT / corpus, run_folder, time.perf_counter() - began)


def report(corpus: Path, run_folder: Path, seconds: float) -> None:
    """The model's validation loss beside what counting gives on the same tokens, and where everything lies."""
    console.rule("[bold]5. what it learned")
    records = read_metrics(run_folder / "metrics.jsonl")
    evaluation = next(r for r in reversed(records) if "blocks" in r)
    losses = {int(k.split("@")[1]): v for k, v in evaluation.items() if k.startswith("val_loss@")}
    length = max(losses)
    validation = ValidationData(corpus, length)
    unigram, bigram = ngram_losses(Corpus.open(corpus, "train"), validation.corpus, evaluation["blocks"] * length)
    console.print(f"validation loss in nats per token, on the same {evaluation['blocks'] * length:,} tokens:")
    console.print(f"  unigram counts of the training tokens  {unigram:.3f}")
    console.print(f"  bigram counts of the training tokens   {bigram:.3f}")
    console.print(f"  {MODEL} after {evaluation['tokens']:,} tokens  {losses[length]:.3f}")
    verdict = "below" if losses[length] < bigram else "NOT below"
    console.print(
        f"The model is {verdict} the bigram baseline, which counted all {Corpus.open(corpus, 'train').num_tokens:,}."
    )
    console.rule()
    for what, path in {"shards": corpus, "run": run_folder, "loss curve": run_folder / "loss.png"}.items():
        console.print(f"{what:>12}  {path.relative_to(ROOT)}")
    console.print(f"Done in {seconds:.0f} s. `make demo` again finds it finished; remove runs/demo to start over.")


if __name__ == "__main__":
    main()
