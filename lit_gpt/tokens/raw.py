"""Training straight from raw text, the tokenizer in the loop: the same batches on any number of ranks.

- V lanes share the units of the source (row groups, files). Of the endless list of units, a new permutation each epoch,
  lane v takes numbers v, v + V, v + 2V, ... V belongs to the run; ranks only own lanes (v % world size == rank).
- A lane is one stream of tokens, cut into blocks of L + 1 that overlap by one, as packed data is: every token but the
  stream's first is a target once. A global batch of G is G / V blocks of each lane, ordered by round and lane.
- Where a lane is takes three integers: unit, record in it, token in that. A step's positions travel with its last
  micro-batch to the training loop, so what a thread read ahead is never counted as trained on.

Every batch draws from V places of the source; that is all the shuffling there is. Packed data (data.py) is the better
choice for real runs: its fingerprint covers every token, and its position is a single integer.
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens.batch import Batch, check_split, segment_offsets
from lit_gpt.tokens.prefetch import prefetched
from lit_gpt.tokens.prepare import VALIDATION_RULE, check_document_format, is_validation
from lit_gpt.tokens.raw_source import SLICES, RawSource, Unit
from lit_gpt.tokens.sampler import ORDER_VERSION, Sampler

LANES_VERSION = 1
MAX_LANES = 512
VALIDATION_TOKENS = (1 << 21) + 1  # 128 blocks of 16384 and their last target
SAMPLED_UNITS, SAMPLED_RECORDS = 16, 16  # tokenized to estimate how many tokens there are


class Position(NamedTuple):
    """Where a lane's next block begins: a token of a record of a unit; `turn` numbers the endless list of units."""

    turn: int
    record: int
    token: int


