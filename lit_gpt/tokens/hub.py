"""Datasets of the Hugging Face hub as a source: resolved to a commit, fetched file by file while units are prepared.

- A subset is a folder of the repository, found as FineWeb-Edu names them: `sample-10BT` lies in `sample/10BT`,
  `CC-MAIN-2024-10` in `data/CC-MAIN-2024-10` (older revisions: at the root), `default` is `data`, or everything.
- The commit, and every file's size and SHA-256, are noted at the first run. A rerun takes the same, and asks the hub
  for nothing but the files it still needs.
- A file is fetched while the one before it is tokenized, checked against its SHA-256, and deleted when its last unit is
  done: the disk holds about two files of the source at a time. A connection that breaks continues where it was; after
  a kill the file that was arriving is fetched again.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import HfApi, errors, hf_hub_download
from huggingface_hub.utils import disable_progress_bars

from lit_gpt.errors import UserError
from lit_gpt.files import sha256_of_file
from lit_gpt.tokens.sources import RECORD_SUFFIXES, Unit, record_units

DOWNLOADS = "downloads"  # folder inside the output, gone when the corpus is finished
NAMED = 6  # subsets that an error message lists


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset. `sha256` is None for the small ones that the hub keeps in git itself."""

    path: str
    size: int
    sha256: Optional[str]


