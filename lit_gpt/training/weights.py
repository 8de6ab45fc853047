"""The weights of a trained model, wherever they are kept: a run folder, one of its checkpoints, or one file to share.

The file is safetensors. Its tensors have the names and shapes of `GPT.state_dict()`; its metadata, all text:

    format           "pt", as others expect it
    lit_gpt_format   "1"
    model            the model's config, as JSON
    step, tokens     how far it was trained
    document_format  how documents were marked in training: "bos_eos" and so on, or "" if not known
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.files import explain_unwritable, sync_folder, temporary_name
from lit_gpt.tensor_file import TensorFile, write_tensors
from lit_gpt.training.checkpoint import load_model
from lit_gpt.training.checkpoint_manifest import META, damage, newest_sound, read_meta

FILE_FORMAT = "1"


@dataclass(frozen=True)
class Weights:
    """Weights that were found and are sound."""

    path: Path
    """The checkpoint folder, or the file."""
    meta: dict
    """At least `model` (the config as a dictionary), `step`, `tokens`, `document_format` (None: not known)."""

    @classmethod
    def find(cls, path: Path, tell: Callable[[str], None]) -> "Weights":
        """The newest sound checkpoint of a run folder, or the checkpoint folder or safetensors file that `path` is.

        Args:
            tell: hears a line about each newer checkpoint that is damaged.

        Raises:
            UserError: there is none, or it is damaged.
        """
        if path.is_file():
            return cls(path, _file_meta(path))
        if not path.is_dir():
            raise UserError(
                f"{path} is not there. Give a run folder, a checkpoints/step-* in it, or a safetensors file."
            )
        if (path / META).is_file():
            reason = damage(path, parts=("model",))
            if reason:
                raise UserError(f"{path} is damaged: {reason}. Take another checkpoint of that run.")
            return cls(path, read_meta(path))
        newest, damaged = newest_sound(path / "checkpoints", parts=("model",))
        for name, reason in damaged.items():
            tell(f"{name} is damaged and left as it is: {reason}.")
        if newest is None:
            raise UserError(f"{path} holds no checkpoint. Give a run folder with one, or a checkpoints/step-* folder.")
        return cls(newest, read_meta(newest))

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer belongs: in the run folder, or beside the file."""
        place = self.path.resolve().parent
        return (place if self.path.is_file() else place.parent) / "tokenizer"

    def load_into(self, model: nn.Module) -> None:
        """Fill a model, sharded or not, all ranks together. Raises UserError if it is of another shape."""
        load_model(self.path, model)


def save_weights(
    path: Path,
    tensors: dict[str, Tensor],
    meta: dict,
    matrices: torch.dtype = torch.float32,
    on_bytes: Optional[Callable[[int], None]] = None,
) -> None:
    """Write the file to share, whole or not at all.

    Args:
        tensors: of `GPT.state_dict()`.
        meta: as of `Weights`.
        matrices: what matrices and embeddings are stored as. Norms, biases, convolutions, A_log and dt_bias stay
            fp32: they are few, and set scales and time constants.
    """
    cast = {name: t.to(matrices if t.ndim == 2 else torch.float32) for name, t in tensors.items()}
    metadata = {"format": "pt", "lit_gpt_format": FILE_FORMAT, "model": json.dumps(meta["model"])}
    metadata |= {"step": str(meta["step"]), "tokens": str(meta["tokens"])}
    metadata["document_format"] = meta.get("document_format") or ""
    temporary = temporary_name(path)
    with explain_unwritable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_tensors(temporary, cast, metadata, on_bytes)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _file_meta(path: Path) -> dict:
    metadata = TensorFile(path).metadata
    if metadata.get("lit_gpt_format") != FILE_FORMAT:
        raise UserError(f"{path} holds tensors, but does not say of which model; scripts/convert_checkpoint.py would.")
    try:
        meta = {"model": json.loads(metadata["model"])}
        meta |= {name: int(metadata[name]) for name in ("step", "tokens")}
        if not isinstance(meta["model"], dict):
            raise ValueError("it is no mapping of fields")
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} says nothing sensible of its model ({error}).") from error
    return {**meta, "document_format": metadata.get("document_format") or None}
