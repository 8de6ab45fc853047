"""The processes of a run: started and watched over on one machine, and ended together, with one line.

Without srun or torchrun a run on several devices is this program once more for each of them, under a supervisor that
passes signals on and ends when they have. However they were started: of the errors that ranks end with, the first alone
is told, since the others follow from it.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event, Lock, Thread
from typing import NoReturn

import torch.distributed as dist

from lit_gpt.errors import UserError
from lit_gpt.training.leaving import EXIT_CODE, SIGNALS

GRACE = 10.0
"""Seconds in which ranks end by themselves after one has failed."""
LAST = 60.0
"""Seconds in which they do after one has ended well, or left: they all meet before that, unless one is stuck."""
FIRST_ERROR = "first error"
"""Where the store keeps `<rank> <exit code>` of the rank that failed first."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def supervise(command: list[str], nodes: int, devices: int) -> int:
    """Run `command` as ranks 0 ... devices - 1 of this node; returns the exit code for all of them.

    Signals to the supervisor reach each rank once: a terminal's Ctrl-C too, as the ranks are sessions of their own. A
    rank that fails ends the others. If the supervisor is killed, so are they.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0"}
    environment = {**shared, **os.environ, "WORLD_SIZE": str(nodes * devices)}
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # the ranks ignore it too, then
    before = {n: signal.signal(n, pass_on) for n in PASSED_ON if n != signal.SIGHUP or not nohup}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes to a rank waits until it can hear it
    try:
        for i in range(devices):
            own = {**environment, "LOCAL_RANK": str(i)}
            bond = partial(_die_with, os.getpid())
            ranks.append(subprocess.Popen(command, env=own, start_new_session=True, preexec_fn=bond))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return _exit_code(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _exit_code(ranks: list[subprocess.Popen]) -> int:
    """Wait until all have ended, or one has and the others had time to; the first failure counts."""
    failed, deadline = None, math.inf
    while True:
        codes = [rank.poll() for rank in ranks]
        if deadline == math.inf and codes.count(None) < len(codes):
            deadline = time.monotonic() + LAST
        if failed is None:
            failed = next((i for i, code in enumerate(codes) if code not in (None, 0, EXIT_CODE)), None)
            if failed is not None:
                told = codes[failed] in (1, 2)  # and not ended by a signal: then the others have nothing to add
                deadline = time.monotonic() + GRACE * told
                if codes[failed] < 0:
                    name = signal.Signals(-codes[failed]).name
                    print(f"error: rank {failed} of this machine was ended by {name}.", file=sys.stderr, flush=True)
        if None not in codes or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if failed is None and None in codes:
        text = f"rank {codes.index(None)} of this machine had not ended {LAST:.0f} seconds after another: killed."
        print(text, file=sys.stderr, flush=True)
    code = max(code for code in codes if code is not None) if failed is None else codes[failed]
    return code if code >= 0 else 128 - code


def _die_with(parent: int) -> None:
    """In a child, before it becomes the command: ask Linux for SIGKILL once the parent is gone."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)


@contextmanager
def ending_together() -> Iterator[None]:
    """Around all that the ranks do: when one fails, all end, within seconds and with its exit code, and it alone says
    why. With several ranks, the end of this is the end of the process.

    The ranks watch for the first error in the store that they all met at, since whoever waits for a failed rank in a
    collective may wait for long.
    """
    if not dist.is_initialized():
        yield
        return
    if dist.get_world_size() == 1:
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    store, done, ending = dist.distributed_c10d._get_default_store(), Event(), Lock()
    watcher = Thread(target=_watch_for_errors, args=(store, done, ending), daemon=True)
    watcher.start()
    code = 0
    try:
        yield
    except (Exception, SystemExit) as error:
        code, told = 1, traceback.format_exc()
        if isinstance(error, UserError):
            code, told = 2, f"error: {error}"
        elif isinstance(error, (SystemExit, BrokenPipeError)):  # 75 is for all ranks; else rich or print, of this
            code = getattr(error, "code", 1)
            told = "error: nobody reads any more what this run prints. Send it to a file."
        if code not in (0, EXIT_CODE):
            ending.acquire()  # for good: the watcher leaves the rest to us
            with suppress(RuntimeError, OSError):  # the store is gone with a rank that was killed; or stderr
                mine = f"{dist.get_rank()} {code}"
                if store.compare_set(FIRST_ERROR, "", mine).decode() == mine:
                    print(told, file=sys.stderr, flush=True)
            _end(store)
    done.set()
    watcher.join()
    dist.barrier()  # nobody asks the store any more when its keeper leaves
    dist.destroy_process_group()
    _exit(code)


def _watch_for_errors(store: dist.Store, done: Event, ending: Lock) -> None:
    """Until `done`, look for an error of another rank, and end this one if there is."""
    with suppress(RuntimeError):
        while not done.wait(1.0):
            if store.check([FIRST_ERROR]):
                ending.acquire()
                _end(store)


def _end(store: dist.Store) -> NoReturn:
    """Leave with the exit code of the first error; the first rank, which may be the keeper of the store, last."""
    code = 1
    with suppress(RuntimeError):
        code = int(store.get(FIRST_ERROR).split()[1])
        ended, deadline = store.add("ended", 1), time.monotonic() + GRACE / 2
        while dist.get_rank() == 0 and ended < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            ended = store.add("ended", 0)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Leave at once: Python's own end now and then aborts, as gloo's threads still live while it takes itself down."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
