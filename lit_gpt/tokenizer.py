"""Text to token ids and back.

- A SentencePiece `.model` or a Hugging Face `tokenizer.json`, whichever a model came with, behind one small interface.
- Text is only ever text: a literal "</s>" inside a document never becomes the id that ends documents.
- `train_tokenizer` makes a byte-fallback BPE that loses nothing: tabs, newlines, indentation and any Unicode come back.
- The SHA-256 of the model file identifies a tokenizer; corpora and checkpoints record it.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Optional

import sentencepiece
import tokenizers

from lit_gpt.errors import UserError
from lit_gpt.files import sha256_of_file, write_atomically

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space inside its pieces
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<|endoftext|>")
END_TOKENS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer:
    """A tokenizer read from a SentencePiece `.model`, a `tokenizer.json`, or a folder with either (`.model` first).

    Attributes:
        path: the model file.  name: a readable name.  vocab_size: every id is below it.
        bos_id, eos_id: ids that begin and end a document; None where the tokenizer has no such token.

    Raises:
        UserError: nothing there, or the file is no tokenizer.
    """

    def __init__(self, path: "str | os.PathLike[str]"):
        self.path = _model_file(Path(path))
        folder_names_it = self.path.name in ("tokenizer.model", "tokenizer.json")
        self.name = self.path.resolve().parent.name if folder_names_it else self.path.stem
        try:
            self._codec = _SentencePiece(self.path) if self.path.suffix == ".model" else _HuggingFace(self.path)
        except UserError:
            raise
        except Exception as error:  # both libraries raise bare Exception or RuntimeError for a file they cannot parse
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path} cannot be read as a tokenizer ({reason}). Give an intact one.") from error
        self.bos_id, self.eos_id = self._codec.bos_id, self._codec.eos_id
        self.vocab_size: int = self._codec.vocab_size

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the model file."""
        return sha256_of_file(self.path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no begin or end token is added, and none is read out of the text."""
        return self._codec.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return self._codec.encode_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; begin and end tokens are left out."""
        return self._codec.decode([int(i) for i in ids])

    def save(self, folder: "str | os.PathLike[str]") -> Path:
        """Copy what `Tokenizer(folder)` needs into `folder` and return the copied model file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        companions = [self.path.with_name("tokenizer_config.json")] if self.path.suffix == ".json" else []
        for companion in companions:
            if companion.is_file():
                write_atomically(folder / companion.name, companion.read_bytes())
        copy = folder / f"tokenizer{self.path.suffix}"  # last: its presence says that the copy is complete
        write_atomically(copy, self.path.read_bytes())
        return copy


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_folder: "str | os.PathLike[str]") -> Tokenizer:
    """Train a BPE tokenizer that reproduces any text exactly and write `out_folder/tokenizer.model`.

    The same texts and size give the same file, byte for byte: unk 0, bos 1, eos 2, the 256 bytes, then pieces.

    Raises:
        UserError: `vocab_size` does not fit the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation in one piece
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # recorded inside the model file: a constant keeps the file the same on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2]
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {reason}") from error
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(out_folder / "tokenizer.model", model.getvalue())
    return Tokenizer(out_folder)


def _training_sentences(texts: Iterable[str], length: int = 1000) -> Iterable[str]:
    """Cut texts so that each part stays below the trainer's limit of 4192 bytes; it drops longer ones."""
    for text in texts:
        for start in range(0, len(text), length):
            yield text[start : start + length]


def _model_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds neither tokenizer.model nor tokenizer.json. Point to a folder with either.")
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist. Give a .model, a tokenizer.json or their folder.")
    if path.suffix not in (".model", ".json"):
        raise UserError(f"{path} is no tokenizer. Give a SentencePiece .model, a tokenizer.json or their folder.")
    return path


class _SentencePiece:
    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(path.read_bytes())
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos_id = self.model.eos_id() if self.model.eos_id() >= 0 else None
        # SentencePiece reads a literal U+2581 as a space. Spelled in byte pieces it survives, as a tokenizer that keeps
        # leading spaces promises; one with a dummy prefix (Llama's) keeps its own published ids.
        keeps_spaces = not self.model.encode_as_pieces("a")[0].startswith(SPACE_MARK)
        spelling = [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        has_bytes = all(self.model.is_byte(i) for i in spelling)
        self.mark_spelling = spelling if keeps_spaces and has_bytes else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch = self.model.encode(texts, num_threads=1)
        if self.mark_spelling:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    first, *rest = self.model.encode(text.split(SPACE_MARK), num_threads=1)
                    batch[i] = first + [i for part in rest for i in self.mark_spelling + part]
        return batch

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _HuggingFace:
    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        config_file = path.with_name("tokenizer_config.json")
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        self.bos_id = self._special_id(config.get("bos_token"), BEGIN_TOKENS)
        self.eos_id = self._special_id(config.get("eos_token"), END_TOKENS)
        content = json.loads(path.read_text(encoding="utf-8"))
        for token in content.get("added_tokens", []):
            token["special"] |= token["id"] in (self.bos_id, self.eos_id)  # some files leave them unmarked
        self.model = tokenizers.Tokenizer.from_str(json.dumps(content))
        self.model.encode_special_tokens = True  # "</s>" in a text is text
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def _special_id(self, named: "str | dict | None", customary: tuple[str, ...]) -> Optional[int]:
        """Id of the token that tokenizer_config.json names, else of the first customary one that exists."""
        if isinstance(named, dict):
            named = named["content"]
        ids = [self.model.token_to_id(token) for token in ([named] if named else customary)]
        return next((i for i in ids if i is not None), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One by one: the library's encode_batch starts a thread per core, in each of prepare_data's process per core.
        return [self.model.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)
