"""Turn text into a corpus folder that pretrain.py reads.

    python scripts/prepare_data.py --source books/ --train_tokenizer 32000 --out data/books
    python scripts/prepare_data.py --source crawl.parquet --tokenizer tokenizer.model --out data/crawl
    python scripts/prepare_data.py verify data/crawl

Kill it at any time and run the same command again: finished units are kept, the result is the same to the byte.
"""

import functools
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lit_gpt.command_line import parse
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens import prepare
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.manifest import DOCUMENT_FORMATS, SPLITS
from lit_gpt.tokens.sources import list_units

console = Console(highlight=False)
say = functools.partial(console.print, markup=False, soft_wrap=True)


@dataclass
class PrepareArgs:
    """Source, tokenizer and output"""

    source: Path
    """A folder, or a file of text, .jsonl, .jsonl.zst or .parquet. Every text file, line or row is one document."""
    out: Path
    """Folder to write. Running the same command again continues an interrupted run."""
    tokenizer: Optional[Path] = None
    """SentencePiece .model file, tokenizer.json, or a folder with either. Give this or --train_tokenizer."""
    train_tokenizer: Optional[int] = None
    """Train a byte-fallback BPE tokenizer of so many ids on a sample of the source (at most 10 million characters)."""
    name: str = "data"
    """Name inside the shards' file names: train_<name>_000000.bin."""
    text_column: str = "text"
    """Field of a .jsonl record, or column of a .parquet file, that holds the text."""
    document_format: str = "bos_eos"
    """Which ids enclose a document: bos_eos (begin text end), eos (text end) or bos (begin text)."""
    validation_fraction: float = 0.005
    """Share of documents held out for validation, chosen by a hash of their text."""
    extensions: str = ".py,.txt,.rst,.md,.jsonl,.jsonl.zst,.parquet"
    """Endings of the files to read. Any but .jsonl, .jsonl.zst and .parquet is read as UTF-8 text."""
    exclude: str = ""
    """Names of folders to leave out, wherever they are: "tests,node_modules"."""
    unit_bytes: Optional[int] = None
    """Source bytes per shard, the work lost to a kill. Left out: a 64th of the source, 1 to 256 MiB."""
    workers: Optional[int] = None
    """Processes that tokenize. Left out: one per core. The result does not depend on it."""


