"""Hearing signals and the clock."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.training.leaving import Leaving, Poll, seconds_of

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, seconds", [("3h30m", 12600), ("45m", 2700), ("1d12h", 129600), ("90s", 90), ("1d1h1m1s", 90061)]
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1h-3m", "3 h", "30m3h", "0m", "1.5h", "h", "03:30:00"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UserError, match="3h30m"):
        seconds_of(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_heard_and_nothing_is_left_behind(number):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with Leaving() as leaving:
        assert leaving.ask(CPU) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as `timeout` does: still the same signal
        time.sleep(0.05)
        assert leaving.ask(CPU) == number.name == leaving.agreed
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_time_limit_and_polls_that_answer_one_question_late():
    with Leaving(1) as leaving:
        poll = Poll(leaving, CPU)
        assert poll.ask() is None and poll.ask() is None
        time.sleep(1.05)
        assert poll.ask() is None and poll.ask() == "the time limit"


def test_a_second_signal_ends_a_process_that_is_stuck():
    """The main thread waits where Python runs no signal handler: in a collective whose other rank never comes."""
    program = (
        "import datetime, torch.distributed as dist\n"
        "from lit_gpt.training.leaving import Leaving\n"
        "with Leaving():\n"
        "    print('ready', flush=True)\n"
        "    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "    store.wait(['never'], datetime.timedelta(seconds=60))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert err == "SIGINT again: exiting at once.\n"
