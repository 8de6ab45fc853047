"""From text to a corpus folder, in parallel, with no state that a kill could lose.

    prepare.json                  the plan: options and units; a rerun must have the same
    tokenizer/                    the tokenizer, copied or trained
    train_<name>_NNNNNN.bin, .idx, .json     unit N: tokens, document ends, and its record, written last = "done"
    validation_NNNNNN.bin, .idx              the documents of unit N that are held out
    downloads/                    files of a dataset of the hub, each until its units are done
    manifest.json                 written when every unit is done = "finished"

One unit of the source becomes one set of files, each written under a temporary name and renamed. A rerun skips the
units that have a record, so the result is byte for byte the same after any number of kills, with any number of workers.
"""

import contextlib
import errno
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lit_gpt.errors import UserError
from lit_gpt.files import write_json
from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.tokens.corpus import PREPARE_NAME, Corpus
from lit_gpt.tokens.hub import DOWNLOADS, HubUnits, Listing, resolve
from lit_gpt.tokens.manifest import SPLITS, read_json, read_manifest, write_manifest
from lit_gpt.tokens.shards import Shard, ShardWriter, dtype_for
from lit_gpt.tokens.sources import Unit, documents, sample_texts

TOKENIZER_SAMPLE = 10_000_000  # characters to train a tokenizer on
BATCH_CHARACTERS = 1_000_000  # tokenized at a time
VALIDATION_RULE = "blake2b-64(text) < fraction * 2^64"


@dataclass(frozen=True)
class Job:
    """What every unit is prepared with."""

    out: Path
    name: str
    text_column: str
    document_format: str
    validation_fraction: float

    def stem(self, split: str, number: int) -> str:
        return f"train_{self.name}_{number:06d}" if split == "train" else f"validation_{number:06d}"

    def record_path(self, number: int) -> Path:
        return self.out / f"{self.stem('train', number)}.json"

    def has_tokenizer(self) -> bool:
        return any((self.out / "tokenizer" / name).exists() for name in ("tokenizer.model", "tokenizer.json"))


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: decided by its content, so copies of a document all go the same way."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < int(fraction * 2**64)


def plan_of(job: Job, units: list[Unit], tokenizer: "Tokenizer | int") -> dict[str, Any]:
    """What a rerun must find unchanged. `tokenizer` is one to use, or the size of one to train."""
    trained = isinstance(tokenizer, int)
    return {
        "name": job.name,
        "text_column": job.text_column,
        "document_format": job.document_format,
        "validation_fraction": job.validation_fraction,
        "tokenizer": f"to train, {tokenizer} ids" if trained else f"given, SHA-256 {tokenizer.sha256}",
        "units": [
            {"source": unit.source, "files": len(unit.files), "bytes": unit.bytes, "signature": unit.signature}
            for unit in units
        ],
    }


def plan_of_hub(job: Job, listing: Listing, unit_bytes: int, tokenizer: "Tokenizer | int") -> dict[str, Any]:
    """The same for a dataset of the hub, whose units become known, and are noted in the plan, as its files arrive."""
    return {**plan_of(job, [], tokenizer), "unit_bytes": unit_bytes, "hub": listing.to_json()}


def listing_of(out: Path, dataset: str, subset: str, revision: Optional[str]) -> Listing:
    """The listing that `out` was begun with, if it was begun with these, else the hub's.

    Raises:
        UserError: see `hub.resolve`.
    """
    if (out / PREPARE_NAME).exists():
        noted = read_json(out / PREPARE_NAME).get("hub")
        if noted and (dataset, subset, revision) == (noted["dataset"], noted["subset"], noted["asked"]):
            return Listing.from_json(noted)
    return resolve(dataset, subset, revision)


def hub_units(job: Job, listing: Listing, plan: dict[str, Any]) -> HubUnits:
    """The units of a listing, those of earlier runs among them. New ones are noted in the plan's file."""
    path = job.out / PREPARE_NAME
    begun = read_json(path)["units"]
    note = lambda entries: write_json(path, {**plan, "units": entries})
    return HubUnits(listing, job.out / DOWNLOADS, job.text_column, plan["unit_bytes"], begun, note)


