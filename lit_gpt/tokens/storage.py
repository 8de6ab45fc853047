"""Where token files lie: folders on local disks, and folders behind any URL that fsspec knows (s3://, gs://, memory://).

A `RemotePath` has those methods of a Path that reading token data needs. Files are read by ranges: `pread` on local
disks, range requests elsewhere; a folder's names and sizes come from one listing.
"""

import filecmp
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

from lit_gpt.errors import UserError


class RemotePath:
    """A file or folder of an fsspec file system."""

    def __init__(self, fs: Any, path: str, listing: Optional[dict[str, dict]] = None):
        self.fs, self.path = fs, path.rstrip("/")
        self._listing = listing  # of the folder that holds this file: {name: fsspec's info}

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __fspath__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.fs, self.path) == (other.fs, other.path)

    def __hash__(self) -> int:
        return hash(self.path)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self.path}/{name}", self._children())

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def with_suffix(self, suffix: str) -> "RemotePath":
        return RemotePath(self.fs, f"{self.path.removesuffix(Path(self.name).suffix)}{suffix}", self._listing)

    def glob(self, pattern: str) -> list["RemotePath"]:
        """Files and folders right inside whose names match."""
        return [self / name for name in self._children() if fnmatchcase(name, pattern)]

    def is_dir(self) -> bool:
        return bool(self._children())

    def is_file(self) -> bool:
        return (self._listing or {}).get(self.name, {}).get("type") == "file"

    exists = is_file  # of files alone: object stores have no empty folders

    def stat(self) -> SimpleNamespace:
        if not self.is_file():
            raise FileNotFoundError(str(self))
        return SimpleNamespace(st_size=self._listing[self.name]["size"])

    def read_text(self, encoding: str = "utf-8") -> str:
        return open_file(self).pread(self.stat().st_size, 0).decode(encoding)

    def _children(self) -> dict[str, dict]:
        """The files and folders inside, by name; none if there is no such folder."""
        if not hasattr(self, "_inside"):
            try:
                entries = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                entries = []
            except Exception as error:  # every backend has exceptions of its own
                raise UserError(f"{self} cannot be listed ({type(error).__name__}: {error}).") from error
            self._inside = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}
        return self._inside


AnyPath = Union[Path, RemotePath]


def location(name: "str | os.PathLike[str] | RemotePath") -> AnyPath:
    """The folder of that name: a Path, or for a URL a RemotePath.

    Raises:
        UserError: a URL of a kind that is not known here, or whose package is not installed.
    """
    if isinstance(name, RemotePath) or "://" not in os.fspath(name):
        return name if isinstance(name, RemotePath) else Path(name)
    try:
        import fsspec

        return RemotePath(*fsspec.core.url_to_fs(os.fspath(name)))
    except (ImportError, ValueError) as error:
        raise UserError(f"{name} cannot be opened: {' '.join(str(error).split())}") from error


class LocalFile:
    """A descriptor that lives as long as somebody uses it; a cache may let go of it while another thread reads."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def pread(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`; none at the end of the file. Raises OSError."""
        return os.pread(self.descriptor, count, offset)


class RemoteFile:
    """A file behind a URL, each read a range request."""

    def __init__(self, path: RemotePath):
        self.path, self.size = path, path.stat().st_size

    def pread(self, count: int, offset: int) -> bytes:
        end = min(offset + count, self.size)
        try:
            return self.path.fs.cat_file(self.path.path, start=offset, end=end) if offset < end else b""
        except Exception as error:  # every backend has exceptions of its own
            raise OSError(f"{type(error).__name__}: {error}") from error


def open_file(path: AnyPath) -> "LocalFile | RemoteFile":
    """Open for reads by range. Raises OSError."""
    return RemoteFile(path) if isinstance(path, RemotePath) else LocalFile(path)


def copy_folder(source: AnyPath, target: Path) -> None:
    """Copy a folder of a few small files, or one file, into the local folder `target`; nothing if it is not there."""
    for file in source.glob("*") if source.is_dir() else [source] if source.is_file() else []:
        target.mkdir(parents=True, exist_ok=True)
        if isinstance(file, RemotePath):
            file.fs.get_file(file.path, str(target / file.name))
        elif file.is_file() and not _same(file, target / file.name):  # a kill while copying harms no whole copy
            shutil.copy2(file, target / file.name)


def _same(a: Path, b: Path) -> bool:
    return b.is_file() and filecmp.cmp(a, b, shallow=False)
