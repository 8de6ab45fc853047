"""Ranks are started together, hear the same signals, and end together with one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.training import ranks

ROOT = Path(__file__).resolve().parents[2]
SUPERVISOR = "import sys; from lit_gpt.training.ranks import supervise; sys.exit(supervise(sys.argv[1:], 1, 2))"
RANK = """
import os, signal, sys, time
import torch.distributed as dist
from lit_gpt.errors import UserError
from lit_gpt.training.ranks import ending_together
rank = int(os.environ["LOCAL_RANK"])
say = lambda word: os.write(1, f"{{word}}\\n".encode())  # in one piece: both ranks write to one pipe
dist.init_process_group("gloo", rank=rank, world_size=2)
with ending_together():
    dist.barrier()
    say("ready")
    {body}
"""


def start(body: str) -> subprocess.Popen:
    """Two ranks that run `body` together."""
    command = [sys.executable, "-c", SUPERVISOR, sys.executable, "-c", RANK.format(body=body)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was said of it."""
    try:
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_rank_ends_all_with_its_line(who):
    code, err = end(start(f"if rank == {who}: raise UserError('the disk of rank {who} is full.')\n    dist.barrier()"))
    assert (code, err) == (2, f"error: the disk of rank {who} is full.\n")


def test_an_error_of_all_ranks_is_told_once():
    code, err = end(start("raise UserError('no such corpus.')"))
    assert (code, err) == (2, "error: no such corpus.\n")


@pytest.mark.slow
def test_ranks_that_wait_for_no_collective_end_too_and_a_bug_shows_its_traceback_once():
    began = time.monotonic()
    code, err = end(start("1 / (1 - rank)\n    time.sleep(50)"))
    assert code == 1 and err.count("Traceback") == err.count("ZeroDivisionError") == 1
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("printing", ["rich.print('x', flush=True)", "print('x', flush=True)"])
def test_a_rank_whose_output_nobody_reads_ends_all(printing):
    """rich exits then, print raises, while the other rank waits for this one."""
    process = start(f"import rich; rank or time.sleep(1); rank or {printing}; time.sleep(50)")
    assert "ready\n" in iter(process.stdout.readline, "")
    process.stdout.close()
    began = time.monotonic()
    code, err = process.wait(60), process.stderr.read()
    assert code == 1 and err == "error: nobody reads any more what this run prints. Send it to a file.\n"
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_leaving_early_is_the_exit_code_of_all(number):
    listen = f"heard = []; signal.signal({number:d}, lambda *_: heard.append(1)); "
    listen += f"signal.pthread_sigmask(signal.SIG_UNBLOCK, [{number:d}]); dist.barrier()\n"
    body = listen + "    say('hears'); time.sleep(3); assert heard == [1]\n    sys.exit(75 if rank else 0)"
    process = start(body)
    assert "hears\n" in iter(process.stdout.readline, "")
    process.send_signal(number)
    assert end(process) == (75, "")


def test_a_frozen_rank_is_not_waited_for_when_the_other_has_left(monkeypatch, capfd):
    monkeypatch.setattr(ranks, "LAST", 0.5)
    rank = "import os, signal; os.environ['LOCAL_RANK'] == '1' or os.kill(os.getpid(), signal.SIGSTOP); os._exit(75)"
    assert ranks.supervise([sys.executable, "-c", rank], 1, 2) == 75
    assert "rank 0 of this machine had not ended" in capfd.readouterr().err


def test_what_nohup_has_it_ignore_ends_no_rank():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("say('waits'); time.sleep(1)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "waits\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGHUP)
    assert end(process) == (0, "")


@pytest.mark.parametrize("victim", ["rank", "supervisor"])
def test_a_kill_leaves_nobody_behind(victim):
    process = start("say(os.getpid()); time.sleep(50)")
    lines = filter(str.isdigit, map(str.strip, iter(process.stdout.readline, "")))
    pids = [int(next(lines)), int(next(lines))]
    os.kill(pids[1] if victim == "rank" else process.pid, signal.SIGKILL)
    code, err = end(process)
    if victim == "rank":
        assert code == 128 + signal.SIGKILL and "of this machine was ended by SIGKILL." in err
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