def finished(job: Job, plan: dict[str, Any]) -> Optional[dict[str, Any]]:
    """The manifest if `job.out` already holds this plan's finished corpus; None if there is work to do.

    Raises:
        UserError: the folder holds something else, was begun with other options or source, or is damaged.
    """
    if not job.out.exists():
        return None
    if not job.out.is_dir():
        raise UserError(f"--out {job.out} is a file. Give a folder.")
    if not (job.out / PREPARE_NAME).exists():
        others = sorted(path.name for path in job.out.iterdir() if path.suffix != ".tmp")
        if others:
            raise UserError(f"--out {job.out} already holds other files ({others[0]}). Give a new or empty folder.")
        return None
    if not job.has_tokenizer():  # nothing was made yet, so nothing can contradict the plan
        return None
    _check_same_plan(job.out, read_json(job.out / PREPARE_NAME), plan)
    manifest = read_manifest(job.out)
    if manifest:
        for split in SPLITS:
            if manifest["totals"][split]["documents"]:
                Corpus.open(job.out, split)
    return manifest


def _check_same_plan(out: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    advice = "Use what it was begun with, or a new --out."
    hub_before, hub_now = begun.get("hub", {}), plan.get("hub", {})
    for key in ("dataset", "subset", "commit"):
        if hub_before.get(key) != hub_now.get(key):
            was, now = hub_before.get(key), hub_now.get(key)
            raise UserError(f"{out} was begun with {key} = {was}, now it is {now}. {advice}")
    for key in plan:
        if key not in ("units", "hub") and begun.get(key) != plan[key]:
            raise UserError(f"{out} was begun with {key} = {begun.get(key)}, now it is {plan[key]}. {advice}")
    before, now = begun.get("units", []), plan["units"]
    if hub_now:
        return  # the commit and its files are the same, and so are the units
    for old, new in zip(before, now):
        if old != new:
            raise UserError(f"the source of {out} changed since it was begun, at {new['source']}. {advice}")
    if len(before) != len(now):
        raise UserError(f"the source of {out} had {len(before)} units when it was begun, now {len(now)}. {advice}")


@contextlib.contextmanager
def begin(job: Job, plan: dict[str, Any]) -> Iterator[None]:
    """Claim the output folder for this process, write the plan, clear what killed runs left half-written."""
    job.out.mkdir(parents=True, exist_ok=True)
    claim = os.open(job.out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {job.out}. Wait for it, or stop it first.") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file system without locks
                raise
        _clear_leftovers(job.out)
        if job.has_tokenizer():
            _check_same_plan(job.out, read_json(job.out / PREPARE_NAME), plan)  # again, now that nobody else writes
        else:
            write_json(job.out / PREPARE_NAME, plan)
        yield
    finally:
        os.close(claim)


def _clear_leftovers(out: Path) -> None:
    for leftover in (*out.rglob("*.tmp"), *(out / DOWNLOADS).rglob("*.incomplete")):
        leftover.unlink(missing_ok=True)


def make_tokenizer(job: Job, units: list[Unit], tokenizer: "Tokenizer | int") -> Tokenizer:
    """Put the tokenizer into the output folder, trained if it is only a size, unless an earlier run did.

    Raises:
        UserError: the size does not fit the text, or the folder holds another tokenizer.
    """
    folder = job.out / "tokenizer"
    if not job.has_tokenizer():
        if isinstance(tokenizer, Tokenizer):
            tokenizer.save(folder)
        else:
            train_tokenizer(sample_texts(units, job.text_column, TOKENIZER_SAMPLE), tokenizer, folder)
    ready = Tokenizer(folder)
    if isinstance(tokenizer, Tokenizer) and ready.sha256 != tokenizer.sha256:
        raise UserError(f"{ready.path} is not the tokenizer that {job.out} was begun with. Use a new --out.")
    return ready


def check_document_format(tokenizer: Tokenizer, document_format: str) -> None:
    """Refuse a format that needs a begin or end token which the tokenizer does not have."""
    for token, value in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token in document_format.split("_") and value is None:
            raise UserError(f"tokenizer {tokenizer.path} has no {token} token. Choose another --document_format.")


def is_done(job: Job, unit: Unit) -> bool:
    """Whether a unit's record exists, which is written last."""
    return job.record_path(unit.number).exists()


def run_units(
    job: Job,
    arrivals: Iterable[list[Unit]],
    workers: int,
    on_progress: Callable[[int, int], None],
    on_done: Callable[[Unit], None] = lambda unit: None,
    interval: float = 0.2,
) -> None:
    """Prepare the units that `arrivals` brings. The next of them are asked for, in a thread, before the workers have
    nothing left to do. `on_progress(source bytes, tokens)` hears sums over this run, `on_done` of every finished unit.

    Raises:
        UserError: from a unit or its arrival, or a worker was killed. What is done stays done.
    """
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    stopping = context.Event()
    with ProcessPoolExecutor(
        max_workers=workers,  # a process starts when there is work for it
        mp_context=context,
        initializer=_start_worker,
        initargs=(job.out / "tokenizer", counters, stopping),
    ) as executor:
        try:
            supply = iter(arrivals)
            arrival: Optional[Future] = _in_thread(supply)
            pending: dict[Future, Unit] = {}
            while arrival or pending:
                waiting_for = [*pending, arrival] if arrival else pending
                done, _ = wait(waiting_for, timeout=interval, return_when=FIRST_COMPLETED)
                on_progress(*counters.get_obj())  # read without the lock: a killed worker may hold it
                for future in done - {arrival}:
                    future.result()
                    on_done(pending.pop(future))
                if arrival and arrival.done():
                    units = arrival.result()
                    arrival = None
                    if units is None:
                        supply = None
                    else:
                        pending |= {executor.submit(_work, job, unit): unit for unit in units}
                if supply and not arrival and len(pending) < 2 * workers:
                    arrival = _in_thread(supply)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?). Finished units are kept: "
                "run the same command again, with fewer --workers if memory was short."
            ) from None
        finally:
            stopping.set()
            executor.shutdown(cancel_futures=True)


