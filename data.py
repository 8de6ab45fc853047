"""The door to token data: batches as a pure function of how many sequences a run has consumed.

- `open_train`, `open_validation`: what the flags of DataArgs ask for, packed folders or raw text.
- One integer, the number of sequences consumed, is the whole position. It means the same on 1 or 512 ranks.
- Validation is one pass over fixed blocks.
- The fingerprint says which tokens in which order; a resume compares it.

Position is counted by the trainer at its optimizer step, never here: what was prefetched was not trained on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.tokens.corpus import Corpus
from lit_gpt.tokens.packed import TrainData, ValidationData
from lit_gpt.tokens.raw import RawTrainData, RawValidationData
from lit_gpt.tokens.storage import AnyPath


@dataclass
class DataArgs:
    train_data_dir: Optional[str] = None
    """What to train on: a folder of token shards from scripts/prepare_data.py, any folder of LITPKDS files
    (train*.bin), a URL of one (s3://...), or several with weights: "a=0.7,b=0.3". Weights are shares of the sequences,
    exact in every 16,384 of them.
    """
    val_data_dir: Optional[str] = None
    """Folder whose validation shards are evaluated on. Left out: the validation shards of train_data_dir (of several,
    of the one with the largest share).
    """
    document_reset: bool = True
    """Keep the documents packed into a sequence apart: convolutions, recurrent states and attention start anew at each.
    False: everything in a sequence sees what came before it there.
    """
    shuffle_unit: int = 0
    """Tokens that stay together when data is shuffled; 0: one sequence. With a multiple of every sequence length that a
    run will go through, such as 16384, the length can change at a resume without a token coming twice in an epoch.
    """
    allow_data_change: bool = False
    """Let a resumed run go on with other corpora or weights, another sequence length or batch, or document_reset
    changed: from there on, each corpus where it was. Without it such a resume is refused.
    """
    train_num_workers: int = 1
    """1 loads batches ahead in a thread, 0 loads them inside the training loop (as --debug does)."""
    train_data_dir_raw: Optional[Path] = None
    """Folder of .parquet, .jsonl, .jsonl.zst or text files to train on directly, tokenized while training."""
    val_data_dir_raw: Optional[Path] = None
    """The same for validation. Left out: raw_validation_fraction of the documents of train_data_dir_raw."""
    raw_validation_fraction: float = 0.005
    """Share of raw documents, chosen by their content, that is held out where no validation data is given; 0: none."""
    text_column: str = "text"
    """Column of raw .parquet files, or field of .jsonl records, that holds the text."""
    use_stream_tok: bool = False
    """Train on train_data_dir_raw even where train_data_dir is given too."""
    tokenizer_path: Optional[Path] = None
    """Tokenizer for raw data: a folder, a sentencepiece .model or a tokenizer.json."""
    corpus_name: Optional[str] = None
    """A name for the data, kept in config.yaml."""


def open_train(args: DataArgs, sequence_length: int, seed: int) -> "TrainData | RawTrainData":
    """The training data that the flags ask for. Raises UserError where it cannot be used."""
    if _is_raw(args):
        return RawTrainData(
            args.train_data_dir_raw,
            _tokenizer(args),
            sequence_length,
            seed,
            text_column=args.text_column,
            validation_fraction=_held_out(args),
            document_reset=args.document_reset,
        )
    return TrainData(args.train_data_dir, sequence_length, seed, args.shuffle_unit or None, args.document_reset)


def open_validation(
    args: DataArgs, block_length: int, train: "TrainData | RawTrainData"
) -> "ValidationData | RawValidationData | None":
    """The validation data that the flags ask for; None where they name none and the training data has none."""
    if args.val_data_dir is not None:
        return ValidationData(args.val_data_dir, block_length, args.document_reset)
    if args.val_data_dir_raw is not None or _is_raw(args):
        own = args.val_data_dir_raw is None  # a share of the training folder's documents
        if own and not args.raw_validation_fraction:
            return None
        return RawValidationData(
            args.train_data_dir_raw if own else args.val_data_dir_raw,
            _tokenizer(args),
            block_length,
            text_column=args.text_column,
            validation_fraction=_held_out(args) if own else None,
            document_reset=args.document_reset,
        )
    if not any(train.corpus.folder.glob("validation*.bin")):
        return None
    return ValidationData(train.corpus.folder, block_length, args.document_reset)


def tokenizer_of(args: DataArgs, train: "TrainData | RawTrainData") -> AnyPath:
    """Where the tokenizer of the training data lies, if its folder has one."""
    return args.tokenizer_path if _is_raw(args) else train.corpus.folder / "tokenizer"


def _is_raw(args: DataArgs) -> bool:
    if args.use_stream_tok and args.train_data_dir_raw is None:
        raise UserError("--use_stream_tok needs --train_data_dir_raw, the folder of text to train on.")
    if args.train_data_dir is None and args.train_data_dir_raw is None:
        raise UserError("no training data: give --train_data_dir (token shards) or --train_data_dir_raw (text).")
    return args.use_stream_tok or args.train_data_dir is None


def _tokenizer(args: DataArgs) -> Tokenizer:
    if args.tokenizer_path is None:
        raise UserError(
            "raw text needs --tokenizer_path: a folder with a tokenizer, a .model file or a tokenizer.json."
        )
    return Tokenizer(args.tokenizer_path)


def _held_out(args: DataArgs) -> float:
    """The share of raw training documents that is kept for validation: none where validation has data of its own."""
    return args.raw_validation_fraction if args.val_data_dir is None and args.val_data_dir_raw is None else 0.0


def check_same_tokenizer(train: "TrainData | RawTrainData", val: "ValidationData | RawValidationData | None") -> None:
    """Refuse to mix corpora of different tokenizers, training or validation, where their folders say which it was.

    Raises:
        UserError: two differ.
    """
    corpora = [c for c in (*train.corpora, *([val.corpus] if val else [])) if c.tokenizer_sha256]
    for corpus in corpora[1:]:
        ours, theirs = corpora[0].tokenizer_sha256, corpus.tokenizer_sha256
        if ours != theirs:
            raise UserError(
                f"{corpora[0].folder} and {corpus.folder} were made with different tokenizers "
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
