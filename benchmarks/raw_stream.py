"""Raw streaming, the tokenizer in the loop: tokens per second of one process, and what a resume deep in a corpus costs.

python benchmarks/raw_stream.py [--tokenizer FOLDER] [--row_groups 512] [--seconds 20]

The text is this machine's installed Python: sources and documentation, cut into documents of 4,200 characters (the mean
of FineWeb-Edu) and repeated, from other starts, until there are enough row groups of 1000 documents.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow
import pyarrow.parquet
import sentencepiece
import zstandard

from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.tokens.raw import RawTrainData, RawValidationData

LENGTH, GLOBAL_BATCH, MICRO_BATCH = 4096, 512, 8
DOCUMENT, ROWS = 4200, 1000


def installed_text(most: int = 100_000_000) -> str:
    """Up to `most` characters of the Python sources and documents installed here."""
    texts, total = [], 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".py", ".md", ".rst", ".txt", ".pyi") and path.is_file() and total < most:
                texts.append(path.read_text(encoding="utf-8", errors="ignore"))
                total += len(texts[-1])
    return "\n".join(texts)[:most]


def groups_of_documents(text: str, count: int) -> Iterator[list[str]]:
    """`count` lists of ROWS documents; every pass over the text begins 997 characters further on."""
    starts = itertools.chain.from_iterable(
        range(turn * 997 % DOCUMENT, len(text) - DOCUMENT, DOCUMENT) for turn in itertools.count()
    )
    for _ in range(count):
        yield [text[start : start + DOCUMENT] for start in itertools.islice(starts, ROWS)]


def write_parquet(folder: Path, text: str, row_groups: int, files: int = 8) -> None:
    folder.mkdir()
    groups = groups_of_documents(text, row_groups)
    for number in range(files):
        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(folder / f"{number:03d}.parquet", schema, compression="snappy") as writer:
            for texts in itertools.islice(groups, row_groups // files):
                writer.write_table(pyarrow.table({"text": texts}), row_group_size=ROWS)


def write_zst(folder: Path, text: str, files: int, groups_per_file: int) -> None:
    folder.mkdir()
    groups = groups_of_documents(text, files * groups_per_file)
    for number in range(files):
        documents = itertools.chain.from_iterable(itertools.islice(groups, groups_per_file))
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{number:03d}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))


def opened(folder: Path, tokenizer: Tokenizer, **options) -> RawTrainData:
    return RawTrainData(folder, tokenizer, LENGTH, seed=0, **options)


def stream(data: RawTrainData, consumed: int, global_batch: int, prefetch: bool = False) -> Iterator:
    return data.micro_batches(consumed, global_batch, MICRO_BATCH, 0, 1, prefetch=prefetch, pin_memory=False)


def speed(data: RawTrainData, global_batch: int, prefetch: bool, seconds: float) -> str:
    """Tokens per second, by the clock and of processor time, which other programs on the machine disturb less."""
    batches = stream(data, 0, global_batch, prefetch)
    for _ in range(global_batch // MICRO_BATCH):  # every lane has begun
        next(batches)
    count, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        count += next(batches).tokens[:, 1:].numel()
    elapsed, used = time.perf_counter() - began, time.process_time() - used
    batches.close()
    return f"{count / elapsed / 1e6:.2f} M tokens/s ({count / used / 1e6:.2f} M a second of processor time)"


def peak_memory(folder: Path, tokenizer: Path) -> tuple[int, int]:
    """Peak resident MB of this process, before it opens the data and after four steps."""

    def peak() -> int:  # getrusage would count the parent's memory before exec
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) // 1024

    idle = peak()
    batches = stream(opened(folder, Tokenizer(tokenizer)), 0, GLOBAL_BATCH)
    for _ in range(4 * GLOBAL_BATCH // MICRO_BATCH):
        next(batches)
    return idle, peak()


def share_left_to_the_main_thread(data: RawTrainData, seconds: float) -> float:
    """How fast pure Python runs in the main thread while another one tokenizes without a pause, against alone."""

    def count() -> int:
        turns, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            turns += 1
        return turns

    alone = count()
    stopping = threading.Event()

    def tokenize() -> None:
        for _ in stream(data, 0, GLOBAL_BATCH):
            if stopping.is_set():
                return

    thread = threading.Thread(target=tokenize)
    thread.start()
    beside = count()
    stopping.set()
    thread.join()
    return beside / alone


def resume(folder: Path, tokenizer: Tokenizer, global_batch: int, record: int) -> tuple[int, float, float, float]:
    """Lanes, and seconds to open, to the first micro-batch and to the end of the first step, from `record` of units."""
    data = opened(folder, tokenizer)
    stream(data, 0, global_batch)  # decides the lanes
    deep = 1_000_000 * data.lanes
    positions = [[deep + lane, record, 0] for lane in range(data.lanes)]
    state = {"consumed": deep, "source": data.corpus.source.fingerprint, "lanes": positions}
    began = time.perf_counter()
    data = opened(folder, tokenizer)
    data.load_state(state)
    open_seconds = time.perf_counter() - began
    batches = stream(data, deep, global_batch)
    next(batches)
    first = time.perf_counter() - began
    for _ in range(global_batch // MICRO_BATCH - 1):
        next(batches)
    return data.lanes, open_seconds, first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--row_groups", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores {platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"pyarrow {pyarrow.__version__}, sentencepiece {sentencepiece.__version__}, zstandard {zstandard.__version__}"
    )
    text = installed_text()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.tokenizer:
            tokenizer = Tokenizer(args.tokenizer)
        else:
            tokenizer = train_tokenizer([text[i : i + 20_000] for i in range(0, len(text), 200_000)], 32000, folder)
        write_parquet(folder / "parquet", text, args.row_groups)
        write_zst(folder / "zst", text, files=32, groups_per_file=5)
        characters = len(text) / 1e6
        print(
            f"{characters:.0f} M characters of text, {tokenizer.vocab_size} ids; {args.row_groups} row groups of {ROWS}"
        )
        del text

        began = time.perf_counter()
        data = opened(folder / "parquet", tokenizer)
        print(f"open, reading all footers: {time.perf_counter() - began:.2f} s")
        for prefetch, where in ((False, "the training loop"), (True, "a prefetch thread")):
            data = opened(folder / "parquet", tokenizer)
            measured = speed(data, GLOBAL_BATCH, prefetch, args.seconds)
            print(f"parquet, {data.lanes} lanes, {where}: {measured}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            idle, busy = fresh.submit(peak_memory, folder / "parquet", tokenizer.path).result()
        print(f"memory of a process with all lanes: {busy} MB, of which {idle} before it opened the data")
        data = opened(folder / "zst", tokenizer)
        measured = speed(data, 32, False, args.seconds)
        print(f"jsonl.zst, {data.lanes} lanes, the training loop: {measured}")
        share = share_left_to_the_main_thread(opened(folder / "parquet", tokenizer), min(5.0, args.seconds))
        print(f"Python in the main thread beside a thread that tokenizes without a pause: {share:.0%} of its speed")

        for name, size, record in (("parquet", GLOBAL_BATCH, 990), ("zst", 32, 4900)):
            lanes, opening, first, step = resume(folder / name, tokenizer, size, record)
            print(
                f"resume {name} at record {record} of its units, {lanes} lanes on one rank: open {opening:.2f} s, "
                f"first micro-batch {first:.2f} s, first step of {size} x {LENGTH} tokens {step:.2f} s"
            )
        began = time.perf_counter()
        validation = RawValidationData(folder / "parquet", tokenizer, LENGTH, validation_fraction=0.005)
        print(
            f"validation held out of the same folder: {validation.num_blocks} blocks of {LENGTH} in "
            f"{time.perf_counter() - began:.1f} s"
        )


if __name__ == "__main__":
    main()