class RawCorpus:
    """The documents of one split of a raw folder, as tokens.

    Attributes:
        folder, vocab_size, tokenizer_sha256, document_format: as of a packed `Corpus`.
        tokenizer, source: what the documents are made with and from.

    Raises:
        UserError: a folder or file that cannot be used, or a tokenizer without the tokens of the document format.
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        tokenizer: Tokenizer,
        split: Optional[str],
        text_column: str,
        document_format: str,
        validation_fraction: float,
    ):
        if not 0 <= validation_fraction < 1:
            raise UserError(f"validation fraction {validation_fraction} must be at least 0 and less than 1.")
        check_document_format(tokenizer, document_format)
        self.source = RawSource.open(folder, text_column)
        self.folder = self.source.folder
        self.tokenizer, self.document_format = tokenizer, document_format
        self.vocab_size, self.tokenizer_sha256 = tokenizer.vocab_size, tokenizer.sha256
        self.split, self.validation_fraction = split, validation_fraction
        self._before = [tokenizer.bos_id] if "bos" in document_format.split("_") else []
        self._after = [tokenizer.eos_id] if "eos" in document_format.split("_") else []

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "files": self.source.files,
            "text_column": self.source.text_column,
            "document_format": self.document_format,
            "tokenizer": self.tokenizer_sha256,
            "validation_fraction": self.validation_fraction,
            "validation_rule": VALIDATION_RULE,
        }

    def order(self, seed: int) -> Sampler:
        """`order(seed).start(turn)` is the number of a unit: every epoch another permutation of all of them."""
        return Sampler(len(self.source.units) + 1, 1, seed)

    def documents(self, unit: Unit, first: int = 0, slices: int = SLICES) -> Iterator[tuple[int, np.ndarray]]:
        """(record, tokens int32 [n]) of the documents of `unit` from record `first` on. Not documents: empty records,
        such as are not UTF-8, and the other split's.
        """
        for record in self.source.records(unit, first, slices):
            if self._is_ours(record.text):
                yield record.number, self._tokens(record.text)

    def _is_ours(self, text: Optional[str]) -> bool:
        if not text:
            return False
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            return False
        return self.split is None or is_validation(content, self.validation_fraction) == (self.split == "validation")

    def _tokens(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(text)
        if self.tokenizer.bos_id in ids or self.tokenizer.eos_id in ids:
            raise UserError(
                f"tokenizer {self.tokenizer.name} turns text in {self.folder} into its own begin or end token, which "
                "would cut a document in two. Use one that keeps text as text."
            )
        return np.array(self._before + ids + self._after, dtype=np.int32)

    @cached_property
    def estimated_tokens(self) -> int:
        """About how many tokens an epoch has: from the first records of units spread over the source."""
        units = self.source.units
        tokens = size = 0
        for i in np.unique(np.linspace(0, len(units) - 1, SAMPLED_UNITS).astype(int)):
            for record in self.source.records(units[i]):
                if record.number >= SAMPLED_RECORDS and record.bytes:  # 0: read together with records before it
                    break
                size += record.bytes
                tokens += len(self._tokens(record.text)) if self._is_ours(record.text) else 0
        return max(1, round(tokens / max(size, 1) * self.source.bytes))


class Lane:
    """Lane `number` of `lanes`, at `position`: one stream of tokens, as blocks of L + 1 that overlap by one."""

    def __init__(
        self, corpus: RawCorpus, order: Sampler, number: int, lanes: int, sequence_length: int, position: Position
    ):
        self.corpus, self.order, self.lanes = corpus, order, lanes
        self.number, self.sequence_length = number, sequence_length
        self._start = position
        self._documents = self._from(position)
        self._held: deque[tuple[int, int, np.ndarray]] = deque()  # turn, record, tokens
        self._used = position.token  # tokens of the first held document that are behind us
        self._ahead = -position.token  # tokens held and not behind us

    @property
    def position(self) -> Position:
        return Position(*self._held[0][:2], self._used) if self._held else self._start

    def block(self) -> tuple[np.ndarray, np.ndarray]:
        """The next block: tokens int32 [L + 1], and where in 1 ... L - 1 documents start.

        Raises:
            UserError: a unit that cannot be read, or a source without any text.
        """
        length = self.sequence_length
        while self._ahead <= length:
            document = next(self._documents)
            if not self._held and self._start.token:
                self._check_same(*document)
            self._held.append(document)
            self._ahead += len(document[2])
        parts, starts, place = [], [], -self._used
        for _, _, tokens in self._held:
            parts.append(tokens[max(0, -place) : length + 1 - place])
            starts.append(place)
            place += len(tokens)
        self._used += length
        self._ahead -= length
        while self._used >= len(self._held[0][2]):
            self._used -= len(self._held.popleft()[2])
        return np.concatenate(parts), np.array([start for start in starts if 0 < start < length], dtype=np.int64)

    def _from(self, position: Position) -> Iterator[tuple[int, int, np.ndarray]]:
        turn, first = position.turn, position.record
        units = self.corpus.source.units
        barren = 0  # units in a row without a document
        while barren <= len(units):
            barren += 1
            for record, tokens in self.corpus.documents(units[self.order.start(turn)], first):
                yield turn, record, tokens
                barren = 0
            turn, first = turn + self.lanes, 0
        raise UserError(f"{self.corpus.folder} has no documents to train on: its texts are empty or all held out.")

    def _check_same(self, turn: int, record: int, tokens: np.ndarray) -> None:
        if (turn, record) != self._start[:2] or self._start.token >= len(tokens):
            unit = self.corpus.source.units[self.order.start(self._start.turn)]
            raise UserError(
                f"{self.corpus.folder / unit.file} is not what the checkpoint was trained on: record "
                f"{self._start.record} of part {unit.part} had more tokens. Restore the file or start a new run."
            )


class RawTrainData:
    """Training sequences of `sequence_length` inputs and as many targets, tokenized from raw files as they are needed.

    Args:
        folder: of .parquet, .jsonl, .jsonl.zst and text files, at any depth; or one such file.
        lanes: streams that every batch draws from. It must divide the global batch and be a multiple of the world size;
            the world sizes that a run can move to are its divisors. None: the largest number up to 512 that fits. Once
            chosen it stays with the run, through `state`.
        text_column: the field of a record that holds the text.
        validation_fraction: the share of documents, chosen by content, that is left out for `RawValidationData` of the
            same folder and fraction. 0 with validation data from elsewhere.
        document_reset: add document boundaries (cu_seqlens) to every batch.

    Raises:
        UserError: a folder or file that cannot be used, or options that do not fit.
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        lanes: Optional[int] = None,
        text_column: str = "text",
        document_format: str = "bos_eos",
        validation_fraction: float = 0.0,
        document_reset: bool = True,
    ):
        self.corpus = RawCorpus(folder, tokenizer, "train", text_column, document_format, validation_fraction)
        self.order = self.corpus.order(seed)
        self.sequence_length, self.seed = sequence_length, seed
        self.lanes = lanes
        self.document_reset = document_reset
        self._loaded: Optional[dict[str, Any]] = None
        self._reached: Optional[tuple[int, dict[int, Position]]] = None  # consumed, and this rank's lanes there

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that must be equal for a resumed run to continue the same data: plain JSON values."""
        return {
            **self.corpus.fingerprint,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "order": ORDER_VERSION,
            "raw": LANES_VERSION,
            "document_reset": self.document_reset,
        }

    @property
    def corpora(self) -> list[RawCorpus]:
        return [self.corpus]

    def epochs(self, consumed: int) -> float:
        """About how many passes over the data `consumed` sequences make; how many tokens a pass has is estimated."""
        return consumed * self.sequence_length / self.corpus.estimated_tokens

    def describe(self, consumed: int) -> list[str]:
        """About how much there is, and how often `consumed` sequences go through it."""
        size, epochs = f"about {self.corpus.estimated_tokens:,} tokens", self.epochs(consumed)
        return [f"raw text in {self.corpus.folder}: {size}, of which the run sees {epochs:.2f} epochs"]

    def state(self, consumed: int) -> dict[str, Any]:
        """Where all lanes are after `consumed` sequences: plain JSON values, the same on every rank.

        Call it on all ranks, when the micro-batches up to `consumed` and none of the next step's last have been taken.
        """
        if self._reached is None:
            return self._loaded or {}
        reached, positions = self._reached
        if reached != consumed:
            raise ValueError(f"the lanes are at {reached} sequences, not at {consumed}")
        everywhere: dict[int, Position] = {}
        for part in _gathered(positions):
            everywhere |= part
        if len(everywhere) != self.lanes:
            raise ValueError(f"{len(everywhere)} of {self.lanes} lanes are known: state() takes all ranks together")
        lanes = [list(everywhere[number]) for number in range(self.lanes)]
        return {"consumed": consumed, "source": self.corpus.source.fingerprint, "lanes": lanes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on any number of ranks that divides its lanes.

        Raises:
            UserError: the files changed since, or another number of lanes was asked for.
        """
        if not state:
            return
        if state["source"] != self.corpus.source.fingerprint:
            raise UserError(f"the files in {self.corpus.folder} changed since the checkpoint. Restore them.")
        if self.lanes not in (None, len(state["lanes"])):
            raise UserError(f"the checkpoint has {len(state['lanes'])} lanes, not {self.lanes}. Ask for as many.")
        self.lanes, self._loaded, self._reached = len(state["lanes"]), state, None

    def micro_batches(
        self,
        consumed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        prefetch: bool,
        pin_memory: bool,
    ) -> Iterator[Batch]:
        """This rank's micro-batches from position `consumed` on, without end.

        Row k * V + v of a global batch is the k-th of its blocks of lane v. Rank r takes the rows with r = row % W in
        order, micro_batch at a time, so that over all ranks a step holds exactly the global batch. Closing the iterator
        ends the prefetch thread; an error in the thread is raised to the caller.

        Raises:
            UserError: the global batch does not split into lanes, ranks and micro-batches, or `consumed` is not where
                the loaded state was taken.
        """
        check_split(global_batch, micro_batch, world_size)
        self.lanes = self._fitting_lanes(global_batch, world_size)
        start = self._positions_at(consumed)
        mine = range(rank, self.lanes, world_size)
        self._reached = consumed, {number: start[number] for number in mine}

        def in_order() -> Iterator[tuple[Batch, Optional[tuple[int, dict[int, Position]]]]]:
            lanes = [Lane(self.corpus, self.order, v, self.lanes, self.sequence_length, start[v]) for v in mine]
            blocks = (lane.block() for lane in itertools.cycle(lanes))
            rows = global_batch // world_size
            for end in itertools.count(consumed + global_batch, global_batch):
                for taken in range(micro_batch, rows + 1, micro_batch):
                    batch = self._batch(list(itertools.islice(blocks, micro_batch)))
                    reached = (end, {lane.number: lane.position for lane in lanes}) if taken == rows else None
                    yield batch.pin_memory() if pin_memory else batch, reached

        def taken() -> Iterator[Batch]:
            device = torch.cuda.current_device() if pin_memory else None
            batches = prefetched(in_order(), device) if prefetch else in_order()
            try:
                for batch, reached in batches:
                    self._reached = reached or self._reached
                    yield batch
            finally:
                batches.close()

        return taken()

    def _batch(self, blocks: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in blocks]).astype(np.int64))
        if not self.document_reset:
            return Batch(tokens)
        return Batch(tokens, segment_offsets([starts for _, starts in blocks], self.sequence_length))

    def _positions_at(self, consumed: int) -> list[Position]:
        if consumed != (self._loaded["consumed"] if self._loaded else 0):
            known = f"those after {self._loaded['consumed']}" if self._loaded else "none"
            raise UserError(
                f"raw data resumes after {consumed} sequences from its lanes' positions there; the checkpoint has "
                f"{known}. Use a checkpoint of this run."
            )
        if self._loaded:
            return [Position(*position) for position in self._loaded["lanes"]]
        return [Position(number, 0, 0) for number in range(self.lanes)]

    def _fitting_lanes(self, global_batch: int, world_size: int) -> int:
        """The number of lanes: the run's, if it has one, else the largest that fits."""
        if self.lanes is None:
            most = min(global_batch, MAX_LANES, len(self.corpus.source.units))
            fitting = (n for n in range(most, 0, -1) if global_batch % n == 0 and n % world_size == 0)
            lanes = next(fitting, None)
            if lanes is None:
                raise UserError(
                    f"{self.corpus.folder} holds {len(self.corpus.source.units)} row groups or files, too few for "
                    f"{world_size} ranks to share. Use fewer ranks, or pack it with scripts/prepare_data.py."
                )
            return lanes
        if self.lanes < 1 or global_batch % self.lanes:
            raise UserError(f"{self.lanes} lanes do not divide a global batch of {global_batch} sequences.")
        if self.lanes % world_size:
            counts = ", ".join(str(n) for n in range(1, self.lanes + 1) if self.lanes % n == 0)
            raise UserError(f"{self.lanes} lanes do not split over {world_size} ranks. They do over {counts}.")
        return self.lanes


