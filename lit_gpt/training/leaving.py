"""Leaving early and well.

- SIGTERM, SIGUSR1, SIGINT and --time_limit, on any rank, end the run within a step or a validation block.
- All ranks agree on when: each votes in a reduction of every step, and all read its outcome at the same step.
- The run saves a checkpoint, says how to go on, and exits with EXIT_CODE. A second signal exits at once.
"""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Optional

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.training.delayed import DelayedRead, mean_over_ranks

EXIT_CODE = os.EX_TEMPFAIL  # 75: run the same command to go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REASONS = (*(s.name for s in SIGNALS), "the time limit")
SAME_SIGNAL = 0.2  # seconds within which a signal that comes twice was sent once: `timeout` tells process and group
DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(duration: str) -> int:
    """Seconds of a duration such as 1d12h, 3h30m, 45m or 90s. Raises UserError if it is of no such form."""
    match = DURATION.fullmatch(duration)
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1))) if match else 0
    if not seconds:
        raise UserError(f"--time_limit should be a duration such as 3h30m, 45m or 1d12h, not {duration!r}.")
    return seconds


class Leaving:
    """Hears signals and the clock on this rank while it is entered, and knows what all ranks agreed on.

    A thread listens, not the main one, which may be waiting inside a collective when a second signal comes.

    Attributes:
        agreed: why all ranks leave, once they know it.
    """

    def __init__(self, seconds: Optional[int] = None):
        """seconds: the time limit, from now on."""
        self.agreed: Optional[str] = None
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._heard: Optional[str] = None

    def __enter__(self) -> "Leaving":
        self._pipe, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handlers = {s: signal.signal(s, lambda number, frame: None) for s in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: Optional[type], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)  # which ends the thread
        self._thread.join()
        os.close(self._pipe)

    def votes(self, device: torch.device) -> Tensor:
        """[len(REASONS)]: 1 at the reason for which this rank wants to leave, else 0."""
        votes = torch.zeros(len(REASONS), device=device)
        reason = self._heard
        if reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            reason = "the time limit"
        if reason is not None:
            votes[REASONS.index(reason)] = 1
        return votes

    def count(self, votes: list[float]) -> Optional[str]:
        """Take the reduced votes of all ranks as agreed; returns the reason to leave, if there is one."""
        voted = (reason for reason, share in zip(REASONS, votes) if share > 0)
        self.agreed = self.agreed or next(voted, None)
        return self.agreed

    def ask(self, device: torch.device) -> Optional[str]:
        """Ask all ranks now, and wait for the answer."""
        return self.count(mean_over_ranks(self.votes(device)).tolist())

    def farewell(self, step: int, folder: Path) -> str:
        """What happened, where everything is and how to go on, in one line."""
        saved = (
            f"everything is saved in {folder / 'checkpoints' / f'step-{step:08d}'}" if step else "nothing to save yet"
        )
        return f"left on {self.agreed} after step {step:,}: {saved}. The same command goes on from there."

    def _listen(self) -> None:
        while content := os.read(self._pipe, 1):
            number, now = content[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if self._heard is None:
                self._heard, first = signal.Signals(number).name, now
            elif now - first > SAME_SIGNAL:
                print(f"{signal.Signals(number).name} again: exiting at once.", file=sys.stderr, flush=True)
                os._exit(128 + number)


class Poll:
    """Asks all ranks again and again without waiting: each answer is that to the question before."""

    def __init__(self, leaving: Leaving, device: torch.device):
        self.leaving, self.device, self._answers = leaving, device, DelayedRead()

    def ask(self) -> Optional[str]:
        self._answers.post(mean_over_ranks(self.leaving.votes(self.device)))
        return self.leaving.count(self._answers.take()) if len(self._answers) > 1 else None
