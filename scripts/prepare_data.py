"""Turn text into a corpus folder that pretrain.py reads.

    python scripts/prepare_data.py --source books/ --train_tokenizer 32000 --out data/books
    python scripts/prepare_data.py --source crawl.parquet --tokenizer tokenizer.model --out data/crawl
    python scripts/prepare_data.py --source HuggingFaceFW/fineweb-edu --subset sample-100BT \\
        --tokenizer tokenizer.model --out data/fineweb-edu

Kill it at any time and run the same command again: finished units are kept, the result is the same to the byte.

    python scripts/prepare_data.py verify DIR      compare every byte with the manifest's hashes
    python scripts/prepare_data.py inspect DIR     print documents, draw how long they are
    python scripts/prepare_data.py adopt DIR       make a corpus of shards that other projects wrote
    python scripts/prepare_data.py export DIR --official --out OUT     equal chunks, for TinyLlama-style readers
"""

import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lit_gpt.command_line import parse
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.files import explain_full_disk
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens import prepare
from lit_gpt.tokens.adopt import adopt
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.export import export_official
from lit_gpt.tokens.hub import HubUnits, is_hub_name
from lit_gpt.tokens.look import documents_spread, draw_lengths
from lit_gpt.tokens.manifest import DOCUMENT_FORMATS, SPLITS
from lit_gpt.tokens.sources import MAX_UNIT_BYTES, Unit, list_units

OTHERS = "Other commands, each with --help: prepare_data.py verify | inspect | adopt | export DIR."

console = Console(highlight=False)
say = functools.partial(console.print, markup=False, soft_wrap=True)
COUNT_COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))


@dataclass
class PrepareArgs:
    """Source, tokenizer and output"""

    source: str
    """A folder, or a file of text, .jsonl, .jsonl.zst or .parquet. Every text file, line or row is one document.
    Or the name of a dataset of the Hugging Face hub: HuggingFaceFW/fineweb-edu."""
    out: Path
    """Folder to write. Running the same command again continues an interrupted run."""
    subset: Optional[str] = None
    """Part of a dataset of the hub: sample-10BT, sample-100BT, sample-350BT, CC-MAIN-2024-10. Left out: default."""
    revision: Optional[str] = None
    """Branch, tag or commit of a dataset of the hub. Left out: the newest. A rerun takes the same commit."""
    tokenizer: Optional[Path] = None
    """SentencePiece .model file, tokenizer.json, or a folder with either. Give this or --train_tokenizer."""
    train_tokenizer: Optional[int] = None
    """Train a byte-fallback BPE tokenizer of so many ids on a sample of the source (at most 10 million characters;
    of a dataset of the hub, from its first file)."""
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
    """Source bytes per shard, the work lost to a kill. Left out: a 64th of the source, 1 to 256 MiB; 256 MiB of text
    from the hub."""
    workers: Optional[int] = None
    """Processes that tokenize. Left out: one per core. The result does not depend on it."""


@dataclass
class FolderArgs:
    folder: str
    """Corpus folder; may stand alone as the first word."""


@dataclass
class InspectArgs(FolderArgs):
    documents: int = 3
    """How many documents to print, from places spread over the corpus."""
    shown: int = 200
    """Tokens to print of each."""
    split: str = "train"
    """train or validation."""
    picture: Optional[Path] = None
    """Where to draw the histogram. Left out: document_lengths_<split>.png in the folder."""


@dataclass
class AdoptArgs(FolderArgs):
    tokenizer: Optional[Path] = None
    """The tokenizer that made the tokens, to be copied into the corpus. Left out: begin and end are ids 1 and 2."""
    document_format: Optional[str] = None
    """bos_eos, eos or bos. Left out: by the ids that there are."""
    out: Optional[Path] = None
    """Where to write shards of formats that have to be converted (litdata, datatrove)."""


@dataclass
class ExportArgs(FolderArgs):
    out: Path
    """Folder to write. Running the same command again continues an interrupted run."""
    official: bool = True
    """Files of equal size under TinyLlama's names. The only layout so far."""
    chunk: str = "4097x4096"
    """Tokens in a training file: blocks of the reader's sequence length plus one, times how many."""
    validation_chunk: str = "16385x512"
    """The same for validation."""


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
    tools = {"verify": verify, "inspect": inspect, "adopt": adopt_folder, "export": export}
    if argv and argv[0] in tools:
        tools[argv[0]](argv[1:])
        return
    args = parse(PrepareArgs, argv, description=f"{__doc__.splitlines()[0]} {OTHERS}")
    check(args)
    with explain_full_disk(args.out):
        run(args)


