"""Training and validation data of packed token folders.

- One integer, the number of sequences consumed, is the whole position. It means the same on 1 or 512 ranks.
- Training order is a formula (sampler.py, mixture.py): resuming at any position costs nothing and loses nothing.
- Corpora, their weights and the sequence length may change at a resume. What a run has used of every corpus is kept in
  tokens, so that each goes on where it was; a list of phases in the checkpoint says what held from when on.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np
import torch

from lit_gpt.errors import UserError
from lit_gpt.tokens.batch import Batch, check_split, segment_offsets
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.mixture import Mixture, slot_counts
from lit_gpt.tokens.prefetch import prefetched
from lit_gpt.tokens.sampler import ORDER_VERSION, Sampler
from lit_gpt.tokens.storage import RemotePath, location

ROWS_PLANNED = 1024  # places computed at once: one by one they would cost more than reading
MANY_EPOCHS = 4  # up to there repeated data is nearly as good as new (arXiv 2305.16264)
REMOTE_READS = 16  # rows fetched at once where each is a request over a network


@dataclass(frozen=True)
class Phase:
    """What holds from sequence `start` of a run on. Corpora go by their fingerprints."""

    start: int
    sequence_length: int
    shuffle_unit: int
    slots: dict[str, int]
    """The corpora of this phase and their slots in the mixture."""
    offsets: dict[str, int]
    """Tokens used before it, of every corpus that the run has ever used."""


class TrainData:
    """Training sequences of `sequence_length` inputs and as many targets, in the order that `seed` selects.

    A corpus's own order depends on the seed alone, not on what it is mixed with, and goes through all of the corpus
    before any of it comes again.

    Args:
        folders: a folder or URL, or several with weights: "a=0.7,b=0.3".
        shuffle_unit: see DataArgs; None: one sequence.
        document_reset: give document boundaries with every batch.

    Raises:
        UserError: no usable shards in a folder, or too few tokens for one sequence.
    """

    def __init__(
        self,
        folders: "str | os.PathLike[str]",
        sequence_length: int,
        seed: int,
        shuffle_unit: Optional[int] = None,
        document_reset: bool = True,
    ):
        if shuffle_unit and shuffle_unit % sequence_length:
            raise UserError(f"shuffle unit {shuffle_unit} is no multiple of the sequence length {sequence_length}.")
        weights = parse_mixture(folders)
        self.corpora = [Corpus.open(folder, "train") for folder in weights]
        self.sequence_length, self.seed, self.document_reset = sequence_length, seed, document_reset
        self._asked_unit = shuffle_unit
        names = [corpus.fingerprint for corpus in self.corpora]
        if len(set(names)) < len(names):
            raise UserError(f"{folders}: the same data is named twice. Name each folder once, with the sum of weights.")
        self.slots = dict(sorted(zip(names, slot_counts(list(weights.values())))))  # sorted: any order means the same
        self.corpora.sort(key=lambda corpus: corpus.fingerprint)
        self._set_phases([Phase(0, sequence_length, shuffle_unit or sequence_length, self.slots, {})])
        remote = any(isinstance(corpus.folder, RemotePath) for corpus in self.corpora)
        self._map = ThreadPoolExecutor(REMOTE_READS).map if remote else map

    def _set_phases(self, phases: list[Phase]) -> None:
        """Make the last of `phases` the one that holds."""
        self.phases, phase = phases, phases[-1]
        self._mixture = Mixture(list(phase.slots.values()), self.seed)
        self._samplers, self._first = [], []
        for corpus in self.corpora:
            try:
                sampler = Sampler(corpus.num_tokens, self.sequence_length, self.seed, phase.shuffle_unit)
            except UserError as error:
                raise UserError(f"{corpus.folder}: {error}") from None
            self._samplers.append(sampler)
            # Rounded up: what an odd place leaves of a longer sequence is not used before the next epoch.
            self._first.append(-(-phase.offsets.get(corpus.fingerprint, 0) // self.sequence_length))

    @property
    def corpus(self) -> Corpus:
        """The corpus, or of several the one with the largest share."""
        return max(self.corpora, key=lambda corpus: self.slots[corpus.fingerprint])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that must be equal for a resumed run to continue the same data: plain JSON values."""
        return {
            "corpora": self.slots,
            "sequence_length": self.sequence_length,
            "shuffle_unit": self._asked_unit,
            "seed": self.seed,
            "order": ORDER_VERSION,
            "document_reset": self.document_reset,
        }

    def state(self, consumed: int) -> dict[str, Any]:
        """What load_state needs to go on after `consumed` sequences; the same on every rank. Plain JSON values."""
        return {"consumed": consumed, "phases": [asdict(phase) for phase in self.phases]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; where corpora, weights or sequence length are others now, with a new phase."""
        phases = [Phase(**phase) for phase in state["phases"]]
        last, unit = phases[-1], self._asked_unit
        if unit is None:  # the old unit serves as long as sequences fill it, so that its epoch can go on
            unit = self.sequence_length if last.shuffle_unit % self.sequence_length else last.shuffle_unit
        same = (last.sequence_length, last.shuffle_unit, last.slots) == (self.sequence_length, unit, self.slots)
        if not same:
            offsets = dict(last.offsets)
            taken = Mixture(list(last.slots.values()), self.seed).taken(state["consumed"] - last.start)
            for name, sequences in zip(last.slots, taken):
                first = -(-offsets.get(name, 0) // last.sequence_length)
                offsets[name] = (first + sequences) * last.sequence_length
            phases.append(Phase(state["consumed"], self.sequence_length, unit, self.slots, offsets))
        self._set_phases(phases)

    def corpus_epochs(self, consumed: int) -> list[tuple[Corpus, float, float]]:
        """Each corpus, its share of the sequences now, and the passes over it that `consumed` sequences make."""
        taken = self._mixture.taken(consumed - self.phases[-1].start)
        shares = self._mixture.counts / self._mixture.counts.sum()
        return [
            (corpus, float(share), (first + sequences) / sampler.num_sequences)
            for corpus, share, first, sequences, sampler in zip(
                self.corpora, shares, self._first, taken, self._samplers
            )
        ]

    def epochs(self, consumed: int) -> float:
        """Passes over the data that `consumed` sequences make; of several corpora, over the one most often repeated."""
        return max(epochs for _, _, epochs in self.corpus_epochs(consumed))

    def describe(self, consumed: int) -> list[str]:
        """A line for each corpus: its size, its share, and how often `consumed` sequences go through it."""
        lines = []
        for corpus, share, epochs in self.corpus_epochs(consumed):
            part = f"{share:.2%} from {corpus.folder}: " if len(self.corpora) > 1 else ""
            lines.append(f"{part}{corpus.num_tokens:,} tokens, of which the run sees {epochs:.2f} epochs")
            if epochs > MANY_EPOCHS:
                lines[-1] += f" (more than {MANY_EPOCHS}: repeats this often teach less)"
        return lines

    def batch(self, first: int, count: int) -> Batch:
        """Sequences first, ..., first + count - 1 of the run, of its present phase."""
        return self._load(self._places(np.arange(first, first + count)))

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

        Every global_batch // (world_size * micro_batch) of them make one step; over all ranks a step holds exactly the
        sequences consumed, ..., consumed + global_batch - 1. Closing the iterator ends the prefetch thread; an error
        in the thread is raised to the caller.

        Raises:
            UserError: the global batch does not split into ranks and micro-batches.
        """
        check_split(global_batch, micro_batch, world_size)

        def in_order() -> Iterator[Batch]:
            # A step is a whole number of rounds over the ranks, so steps follow each other without a seam.
            rounds = np.arange(max(1, ROWS_PLANNED // micro_batch))[:, None] * world_size
            first = consumed
            while True:
                numbers = first + (rounds + rank) * micro_batch + np.arange(micro_batch)
                places = self._places(numbers.ravel())
                for i in range(0, len(places), micro_batch):
                    batch = self._load(places[i : i + micro_batch])
                    yield batch.pin_memory() if pin_memory else batch
                first += numbers.size * world_size

        device = torch.cuda.current_device() if pin_memory else None
        return prefetched(in_order(), device) if prefetch else in_order()

    def _places(self, numbers: np.ndarray) -> list[tuple[Corpus, int]]:
        """Where the sequences of these numbers lie: each in a corpus from a token on."""
        numbers = numbers - self.phases[-1].start
        if (numbers < 0).any():
            raise ValueError(f"sequences before {self.phases[-1].start} belong to an earlier phase of the run")
        owners, local = self._mixture.locate(numbers)
        starts = np.empty(len(numbers), dtype=np.int64)
        for k in np.unique(owners):
            starts[owners == k] = self._samplers[k].start(self._first[k] + local[owners == k])
        return [(self.corpora[k], start) for k, start in zip(owners.tolist(), starts.tolist())]

    def _load(self, places: list[tuple[Corpus, int]]) -> Batch:
        L = self.sequence_length
        tokens = np.empty((len(places), L + 1), dtype=np.int64)

        def load_row(row: int) -> Optional[np.ndarray]:
            corpus, start = places[row]
            tokens[row] = corpus.read(start, L + 1)
            return corpus.document_starts(start, tokens[row, :L]) if self.document_reset else None

        starts = list(self._map(load_row, range(len(places))))
        return Batch(torch.from_numpy(tokens), segment_offsets(starts, L) if self.document_reset else None)


class ValidationData:
    """Fixed blocks of `block_length` inputs and as many targets, one after the other through the validation split.

    Raises:
        UserError: no usable shards in `folder`, or fewer tokens than one block.
    """

    def __init__(self, folder: "str | os.PathLike[str]", block_length: int, document_reset: bool = True):
        self.corpus = Corpus.open(folder, "validation")
        self.block_length, self.document_reset = block_length, document_reset
        self.num_blocks = (self.corpus.num_tokens - 1) // block_length
        if self.num_blocks < 1:
            raise UserError(
                f"{folder}: {self.corpus.num_tokens} validation tokens are too few for one block of {block_length} "
                f"(it takes {block_length + 1}). Hold out more (--validation_fraction) or evaluate shorter blocks."
            )

    def block(self, i: int) -> torch.Tensor:
        """Block i of num_blocks: int64 [block_length + 1]."""
        if not 0 <= i < self.num_blocks:
            raise IndexError(f"block {i} of {self.num_blocks}")
        return torch.from_numpy(self.corpus.read(i * self.block_length, self.block_length + 1))

    def batch(self, i: int) -> Batch:
        """Block i as a micro-batch of one row, with its document boundaries unless document_reset is off."""
        tokens = self.block(i)
        if not self.document_reset:
            return Batch(tokens[None])
        starts = self.corpus.document_starts(i * self.block_length, tokens[:-1].numpy())
        return Batch(tokens[None], segment_offsets([starts], self.block_length))


def parse_mixture(text: "str | os.PathLike[str]") -> dict[str, float]:
    """Folders and their weights: {"a": 0.7, "b": 0.3} of "a=0.7,b=0.3"; a single folder has weight 1.

    Raises:
        UserError: some folders with a weight and some without, one named twice, or a weight that is no number.
    """
    name = os.fspath(text)
    if "=" not in name or location(name).is_dir():
        if "," in name and not location(name).is_dir():
            raise UserError(f"{name}: several folders need weights, such as {name.split(',')[0]}=0.7,...")
        return {name: 1.0}
    weights = {}
    for part in name.split(","):
        folder, _, weight = part.strip().rpartition("=")
        if not folder or folder in weights:
            why = "is named twice" if folder else "has no weight"
            raise UserError(f"{name}: {folder or part} {why}. Write folder=weight,folder=weight.")
        try:
            weights[folder] = float(weight)
        except ValueError:
            raise UserError(f"{name}: the weight of {folder} is {weight!r}, no number.") from None
    return weights
