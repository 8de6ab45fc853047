"""SIGKILL at random instants, again and again: nothing that was saved is lost, nothing is left behind, and the losses
are those of a run that nobody disturbed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.training.checkpoint_manifest import complete_checkpoints, damage
from tests.runs import command_line, files_in, forks, losses, train_quietly

ROOT = Path(__file__).resolve().parents[2]
KILLS = 50
KILLS_IN_A_RUN = 6
"""Then it is left to finish, and another run begins."""
FLAGS = {"save_step_interval": 2, "keep_checkpoints": 2, "total_tokens": 80 * 128}


def leftovers(folder: Path) -> list[str]:
    return [name for name in files_in(folder) if name.endswith(".tmp")] if folder.is_dir() else []


def check_what_is_there(folder: Path) -> None:
    """After a kill: whatever has the name of a checkpoint is one, from its first to its last byte."""
    for path in complete_checkpoints(folder / "checkpoints"):
        assert damage(path) is None, path


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in complete_checkpoints(folder / "checkpoints")), default=0)


@pytest.mark.slow
def test_a_run_survives_kills_at_any_instant(tmp_path, tiny_corpus, tiny_model):
    def start(root: Path):
        process = forks().Process(target=train_quietly, args=(command_line(tiny_corpus, tiny_model, root, **FLAGS),))
        process.start()
        return process

    undisturbed = tmp_path / "undisturbed" / "outputs" / "debug_test"
    start(tmp_path / "warm").join(120)
    began = time.perf_counter()
    process = start(tmp_path / "undisturbed")
    process.join(120)
    duration = time.perf_counter() - began
    assert process.exitcode == 0

    kills = during_saves = episodes = 0
    reached = []
    while kills < KILLS:
        root = tmp_path / f"episode {episodes}"
        folder = root / "outputs" / "debug_test"
        episodes += 1
        for i in range(KILLS_IN_A_RUN):
            process, before = start(root), newest_step(folder)
            if i % 2:  # in the middle of a save, which takes a few milliseconds
                deadline = time.perf_counter() + 60
                skip = random.randrange(4)  # saves to let pass
                while process.is_alive() and time.perf_counter() < deadline:
                    if newest_step(folder) >= before + 2 * skip and list(folder.glob("checkpoints/.step-*.tmp")):
                        break
                time.sleep(random.uniform(0, 0.004))
            else:  # anywhere
                process.join(random.uniform(0, duration / 2))
            process.kill()
            process.join(60)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            during_saves += any("checkpoints/.step-" in name for name in leftovers(folder))
            check_what_is_there(folder)
            assert newest_step(folder) >= before  # nothing that was saved is gone
            reached.append(newest_step(folder))
        process = start(root)
        process.join(120)
        assert process.exitcode == 0
        assert losses(folder) == losses(undisturbed)
        assert leftovers(folder) == [] and files_in(folder) == files_in(undisturbed)
        shutil.rmtree(root)
    print(f"{kills} kills, {during_saves} of them during a save, in {episodes} runs; newest checkpoints {reached}")
    assert during_saves >= KILLS // 6 and len(set(reached)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_survive_the_kill_of_either_or_both(strategy, tmp_path, tiny_corpus, tiny_model):
    def command(root: Path) -> list[str]:
        flags = {**FLAGS, "total_tokens": 40 * 128, "devices": 2, "strategy": strategy}
        return [sys.executable, str(ROOT / "pretrain.py"), *command_line(tiny_corpus, tiny_model, root, **flags)]

    def start(root: Path) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command(root), env=environment, **quiet)

    def ranks_of(supervisor: subprocess.Popen) -> list[int]:
        children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    undisturbed, folder = (tmp_path / name / "outputs" / "debug_test" for name in ("undisturbed", "killed"))
    assert start(tmp_path / "undisturbed").wait(120) == 0
    for victim in ("rank 0", "rank 1", "supervisor"):
        process, before = start(tmp_path / "killed"), newest_step(folder)
        deadline = time.perf_counter() + 60
        while time.perf_counter() < deadline and process.poll() is None:
            if newest_step(folder) >= before + 6 and list(folder.glob("checkpoints/.step-*.tmp")):
                break
        ranks = ranks_of(process)
        assert len(ranks) == 2, "the run ended before it could be killed"
        os.kill(process.pid if victim == "supervisor" else ranks[int(victim[-1])], signal.SIGKILL)
        assert process.wait(60) != 0
        deadline = time.perf_counter() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.perf_counter() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        check_what_is_there(folder)
        assert newest_step(folder) >= before + 6
    assert start(tmp_path / "killed").wait(120) == 0
    assert losses(folder) == losses(undisturbed)
    assert files_in(folder) == files_in(undisturbed)