def _in_thread(supply: Iterator[list[Unit]]) -> Future:
    """The next item, or None after the last, by a thread that does not keep the program from ending."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(next(supply, None))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="supply", daemon=True).start()
    return future


class Stopped(Exception):
    """The run is ending; this unit's work is dropped."""


_worker: Any = None  # of a worker process: its tokenizer, the run's counters and its stop signal


def _start_worker(tokenizer_folder: Path, counters: Any, stopping: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Tokenizer(tokenizer_folder), counters, stopping


def _end_with_parent() -> None:
    """A pool's workers outlive a killed parent, waiting for work for ever; these do not."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(job: Job, unit: Unit) -> None:
    """`prepare_unit` in a worker process."""
    tokenizer, counters, stopping = _worker

    def report(source_bytes: int, num_tokens: int) -> None:
        with counters.get_lock():
            counters[0] += source_bytes
            counters[1] += num_tokens
        if stopping.is_set():
            raise Stopped

    prepare_unit(job, unit, tokenizer, report)


def prepare_unit(job: Job, unit: Unit, tokenizer: Tokenizer, report: Callable[[int, int], None]) -> None:
    """Tokenize one unit and write its shards, indexes and, last, its record.

    `report(source bytes, tokens)` hears of every batch; an exception from it drops the unit's work.
    """
    before = [tokenizer.bos_id] if "bos" in job.document_format else []
    after = [tokenizer.eos_id] if "eos" in job.document_format else []
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(job.out / f"{job.stem(split, unit.number)}.bin", dtype) for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    skipped = {"not_text": 0, "empty": 0}
    try:
        for texts, encoded, size in _batches(unit, job.text_column, skipped):
            num_tokens = 0
            for text, raw, ids in zip(texts, encoded, tokenizer.encode_batch(texts)):
                if tokenizer.bos_id in ids or tokenizer.eos_id in ids:
                    raise UserError(
                        f"tokenizer {tokenizer.name} turns text of {unit.source} into its own begin or end token, "
                        "which would cut a document in two. Use one that keeps text as text."
                    )
                split = "validation" if is_validation(raw, job.validation_fraction) else "train"
                writers[split].append(before + ids + after)
                characters[split] += len(text)
                num_tokens += len(before) + len(ids) + len(after)
            report(size, num_tokens)
        parts: dict[str, Optional[dict[str, Any]]] = dict.fromkeys(SPLITS)
        for split in ("validation", "train"):
            writer = writers[split]
            if writer.num_documents:
                writer.close()
                parts[split] = {
                    "file": writer.path.name,
                    "tokens": writer.num_tokens,
                    "documents": writer.num_documents,
                    "characters": characters[split],
                    "sha256": writer.sha256,
                    "idx_sha256": writer.idx_sha256,
                }
    finally:
        for writer in writers.values():
            writer.abandon()  # does nothing to a closed one
    record = {
        "unit": unit.number,
        "source": unit.source,
        "files": len(unit.files),
        "bytes": unit.bytes,
        "tokenizer_sha256": tokenizer.sha256,
        **parts,
        **skipped,
    }
    write_json(job.record_path(unit.number), record)


def _batches(unit: Unit, text_column: str, skipped: dict[str, int]) -> Iterator[tuple[list[str], list[bytes], int]]:
    """Documents by the million characters: (texts, the same in UTF-8, source bytes). Counts what it leaves out."""
    texts: list[str] = []
    encoded: list[bytes] = []
    characters = size = 0
    for text, source_bytes in documents(unit, text_column):
        size += source_bytes
        raw = _utf8(text)
        if raw:
            texts.append(text)
            encoded.append(raw)
            characters += len(text)
        else:
            skipped["not_text" if raw is None else "empty"] += 1
        if characters >= BATCH_CHARACTERS:
            yield texts, encoded, size
            texts, encoded, characters, size = [], [], 0, 0
    yield texts, encoded, size


def _utf8(text: Optional[str]) -> Optional[bytes]:
    """Bytes of a text; None for none, or for one with lone surrogates, which JSON can spell but UTF-8 cannot."""
    try:
        return None if text is None else text.encode("utf-8")
    except UnicodeEncodeError:
        return None


def finish(job: Job, units: list[Unit], tokenizer: Tokenizer) -> dict[str, Any]:
    """Check that every unit is there and write the manifest.

    Raises:
        UserError: a missing or damaged file, or no training documents at all.
    """
    records = []
    for unit in units:
        record = read_json(job.record_path(unit.number))
        again = f"Delete {job.record_path(unit.number).name} there and run the same command again."
        if record.pop("tokenizer_sha256") != tokenizer.sha256:
            raise UserError(f"unit {unit.number} of {job.out} was made with another tokenizer. {again}")
        for split in SPLITS:
            if record[split]:
                try:
                    shard = Shard.open(job.out / record[split]["file"])
                except UserError as error:
                    raise UserError(f"{error} {again}") from None
                if shard.num_tokens != record[split]["tokens"]:
                    raise UserError(f"{shard.path} is not what its record says. {again}")
        records.append(record)

    def total(split: str) -> dict[str, int]:
        parts = [record[split] for record in records if record[split]]
        return {key: sum(part[key] for part in parts) for key in ("tokens", "documents", "characters")}

    totals = {
        **{split: total(split) for split in SPLITS},
        "not_text": sum(record["not_text"] for record in records),
        "empty": sum(record["empty"] for record in records),
        "files": len({name for unit in units for name in unit.files}),
        "folders": len({os.path.dirname(name) for unit in units for name in unit.files}),
    }
    if not totals["train"]["documents"]:
        raise UserError(
            f"the source has no training documents: {totals['validation']['documents']} held out, "
            f"{totals['empty']} empty, {totals['not_text']} not UTF-8 text. Use more data or a smaller hold-out."
        )
    shutil.rmtree(job.out / DOWNLOADS, ignore_errors=True)
    _clear_leftovers(job.out)  # of workers that began as their parent was killed
    return write_manifest(
        job.out,
        {
            "name": job.name,
            "dtype": dtype_for(tokenizer.vocab_size).name,
            "vocab_size": tokenizer.vocab_size,
            "document_format": job.document_format,
            "tokenizer": {
                "file": tokenizer.path.relative_to(job.out).as_posix(),
                "sha256": tokenizer.sha256,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
            "validation": {"fraction": job.validation_fraction, "rule": VALIDATION_RULE},
            "units": records,
            "totals": totals,
        },
    )
