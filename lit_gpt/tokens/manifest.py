"""manifest.json: what a finished corpus folder holds. It is written last, so a folder with one is complete.

version, name, dtype, vocab_size, document_format ("bos_eos", "eos" or "bos")
tokenizer     {file, sha256, bos_id, eos_id}; the file is a copy inside the folder
validation    {fraction, rule}: how documents were held out
units         [{unit, source, files, bytes, train, validation, not_text, empty}]
train, validation of a unit: {file, tokens, documents, characters, sha256, idx_sha256}, or null when it got none

An adopted folder, tokenized elsewhere, has null for what nobody knows: characters, validation, and without --tokenizer
also tokenizer and vocab_size. Its shards may have "padding": tokens at their end that are not part of the corpus.

totals        {train, validation: {tokens, documents, characters}, not_text, empty}
fingerprint   SHA-256 of all of the above in canonical JSON
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Optional

from lit_gpt.errors import UserError
from lit_gpt.files import write_json

MANIFEST_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
DOCUMENT_FORMATS = ("bos_eos", "eos", "bos")


def canonical_json(content: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def fingerprint_of(content: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `content`."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: it is none; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Restore it, or prepare the data again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object. Restore it, or prepare the data again.")
    return content


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Add version and fingerprint to `content`, write it, return it."""
    content = {"version": MANIFEST_VERSION, **content}
    manifest = {**content, "fingerprint": fingerprint_of(content)}
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(folder: Path) -> Optional[dict[str, Any]]:
    """The manifest of `folder`, or None where there is none.

    Raises:
        UserError: an unknown version, or content that its own fingerprint contradicts.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(f"{path} has version {manifest.get('version')}; this program reads version {MANIFEST_VERSION}.")
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if fingerprint_of(content) != manifest.get("fingerprint"):
        raise UserError(f"{path} was changed after it was written: its fingerprint does not match. Restore it.")
    return manifest
