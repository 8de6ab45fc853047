"""Reports a hang, with the stacks of every rank.

Each rank watches itself by a thread, so it works while the main one waits inside a collective, and needs nobody else.
SIGQUIT (Ctrl-\\) prints the stacks of a process at any time.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Optional

PATIENCE = 3  # how much longer than a step may the first step, an evaluation block or a save take
GRACE = 10.0  # seconds for which a rank that noticed a hang stays, as its end would fail those that are about to


class Watch:
    """Watches this rank while it is entered; `beat` says that it is alive.

    Args:
        path: where the stacks go.
        exit_code: what to end with at a hang, unless there is life again within GRACE; None goes on watching.
    """

    def __init__(self, path: Path, rank: int, minutes: float, exit_code: Optional[int]):
        self.path, self.rank, self.minutes, self.exit_code = path, rank, minutes, exit_code
        self._ended = threading.Event()
        self.beat(PATIENCE)

    def beat(self, patience: float = 1) -> None:
        """Something was done; the next may take `patience` times hang_minutes."""
        self._limit = 60 * self.minutes * patience
        self._last, self._reported = time.monotonic(), False

    def __enter__(self) -> "Watch":
        if self.minutes:
            self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._thread.start()
        faulthandler.register(signal.SIGQUIT, file=sys.__stderr__, all_threads=True)
        return self

    def __exit__(self, kind: Optional[type], error: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        faulthandler.unregister(signal.SIGQUIT)
        if not isinstance(error, RuntimeError):  # what a collective raises when it loses a rank: to the same hang
            self._reported = False
        if self._reported and self.exit_code is not None:
            traceback.print_exception(error)
        self._ended.set()
        if self.minutes:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, 6 * self.minutes)):
            silent = time.monotonic() - self._last
            if silent > self._limit and not self._reported:
                self._reported = True
                self._report(silent)
                if self.exit_code is not None:
                    self._ended.wait(min(GRACE, self._limit))
                    if self._reported:
                        os._exit(self.exit_code)

    def _report(self, silent: float) -> None:
        where = f"in {self.path}"
        try:
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "a") as file:
                now = datetime.now().isoformat(sep=" ", timespec="seconds")
                file.write(f"{now}  rank {self.rank}, process {os.getpid()}: nothing done for {silent:.0f} seconds\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError:  # the disk may be what it hangs on
            where = "printed above"
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        text = f"rank {self.rank}: nothing done for {silent:.0f} seconds; the stacks of its threads are {where}"
        if self.exit_code is not None:
            text += ". Exiting, if it lasts: the same command goes on from the newest checkpoint"
        print(f"{text}.", file=sys.stderr, flush=True)