def run(args: PrepareArgs) -> None:
    """Prepare what is not prepared yet, then show what is there."""
    started = time.monotonic()
    job = prepare.Job(args.out, args.name, args.text_column, args.document_format, args.validation_fraction)
    tokenizer = args.train_tokenizer or Tokenizer(args.tokenizer)
    from_hub = is_hub_name(args.source)
    if from_hub:
        listing = prepare.listing_of(args.out, args.source, args.subset or "default", args.revision)
        plan = prepare.plan_of_hub(job, listing, args.unit_bytes or MAX_UNIT_BYTES, tokenizer)
        gigabytes = sum(file.size for file in listing.files) / 1e9
        say(
            f"{listing.dataset} {listing.subset}: {len(listing.files)} files, {gigabytes:.1f} GB, {listing.commit[:12]}"
        )
    else:
        if args.subset or args.revision:
            raise UserError(f"--subset and --revision belong to a dataset of the hub; {args.source} is local.")
        extensions = tuple(ending.strip() for ending in args.extensions.split(",") if ending.strip())
        names = [name.strip() for name in args.exclude.split(",") if name.strip()]
        source = Path(args.source)
        units = list_units(source, extensions, args.unit_bytes, args.text_column, args.out, exclude_names=names)
        plan = prepare.plan_of(job, units, tokenizer)

    manifest = prepare.finished(job, plan)
    if manifest:
        say(f"{args.out} is finished already; nothing to do.")
        summarize(args.out, manifest)
        return
    if isinstance(tokenizer, Tokenizer):
        prepare.check_document_format(tokenizer, args.document_format)
    workers = args.workers or len(os.sched_getaffinity(0))
    try:
        with prepare.begin(job, plan):
            hub = prepare.hub_units(job, listing, plan) if from_hub else None
            with console.status("tokenizer ..."):
                first = isinstance(tokenizer, int) and not job.has_tokenizer()
                sample = (hub.fetch(listing.files[0]) if first else []) if hub else units
                tokenizer = prepare.make_tokenizer(job, sample, tokenizer)
            say(f"tokenizer: {tokenizer.vocab_size} ids, ready after {time.monotonic() - started:.1f} s")
            tokenize(job, hub or units, workers)
            manifest = prepare.finish(job, hub.known if hub else units, tokenizer)
    except KeyboardInterrupt:
        raise UserError("interrupted. Finished units are kept: run the same command again.") from None
    summarize(args.out, manifest)
    say(f"{args.out} is finished after {time.monotonic() - started:.1f} s.")


def tokenize(job: prepare.Job, source: "list[Unit] | HubUnits", workers: int) -> None:
    """Run all units under a progress bar."""
    hub = source if isinstance(source, HubUnits) else None
    known = hub.known if hub else source
    is_done = functools.partial(prepare.is_done, job)
    kept = sum(unit.bytes for unit in known if is_done(unit))

    def total() -> Optional[int]:
        size = hub.estimated_bytes() if hub else sum(unit.bytes for unit in known)
        return size and size - kept

    if kept:
        say(f"continuing: {kept / (kept + total()):.0%} of the source was done before")
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[millions]:.1f} M tokens, {task.fields[rate]:.2f} M/s, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total(), millions=0.0, rate=0.0)
        started = time.monotonic()

        def on_progress(source_bytes: int, tokens: int) -> None:
            millions = tokens / 1e6
            rate = millions / (time.monotonic() - started)
            progress.update(task, total=total(), completed=source_bytes, millions=millions, rate=rate)

        if hub:
            prepare.run_units(job, hub.arrivals(is_done), workers, on_progress, hub.release)
        else:
            prepare.run_units(job, [[unit for unit in known if not is_done(unit)]], workers, on_progress)
        progress.update(task, completed=total())


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
    corpus = Corpus.open(out, "train")
    print_documents(corpus, 2, shown=100, style="dim")
    if not totals["validation"]["tokens"]:
        say("\nNo document was held out: there is no validation split. See --validation_fraction.")


def print_documents(corpus: Corpus, count: int, shown: int, style: Optional[str] = None) -> None:
    """`count` documents from places spread over the corpus, up to `shown` tokens of each."""
    copy = corpus.folder / "tokenizer"
    tokenizer = Tokenizer(copy) if copy.is_dir() else None
    for place, ids, length in documents_spread(corpus, count, shown):
        tokens = "tokens" if length is None else f"{length:,} tokens"
        say(f"\ndocument at token {place:,}, {tokens}: {ids[:8].tolist()} ...")
        say(tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)), style=style)


