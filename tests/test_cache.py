"""The compile cache, with kernels that Triton really compiles, for a GPU that need not be here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cache
from lit_gpt.errors import UserError

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cache import CompileCache

@triton.jit
def scale(x, y, n, factor: tl.constexpr):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(y + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)

compiled = CompileCache(Path(sys.argv[1]), (9, 0))
print("ready", flush=True)
sys.stdin.readline()
for factor in range(4):
    source = ASTSource(scale, {"x": "*fp32", "y": "*fp32", "n": "i32", "factor": "constexpr"}, {(3,): factor})
    triton.compile(source, GPUTarget("cuda", 90, 32))
print(compiled.compiled, compiled.found)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that, told to, compiles four kernels into a cache."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def make() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, program, tmp_path / "cache"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield make
    for process in started:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen) -> tuple[int, int]:
    """Kernels that it compiled and found, after a go if it has not had one."""
    out, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0
    compiled, found = out.split()
    return int(compiled), int(found)


def test_processes_at_once_share_a_cold_cache_and_the_next_start_compiles_nothing(start, tmp_path, capsys, monkeypatch):
    processes = [start(), start()]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [finish(process) for process in processes]
    assert all(compiled + found == 4 for compiled, found in counts) and sum(c for c, _ in counts) >= 4
    assert finish(start()) == (0, 4)
    (section,) = cache.sections(tmp_path / "cache")
    assert section.kernels == 4 and section.bytes > 10_000 and "sm90" in section.name
    assert not list((tmp_path / "cache").rglob("tmp.*"))

    monkeypatch.setattr(sys, "argv", ["cache.py", str(tmp_path / "cache")])
    cache.main()
    shown = capsys.readouterr().out
    assert re.fullmatch(r"torch\S+-sm90-\S+: 4 kernels, 0\.\d MB, last written [\d: -]+\n", shown)
    monkeypatch.setattr(sys, "argv", ["cache.py", str(tmp_path / "cache"), "--clear"])
    (tmp_path / "cache" / "novel.txt").write_text("not ours")
    with pytest.raises(SystemExit) as stop:
        cache.main()
    assert stop.value.code == 2 and "novel.txt" in capsys.readouterr().err
    (tmp_path / "cache" / "novel.txt").unlink()
    cache.main()
    assert not list((tmp_path / "cache").iterdir())


def test_a_kill_and_a_loss_of_power_are_mended(start, tmp_path, monkeypatch):
    victim = start()
    victim.stdin.write("\n")
    victim.stdin.flush()
    entries = tmp_path / "cache" / cache.versions((9, 0)) / "triton"
    deadline = time.monotonic() + 60
    while not list(entries.glob("*/*.ttir")) and time.monotonic() < deadline:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    compiled, found = finish(start())
    assert compiled >= 1 and compiled + found == 4
    emptied = next(entries.glob("*/*.cubin"))
    emptied.write_bytes(b"")  # renamed, but never on the disk
    abandoned = next(entries.iterdir()) / "tmp.pid_1_x"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    cache.CompileCache(tmp_path / "cache", (9, 0)).mend()
    assert not emptied.exists() and not abandoned.exists()
    assert finish(start()) == (1, 3)


@pytest.mark.parametrize("missing", [True, False])
def test_another_folder_is_not_taken_for_a_cache(missing, tmp_path):
    if not missing:
        (tmp_path / "data" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="compile cache"):
        cache.sections(tmp_path / "data")
