"""The compile cache: what Triton and Inductor compiled, shared by ranks, nodes and restarts.

    python cache.py runs/compile_cache            # what is in it
    python cache.py runs/compile_cache --clear    # empty it

- One folder for all runs below an --output_root; in it, one for each set of versions, driver and GPU.
- Ranks that start cold compile side by side, at worst the same kernel each: that takes no longer than to wait for one
  of them, and needs no lock, which a shared file system may not have and a killed rank would leave behind. It is safe:
  every file is written under another name and renamed, and an entry counts once the list of its files is there.
- `python pretrain.py --warm_up ...` fills it ahead of a run. summary.json tells what a run compiled and what it found.
"""

import argparse
import contextlib
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.files import explain_unwritable

VERSIONS = re.compile(r"torch[^/]+-triton[^/]+-driver[^/]+-sm\d+-[^/]+")
ABANDONED = 3600
"""Seconds after which a temporary folder is taken to be that of a killed process."""


class CompileCache:
    """Makes this process compile into a folder of `root`, and counts what it does. Create it before anything compiles.

    Attributes:
        folder: that of these versions and this GPU.
        compiled, found: kernels that this process compiled, and that it found there.
    """

    def __init__(self, root: Path, capability: tuple[int, int]):
        import triton

        self.folder = root.absolute() / versions(capability)
        self.compiled = self.found = 0
        for name, variable in (("triton", "TRITON_CACHE_DIR"), ("inductor", "TORCHINDUCTOR_CACHE_DIR")):
            with explain_unwritable(root):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(self.folder / name)
        triton.knobs.compilation.listener = self._count

    @property
    def counts(self) -> dict[str, int]:
        return {"kernels_compiled": self.compiled, "kernels_found_compiled": self.found}

    def _count(self, *, cache_hit: bool, **_) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled += 1

    def mend(self) -> None:
        """Remove entries with an empty file, which a loss of power leaves and Triton would trip over for ever, and what
        processes were writing when they were killed.
        """
        for entry in (self.folder / "triton").iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process is at it too
                if any(path.is_file() and path.stat().st_size == 0 for path in entry.iterdir()):
                    shutil.rmtree(entry)
                    continue
                for temporary in entry.glob("tmp.*"):
                    if time.time() - temporary.stat().st_mtime > ABANDONED:
                        shutil.rmtree(temporary)


def versions(capability: tuple[int, int]) -> str:
    """Name of the folder for everything that a compiled kernel depends on besides its source."""
    import triton

    driver = None
    with contextlib.suppress(OSError):
        driver = re.search(r"Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    return "-".join(
        [
            f"torch{torch.__version__}",
            f"triton{triton.__version__}",
            f"driver{driver[1] if driver else 'none'}",
            f"sm{capability[0]}{capability[1]}",
            f"{sys.implementation.cache_tag}-{platform.machine()}",
        ]
    )


@dataclass(frozen=True)
class Section:
    """What one set of versions has in a cache."""

    name: str
    kernels: int
    bytes: int
    written: float
    """When last something was added, in seconds since 1970."""


def sections(root: Path) -> list[Section]:
    """The sections of a cache. Raises UserError if the folder is not one."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    foreign = [path.name for path in root.iterdir() if not VERSIONS.fullmatch(path.name)] if folders else []
    if not folders or foreign:
        what = f"holds {foreign[0]}, so it is not one" if foreign else "is empty or not there"
        raise UserError(f"{root} should be a compile cache, such as <output_root>/compile_cache, but {what}.")
    return [_section(folder) for folder in folders]


def _section(folder: Path) -> Section:
    kernels, size, written = 0, 0, folder.stat().st_mtime
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file of a run that is compiling
            if path.is_file():
                kernels += path.name.startswith("__grp__")
                size += path.stat().st_size
                written = max(written, path.stat().st_mtime)
    return Section(folder.name, kernels, size, written)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the cache, <output_root>/compile_cache")
    parser.add_argument("--clear", action="store_true", help="remove everything in it; not while a run starts")
    args = parser.parse_args()
    found = sections(args.folder)
    console = Console(highlight=False, soft_wrap=True)
    for section in found:
        written = datetime.fromtimestamp(section.written).isoformat(sep=" ", timespec="minutes")
        size = f"{section.kernels:,} kernels, {section.bytes / 1e6:.1f} MB, last written {written}"
        console.print(f"{section.name}: {size}")
        if args.clear:
            shutil.rmtree(args.folder / section.name)
    if args.clear:
        console.print(f"{args.folder} is empty now.")


if __name__ == "__main__":
    main()