@dataclass(frozen=True)
class Listing:
    """The files of a subset at one commit, in order. `asked` is the revision that was resolved to it, None for none."""

    dataset: str
    subset: str
    asked: Optional[str]
    commit: str
    files: tuple[HubFile, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "files": [asdict(file) for file in self.files]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Listing":
        return cls(**{**content, "files": tuple(HubFile(**file) for file in content["files"])})


def is_hub_name(source: str) -> bool:
    """Whether `source` can only mean a dataset of the hub: owner/name, and nothing of that name on this disk."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).exists()


def resolve(dataset: str, subset: str, revision: Optional[str]) -> Listing:
    """Ask the hub for the files of a subset. `revision`: branch, tag or commit; None is the newest.

    Raises:
        UserError: no connection, no such dataset, revision or subset, or no access to it.
    """
    api = HfApi()
    with _explained(dataset):
        commit = api.dataset_info(dataset, revision=revision).sha

        def entries(folder: Optional[str], recursive: bool) -> list[Any]:
            try:
                tree = api.list_repo_tree(dataset, folder, recursive=recursive, revision=commit, repo_type="dataset")
                return list(tree)
            except errors.EntryNotFoundError:
                return []

        for folder in _folders(subset):
            found = [entry for entry in entries(folder, recursive=True) if entry.path.endswith(RECORD_SUFFIXES)]
            if found:
                files = [HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in found]
                return Listing(dataset, subset, revision, commit, tuple(sorted(files, key=lambda file: file.path)))
        top = {entry.path for entry in entries(None, recursive=False) if not hasattr(entry, "size")}
        inside = [entry.path for name in ("data", "sample") if name in top for entry in entries(name, recursive=False)]
    names = [name.removeprefix("data/").replace("sample/", "sample-") for name in inside] or sorted(top)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise UserError(
        f"dataset {dataset} has no subset {subset} with .parquet or .jsonl files. --subset may be one of: "
        f"{', '.join(names[:NAMED]) or 'none'}{more}."
    )


def _folders(subset: str) -> list[Optional[str]]:
    """Where the files of a subset may lie, likeliest first; None is the whole repository."""
    if subset == "default":
        return ["data", None]
    return [f"data/{subset}", subset, subset.replace("-", "/", 1)]


def download(listing: Listing, file: HubFile, folder: Path) -> None:
    """Fetch one file to `folder/file.path`, continuing what an earlier run had of it.

    Raises:
        UserError: the connection fails, or what arrived is not what the listing says.
    """
    disable_progress_bars()
    with _explained(listing.dataset):
        path = hf_hub_download(
            listing.dataset, file.path, repo_type="dataset", revision=listing.commit, local_dir=folder
        )
    path = Path(path)
    if path.stat().st_size != file.size or file.sha256 not in (None, sha256_of_file(path)):
        path.unlink()
        raise UserError(f"{file.path} of {listing.dataset} arrived damaged (SHA-256). Run the same command again.")


class HubUnits:
    """The units of a listing, known file by file as these arrive.

    Attributes:
        known: the units of all files that were ever opened, in order.
    """

    def __init__(
        self,
        listing: Listing,
        folder: Path,
        text_column: str,
        unit_bytes: int,
        begun: list[dict[str, Any]],
        note: Callable[[list[dict[str, Any]]], None],
    ):
        """`folder`: of the files. `begun`: what an earlier run noted about its units; `note` hears of new ones."""
        self.listing = listing
        self.folder = folder
        self._text_column = text_column
        self._unit_bytes = unit_bytes
        self._note = note
        self._left: dict[str, int] = {}
        self.known = [
            Unit(number, folder, (entry["file"],), entry["bytes"], entry["signature"], _pair(entry["row_groups"]))
            for number, entry in enumerate(begun)
        ]

    def fetch(self, file: HubFile) -> list[Unit]:
        """Download a file, cut it into units and note them. Files have to come in order the first time."""
        download(self.listing, file, self.folder)
        units = self._known_of(file)
        if not units:
            signature = file.sha256 or f"{file.size} bytes"
            units = record_units(
                self.folder, file.path, self._text_column, self._unit_bytes, signature, first_number=len(self.known)
            )
            self.known += units
            self._note(
                [
                    {
                        "source": unit.source,
                        "file": unit.files[0],
                        "row_groups": unit.row_groups,
                        "bytes": unit.bytes,
                        "signature": unit.signature,
                    }
                    for unit in self.known
                ]
            )
        return units

    def arrivals(self, is_done: Callable[[Unit], bool]) -> Iterator[list[Unit]]:
        """The units that are not done, one file at a time, each fetched when asked for."""
        for file in self.listing.files:
            known = self._known_of(file)
            if known and all(map(is_done, known)):
                continue
            units = [unit for unit in self.fetch(file) if not is_done(unit)]
            self._left[file.path] = len(units)
            yield units

    def release(self, unit: Unit) -> None:
        """A unit is done: delete its file if it was the last one."""
        name = unit.files[0]
        self._left[name] -= 1
        if not self._left[name]:
            (self.folder / name).unlink(missing_ok=True)

    def estimated_bytes(self) -> Optional[int]:
        """Source bytes of all units, as far as the opened files tell; None before the first."""
        opened = {unit.files[0] for unit in self.known}
        size = sum(file.size for file in self.listing.files if file.path in opened)
        total = sum(file.size for file in self.listing.files)
        return round(sum(unit.bytes for unit in self.known) * (total / size)) if size else None

    def _known_of(self, file: HubFile) -> list[Unit]:
        return [unit for unit in self.known if unit.files[0] == file.path]


def _pair(row_groups: Optional[list[int]]) -> Optional[tuple[int, int]]:
    return tuple(row_groups) if row_groups else None


@contextlib.contextmanager
def _explained(dataset: str) -> Iterator[None]:
    """Turn what the hub's client raises, which differs from release to release, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        if isinstance(error, errors.GatedRepoError):
            what = "is gated: ask for access on its page, then log in with `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            what = "is neither a file or folder here nor a dataset of the hub that you can read: check the name"
        elif isinstance(error, errors.RevisionNotFoundError):
            what = "has no such --revision"
        else:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            what = (
                f"is no file or folder here, and the hub cannot be read ({reason.rstrip('.')}). Check the connection "
                "and run the same command again; what is finished is kept"
            )
        raise UserError(f"{dataset} {what}.") from error
