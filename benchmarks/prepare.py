"""Tokens per second of scripts/prepare_data.py, from real text to a finished, verified corpus.

python benchmarks/prepare.py [--workers 2] [--vocab_size 32000] [--keep FOLDER]

The text is what every machine has: sources and documents of the installed packages; the tokenizer is trained on the
standard library.
Prints what one thread of the bare tokenizer gives on a sample, then the whole program, start-up included.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sentencepiece

from lit_gpt.tokenizer import Tokenizer

EXTENSIONS = ".py,.txt,.rst,.md"


def text_of(folder: Path, characters: int) -> list[str]:
    """Documents spread over `folder`, of so many characters in all."""
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(tuple(EXTENSIONS.split(","))))
    found, size = [], 0
    for path in paths[:: max(1, len(paths) // 1500)]:
        text = path.read_text(encoding="utf-8", errors="ignore") if path.is_file() else ""
        found.append(text)
        size += len(text)
        if size >= characters:
            break
    return found


def prepare(*flags: str) -> tuple[float, float]:
    """Seconds that the program takes: (on the clock, of all cores together)."""
    began, cores_began = time.perf_counter(), core_seconds()
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, core_seconds() - cores_began


def core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--keep", type=Path, help="keep the corpus in this new folder")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        end="",
    )
    print(f"sentencepiece {sentencepiece.__version__}; load of the last minute {os.getloadavg()[0]:.1f}")
    library, packages = sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]
    common = ("--extensions", EXTENSIONS, "--workers", str(args.workers))
    with tempfile.TemporaryDirectory() as scratch:
        trained, out = Path(scratch) / "trained", args.keep or Path(scratch) / "out"
        first = ("--source", library, "--exclude", "site-packages", "--out", str(trained))
        seconds, _ = prepare(*first, "--train_tokenizer", str(args.vocab_size), *common)
        print(f"standard library, a tokenizer of {args.vocab_size} ids trained first: {seconds:.1f} s")

        tokenizer = Tokenizer(trained / "tokenizer")
        texts = text_of(Path(packages), 10_000_000)
        began = time.perf_counter()
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        alone = tokens / (time.perf_counter() - began)
        print(f"the tokenizer alone, one thread: {alone / 1e6:.2f} M tokens/s")

        out = args.keep or Path(scratch) / "out"
        seconds, cores = prepare(
            "--source", packages, "--tokenizer", str(trained / "tokenizer"), "--out", str(out), *common
        )
        totals = json.loads((out / "manifest.json").read_text())["totals"]
        tokens = totals["train"]["tokens"] + totals["validation"]["tokens"]
        characters = totals["train"]["characters"] + totals["validation"]["characters"]
        print(
            f"{totals['files']:,} files, {characters / 1e6:.0f} M characters, {tokens / 1e6:.1f} M tokens in "
            f"{seconds:.1f} s with {args.workers} workers: {tokens / seconds / 1e6:.2f} M tokens/s"
        )
        print(f"{cores:.1f} core-seconds, {1e11 / tokens * cores / 3600:.1f} core-hours for 100 billion tokens")
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "verify", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        size = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".bin", ".idx"))
        seconds = time.perf_counter() - began
        print(f"verify: {size / 1e6:.0f} MB in {seconds:.1f} s, start-up included")


if __name__ == "__main__":
    main()