def verify(argv: list[str]) -> None:
    """Compare every byte of a corpus folder with the hashes in its manifest."""
    folder = parse_folder(FolderArgs, argv, verify).folder
    corpora = open_splits(folder)
    files = [path for corpus in corpora for s in corpus.shards for path in (s.path, s.index_path)]
    with Progress(console=console) as progress:
        task = progress.add_task("verifying", total=sum(path.stat().st_size for path in files if path.is_file()))
        for corpus in corpora:
            corpus.verify(lambda count: progress.advance(task, count))
        progress.update(task, completed=progress.tasks[0].total)
    say(f"{folder}: all {len(files)} files are as prepared.")


def inspect(argv: list[str]) -> None:
    """Print documents of a corpus folder and draw how long its documents are."""
    args = parse_folder(InspectArgs, argv, inspect)
    corpus = Corpus.open(args.folder, args.split)
    print_documents(corpus, args.documents, args.shown)
    picture = args.picture or Path(args.folder) / f"document_lengths_{args.split}.png"
    with console.status("measuring documents ..."):
        numbers = draw_lengths(corpus, picture)
    say(f"\n{args.folder}, {args.split}: {corpus.num_tokens:,} tokens")
    table = Table()
    table.add_column("documents in tokens")
    table.add_column("", justify="right")
    for name, number in numbers.items():
        table.add_row(name, f"{number:,.0f}")
    console.print(table)
    say(f"drawn in {picture}")


def adopt_folder(argv: list[str]) -> None:
    """Make a corpus of shards that another project wrote: LITPKDS in place, litdata and datatrove by converting."""
    args = parse_folder(AdoptArgs, argv, adopt_folder)
    if args.document_format not in (None, *DOCUMENT_FORMATS):
        raise UserError(f"--document_format {args.document_format} is none of {', '.join(DOCUMENT_FORMATS)}.")
    tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else None
    with explain_full_disk(args.out or args.folder), Progress(*COUNT_COLUMNS, console=console) as progress:
        task = progress.add_task("adopting", total=None)
        on_tokens = lambda count: progress.advance(task, count)
        place = adopt(Path(args.folder), args.out, tokenizer, args.document_format, on_tokens)
    for corpus in open_splits(place):
        say(f"{corpus.split}: {corpus.num_tokens:,} tokens in {len(corpus.shards)} shards, {corpus.document_format}")
    vocabulary = f"{tokenizer.vocab_size} ids" if tokenizer else "unknown: give --tokenizer to have it checked"
    say(f"{place} is a corpus now; vocabulary {vocabulary}.")


def export(argv: list[str]) -> None:
    """Write a corpus as LITPKDS files of equal size, which TinyLlama's reader and its descendants expect."""
    args = parse_folder(ExportArgs, argv, export)
    if not args.official:
        raise UserError("--official names the only layout there is.")
    chunks = {"train": tokens_of(args.chunk), "validation": tokens_of(args.validation_chunk)}
    corpora = open_splits(args.folder)
    with explain_full_disk(args.out), Progress(*COUNT_COLUMNS, console=console) as progress:
        task = progress.add_task("exporting", total=sum(corpus.num_tokens for corpus in corpora))
        written = export_official(corpora, args.out, chunks, lambda count: progress.advance(task, count))
    files = ", ".join(f"{count} of {split} ({chunks[split]:,} tokens)" for split, count in written.items())
    say(f"{args.out}: {files}. The last of each is filled up with the id that parts documents.")


def tokens_of(chunk: str) -> int:
    """4097x4096 -> 16781312."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", chunk):
        raise UserError(f"--chunk {chunk} must be a number of tokens, or blocks as in 4097x4096.")
    return math.prod(map(int, chunk.split("x")))


def open_splits(folder: "str | Path") -> list[Corpus]:
    """The training split of a corpus folder, and the validation split if it has one."""
    train = Corpus.open(folder, "train")
    if train.manifest:
        held_out = train.manifest["totals"]["validation"]["tokens"]
    else:
        held_out = any(train.folder.glob("validation*.bin"))
    return [train, Corpus.open(folder, "validation")] if held_out else [train]


def parse_folder(cls: type, argv: list[str], tool: Callable) -> Any:
    """Arguments of a tool, whose first word is the folder."""
    if argv and not argv[0].startswith("-"):
        argv = ["--folder", *argv]
    return parse(cls, argv, description=tool.__doc__)


if __name__ == "__main__":
    main()
