"""Writing files so that a kill at any instant leaves the old content or the new, never a mixture."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

from lit_gpt.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """Where this process writes before renaming to `path`: the same folder, so that the rename is atomic."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: temporary file, fsync, rename. A failure, as of a full disk, leaves nothing."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn "no space left" from inside the block into one line of advice.

    Raises:
        UserError: the disk or the quota of `folder` is used up.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {folder}. What is finished is kept: free some, run the same command again."
        ) from error


@contextlib.contextmanager
def explain_unwritable(folder: Path) -> Iterator[None]:
    """Turn whatever keeps the block from writing below `folder` into one line, a full disk included.

    Raises:
        UserError: as when the file system is read-only, or the folder another user's.
    """
    with explain_full_disk(folder):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"cannot write to {folder} ({error.strerror or error}): choose another place.") from error


def sha256_of_file(path: Path, skip: int = 0, on_bytes: Optional[Callable[[int], None]] = None) -> str:
    """Hex SHA-256 of a file after its first `skip` bytes. `on_bytes` hears the size of each part as it is read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(skip)
        while part := file.read(1 << 22):
            digest.update(part)
            if on_bytes:
                on_bytes(len(part))
    return digest.hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
