"""The door to token data: batches as a pure function of how many sequences a run has consumed.

- One integer, the number of sequences consumed, is the whole position. It means the same on 1 or 512 ranks.
- Training order is a formula (lit_gpt/tokens/sampler.py): resuming at any position costs nothing and loses nothing.
- Validation is one pass over fixed blocks.
- The fingerprint says which tokens in which order; a resume compares it.

Position is counted by the trainer at its optimizer step, never here: what was prefetched was not trained on.
"""

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from lit_gpt.errors import UserError
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.sampler import ORDER_VERSION, Sampler

PREFETCHED = 4  # micro-batches that wait ready


@dataclass
class DataArgs:
    train_data_dir: Path
    """Folder of token shards to train on, from scripts/prepare_data.py, or any folder of LITPKDS files (train*.bin)."""
    val_data_dir: Optional[Path] = None
    """Folder whose validation shards are evaluated on. Left out: the validation shards of train_data_dir."""
    train_num_workers: int = 1
    """1 loads batches ahead in a thread, 0 loads them inside the training loop (as --debug does)."""


class TrainData:
    """Training sequences of `sequence_length` inputs and as many targets, in the order that `seed` selects.

    Raises:
        UserError: no usable shards in `folder`, or too few tokens for one sequence.
    """

    def __init__(self, folder: "str | os.PathLike[str]", sequence_length: int, seed: int):
        self.corpus = Corpus.open(folder, "train")
        try:
            self.sampler = Sampler(self.corpus.num_tokens, sequence_length, seed)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        self.sequence_length = sequence_length
        self.seed = seed

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that must be equal for a resumed run to continue the same data: plain JSON values."""
        return {
            "corpus": self.corpus.fingerprint,
            "tokens": self.corpus.num_tokens,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "order": ORDER_VERSION,
        }

    def epochs(self, consumed: int) -> float:
        """Passes over the data that `consumed` sequences make."""
        return consumed / self.sampler.num_sequences

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Sequences first, ..., first + count - 1 of the run: int64 [count, sequence_length + 1]."""
        tokens = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row, start in enumerate(self.sampler.start(np.arange(first, first + count))):
            tokens[row] = self.corpus.read(int(start), self.sequence_length + 1)
        return torch.from_numpy(tokens)

    def micro_batches(
        self,
        consumed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        prefetch: bool,
        pin_memory: bool,
    ) -> Iterator[torch.Tensor]:
        """This rank's micro-batches from position `consumed` on, without end: int64 [micro_batch, sequence_length + 1].

        Every global_batch // (world_size * micro_batch) of them make one step; over all ranks a step holds exactly the
        sequences consumed, ..., consumed + global_batch - 1. Closing the iterator ends the prefetch thread; an error
        in the thread is raised to the caller.

        Raises:
            UserError: the global batch does not split into ranks and micro-batches.
        """
        if global_batch < 1 or global_batch % (world_size * micro_batch):
            raise UserError(
                f"global batch of {global_batch} sequences does not split into {world_size} ranks x micro-batch "
                f"{micro_batch}. Use a micro-batch that divides {global_batch / world_size:g}."
            )

        def in_order() -> Iterator[torch.Tensor]:
            # A step is a whole number of rounds over the ranks, so steps follow each other without a seam.
            first = consumed + rank * micro_batch
            while True:
                batch = self.batch(first, micro_batch)
                yield batch.pin_memory() if pin_memory else batch
                first += world_size * micro_batch

        device = torch.cuda.current_device() if pin_memory else None
        return _prefetched(in_order(), device) if prefetch else in_order()


def _prefetched(batches: Iterator[torch.Tensor], device: Optional[int]) -> Iterator[torch.Tensor]:
    """`batches`, computed ahead by a thread. `device`: the GPU to pin memory for, which CUDA keeps per thread."""
    ready: queue.Queue = queue.Queue(maxsize=PREFETCHED)
    closed = threading.Event()

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for batch in batches:
                ready.put(batch)
                if closed.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not ready.empty():  # makes room for the one batch that the thread may still be putting
            ready.get_nowait()
        thread.join()


class ValidationData:
    """Fixed blocks of `block_length` inputs and as many targets, one after the other through the validation split.

    Raises:
        UserError: no usable shards in `folder`, or fewer tokens than one block.
    """

    def __init__(self, folder: "str | os.PathLike[str]", block_length: int):
        self.corpus = Corpus.open(folder, "validation")
        self.block_length = block_length
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


def check_same_tokenizer(train: TrainData, val: ValidationData) -> None:
    """Refuse validation data of another tokenizer than the training data's, where both folders say which it was.

    Raises:
        UserError: they differ.
    """
    ours, theirs = train.corpus.tokenizer_sha256, val.corpus.tokenizer_sha256
    if ours and theirs and ours != theirs:
        raise UserError(
            f"{train.corpus.folder} and {val.corpus.folder} were made with different tokenizers "
            f"(SHA-256 {ours[:12]} and {theirs[:12]}). Prepare both with the same one."
        )


def check_vocabulary(corpus: Corpus, model_vocab_size: int) -> None:
    """Refuse a corpus with ids that the model has no embedding for.

    A manifest tells the size of the vocabulary. Without one, ids are sampled from 256 places spread over the corpus.

    Raises:
        UserError: the model's vocabulary is too small, or an id is negative.
    """
    if corpus.vocab_size is not None:
        if corpus.vocab_size > model_vocab_size:
            raise UserError(
                f"{corpus.folder} uses a vocabulary of {corpus.vocab_size} ids, the model has {model_vocab_size}. "
                f"Choose a model with a vocabulary of at least {corpus.vocab_size}, or prepare with another tokenizer."
            )
        return
    length = min(4096, corpus.num_tokens)
    places = np.unique(np.linspace(0, corpus.num_tokens - length, 256).astype(np.int64))
    ids = np.concatenate([corpus.read(int(start), length) for start in places])
    if ids.min() < 0 or ids.max() >= model_vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise UserError(
            f"{corpus.folder} holds token id {wrong}, the model's ids are 0 to {model_vocab_size - 1}. "
            f"Choose the model that fits the data's tokenizer, or prepare the data again."
        )
