"""Which checkpoints there are, and which of them are sound: manifests with the size and SHA-256 of every file."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from lit_gpt.errors import UserError
from lit_gpt.files import sha256_of_file, write_atomically

FORMAT = 2
MANIFEST = "manifest.json"
META = "meta.json"


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """Write the manifest of a checkpoint: {file name: {"bytes", "sha256"}}, and a checksum of itself."""
    write_atomically(folder / MANIFEST, _manifest(files))


def damage(path: Path, parts: tuple[str, ...] = ()) -> Optional[str]:
    """What is wrong with a checkpoint, in a few words; None if it is sound. Reads every byte of it.

    Args:
        parts: of the files with tensors, check only those whose names begin with one of these.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} is damaged"
        files = {name: files[name] for name in files if name == META or not parts or name.startswith(parts)}
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        with ThreadPoolExecutor(max_workers=8) as pool:
            digests = pool.map(lambda name: sha256_of_file(path / name), files)
            for name, digest in zip(files, digests):
                if digest != files[name]["sha256"]:
                    return f"the checksum of {name} is wrong"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror}: {Path(error.filename or path).name}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def files_of(path: Path, part: str) -> list[Path]:
    """The files that hold a part of a checkpoint: "model" or "optimizer"."""
    names = json.loads((path / MANIFEST).read_bytes())["files"]
    return [path / name for name in sorted(names) if re.fullmatch(rf"{part}-\d+\.safetensors", name)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def newest_sound(folder: Path, parts: tuple[str, ...] = ()) -> tuple[Optional[Path], dict[str, str]]:
    """The newest sound checkpoint in a folder, None if there is no checkpoint, and what is wrong with newer ones, by
    their names. Those stay as they are. `parts` as in `damage`.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    damaged: dict[str, str] = {}
    for path in reversed(complete_checkpoints(folder)):
        reason = damage(path, parts)
        if reason is None:
            return path, damaged
        damaged[path.name] = reason
    if damaged:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in damaged.items())
        raise UserError(f"no checkpoint in {folder} is sound: {reasons}. Put back a copy of one of them.")
    return None, damaged


def read_meta(path: Path) -> dict:
    """What a checkpoint says of itself. Raises UserError if the folder is not a checkpoint of a format that we read."""
    try:
        meta = json.loads((path / META).read_text())
        if meta.get("format") == FORMAT:
            return meta
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {error}.") from error
    raise UserError(f"{path} has checkpoint format {meta.get('format')!r}; this version reads {FORMAT}.")


def _manifest(files: dict[str, dict]) -> bytes:
    """The whole text of a manifest, which no other files and no other bytes share."""
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"format": FORMAT, "files": files, "sha256": digest}, indent=2, sort_keys=True) + "\n").encode()