def check(args: PrepareArgs) -> None:
    """Refuse arguments that contradict themselves."""
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise UserError("give either --tokenizer PATH or --train_tokenizer SIZE.")
    if args.document_format not in DOCUMENT_FORMATS:
        raise UserError(f"--document_format {args.document_format} is none of {', '.join(DOCUMENT_FORMATS)}.")
    if not 0 <= args.validation_fraction < 1:
        raise UserError(f"--validation_fraction {args.validation_fraction} must be at least 0 and below 1.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        raise UserError(f"--name {args.name} may only have letters, digits, '-' and '_'.")
    for flag in ("train_tokenizer", "unit_bytes", "workers"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value} must be at least 1.")


@exit_on_user_error
def main(argv: Optional[list[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        verify(argv[1:])
        return
    args = parse(PrepareArgs, argv, description=__doc__.splitlines()[0])
    check(args)
    started = time.monotonic()
    extensions = tuple(ending.strip() for ending in args.extensions.split(",") if ending.strip())
    names = [name.strip() for name in args.exclude.split(",") if name.strip()]
    units = list_units(args.source, extensions, args.unit_bytes, args.text_column, args.out, exclude_names=names)
    tokenizer = args.train_tokenizer or Tokenizer(args.tokenizer)
    job = prepare.Job(args.out, args.name, args.text_column, args.document_format, args.validation_fraction)
    plan = prepare.plan_of(job, units, tokenizer)

    manifest = prepare.finished(job, plan)
    if manifest:
        say(f"{args.out} is finished already; nothing to do.")
        summarize(args.out, manifest)
        return
    if isinstance(tokenizer, Tokenizer):
        prepare.check_document_format(tokenizer, args.document_format)
    try:
        with prepare.begin(job, plan):
            with console.status("tokenizer ..."):
                tokenizer = prepare.make_tokenizer(job, units, tokenizer)
            say(f"tokenizer: {tokenizer.vocab_size} ids, ready after {time.monotonic() - started:.1f} s")
            tokenize(job, units, args.workers or len(os.sched_getaffinity(0)))
            manifest = prepare.finish(job, units, tokenizer)
    except KeyboardInterrupt:
        raise UserError("interrupted. Finished units are kept: run the same command again.") from None
    summarize(args.out, manifest)
    say(f"{args.out} is finished after {time.monotonic() - started:.1f} s.")


def tokenize(job: prepare.Job, units: list, workers: int) -> None:
    """Run all units under a progress bar."""
    total = sum(unit.bytes for unit in units)
    kept = sum(unit.bytes for unit in units if job.record_path(unit.number).exists())
    if kept:
        say(f"continuing: {kept / total:.0%} of the source was done before")
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[millions]:.1f} M tokens, {task.fields[rate]:.2f} M/s, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total - kept, millions=0.0, rate=0.0)
        started = time.monotonic()

        def on_progress(source_bytes: int, tokens: int) -> None:
            millions = tokens / 1e6
            rate = millions / (time.monotonic() - started)
            progress.update(task, completed=source_bytes, millions=millions, rate=rate)

        prepare.run_units(job, units, workers, on_progress)
        progress.update(task, completed=total - kept)


def summarize(out: Path, manifest: dict[str, Any]) -> None:
    """What is in the folder, and a look at two documents as training will see them."""
    totals = manifest["totals"]
    table = Table(title=str(out), show_header=True, title_justify="left")
    for column in ("", *SPLITS):
        table.add_column(column, justify="right" if column else "left")
    for row in ("documents", "tokens", "characters"):
        table.add_row(row, *(f"{totals[split][row]:,}" for split in SPLITS))
    ratios = [totals[split]["characters"] / max(totals[split]["tokens"], 1) for split in SPLITS]
    table.add_row("characters per token", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    tokenizer_id = manifest["tokenizer"]["sha256"][:12]
    say(
        f"from {totals['files']:,} files in {totals['folders']:,} folders; left out: {totals['not_text']:,} not UTF-8, "
        f"{totals['empty']:,} empty\n"
        f"vocabulary {manifest['vocab_size']:,} ({tokenizer_id}), {manifest['dtype']}, "
        f"documents as {manifest['document_format']}, fingerprint {manifest['fingerprint'][:12]}"
    )
    tokenizer = Tokenizer(out / "tokenizer")
    shards = Corpus.open(out, "train").shards
    for shard in (shards[0], shards[len(shards) // 2]):
        ids = prepare.first_document(shard)
        say(f"\nsample, {len(ids):,} tokens {ids[:8]} ...")
        say(tokenizer.decode(ids[:100]), style="dim")
    if not totals["validation"]["tokens"]:
        say("\nNo document was held out: there is no validation split. See --validation_fraction.")


def verify(argv: list[str]) -> None:
    """Compare every byte of a corpus folder with the hashes in its manifest."""
    if len(argv) != 1:
        raise UserError("usage: prepare_data.py verify DIR")
    folder = Path(argv[0])
    train = Corpus.open(folder, "train")
    held_out = train.manifest and train.manifest["totals"]["validation"]["documents"]
    corpora = [train, Corpus.open(folder, "validation")] if held_out else [train]
    files = [path for corpus in corpora for s in corpus.shards for path in (s.path, s.path.with_suffix(".idx"))]
    with Progress(console=console) as progress:
        task = progress.add_task("verifying", total=sum(path.stat().st_size for path in files))
        for corpus in corpora:
            corpus.verify(lambda count: progress.advance(task, count))
        progress.update(task, completed=progress.tasks[0].total)
    say(f"{folder}: all {len(files)} files are as prepared.")


if __name__ == "__main__":
    main()