class RawValidationData:
    """Fixed blocks of `block_length` inputs and as many targets from raw text, tokenized once, into memory.

    Args:
        validation_fraction: the one of the training data, when `folder` is the same: takes the documents held out
            there. None takes every document of `folder`.
        max_tokens: where to stop; units are read in a fixed random order, so that what was read is a fair sample.
        document_reset: give document boundaries with every batch.

    Raises:
        UserError: a folder or file that cannot be used, or fewer tokens than one block.
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        tokenizer: Tokenizer,
        block_length: int,
        text_column: str = "text",
        document_format: str = "bos_eos",
        validation_fraction: Optional[float] = None,
        max_tokens: int = VALIDATION_TOKENS,
        document_reset: bool = True,
    ):
        split = None if validation_fraction is None else "validation"
        self.corpus = RawCorpus(folder, tokenizer, split, text_column, document_format, validation_fraction or 0.0)
        self.block_length, self.document_reset = block_length, document_reset
        documents = self._read(max_tokens)
        self.tokens = np.concatenate([np.empty(0, np.int32), *documents])[:max_tokens]
        self.document_starts = np.cumsum([0, *map(len, documents)])[:-1]
        self.num_blocks = (len(self.tokens) - 1) // block_length
        if self.num_blocks < 1:
            raise UserError(
                f"{folder}: {len(self.tokens)} validation tokens are too few for one block of {block_length} "
                f"(it takes {block_length + 1}). Hold out more, use another folder, or evaluate shorter blocks."
            )

    def _read(self, max_tokens: int) -> list[np.ndarray]:
        units, order = self.corpus.source.units, self.corpus.order(seed=0)
        documents, total = [], 0
        for turn in range(len(units)):
            for _, tokens in self.corpus.documents(units[order.start(turn)], slices=1):
                documents.append(tokens)
                total += len(tokens)
                if total >= max_tokens:
                    return documents
        return documents

    def block(self, i: int) -> torch.Tensor:
        """Block i of num_blocks: int64 [block_length + 1]."""
        if not 0 <= i < self.num_blocks:
            raise IndexError(f"block {i} of {self.num_blocks}")
        start = i * self.block_length
        return torch.from_numpy(self.tokens[start : start + self.block_length + 1].astype(np.int64))

    def batch(self, i: int) -> Batch:
        """Block i as a micro-batch of one row, with its document boundaries unless document_reset is off."""
        tokens, start = self.block(i)[None], i * self.block_length
        if not self.document_reset:
            return Batch(tokens)
        inside = slice(*np.searchsorted(self.document_starts, [start + 1, start + self.block_length]))
        return Batch(tokens, segment_offsets([self.document_starts[inside] - start], self.block_length))


def _gathered(part: dict[int, Position]) -> list[dict[int, Position]]:
    """`part` of every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [part]
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts
