"""Guards of every step, decided on the device and the same on all ranks.

- A loss or gradient that is not finite: the optimizer leaves the step out, on every rank. The position and the schedule
  go on as after any step.
- A spike, of loss or gradient norm, far above what they ran at: told, and with --skip_spikes left out likewise.
- What is left out is counted, its batch kept for scripts/replay_batch.py, and too many in a row end the run.

The host never waits: one reduction carries loss, gradient norm and votes to leave; the optimizer reads the decision on
the device (`found_inf` of fused AdamW); the host reads it one step later, or at once where it has to log or save.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.args import SafetyArgs
from lit_gpt.training.delayed import DelayedRead, mean_over_ranks
from lit_gpt.training.leaving import Leaving
from lit_gpt.training.plan import Plan
from lit_gpt.training.records import Records
from lit_gpt.training.replay import KeptBatch


class SpikeDetector:
    """Running mean and deviation of log loss and log gradient norm, as tensors [2] on the device.

    Exponential averages over about HORIZON steps, the mean over fewer so that it follows a loss that falls; plain ones
    during the first HORIZON steps, which are not judged. A value counts as at most OUTLIER deviations from the mean:
    one spike moves the averages little, a lasting change moves them slowly. A deviation counts as FLOOR at least, so
    that a calm run does not make a spike of a ripple.

    Attributes:
        state: [3, 2]: count, mean and variance.
    """

    HORIZON, MEAN_HORIZON = 128, 32
    OUTLIER = 3.0
    FLOOR = (0.01, 0.1)  # of the logs of loss and gradient norm: with 6 deviations, 6% and 80% above the mean

    def __init__(self, deviations: float, device: torch.device):
        self.deviations = deviations
        self.state = torch.zeros(3, 2, device=device)
        self._floor = torch.tensor(self.FLOOR, device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the step is a spike, and the deviations [2] of its log loss and log gradient norm.

        Then takes them into the averages, unless they are not finite.
        """
        count, mean, variance = self.state
        values = torch.stack([loss, grad_norm]).clamp(min=1e-12).log()
        deviation = variance.sqrt().maximum(self._floor)
        known = count >= self.HORIZON
        scores = (values - mean) / deviation
        spike = finite & (known & (scores > self.deviations)).any()

        counted = torch.where(known, mean + (scores.clamp(-self.OUTLIER, self.OUTLIER)) * deviation, values)
        moved = counted - mean
        mean = mean + moved * (1 / (count + 1)).clamp(min=1 / self.MEAN_HORIZON)
        weight = (1 / (count + 1)).clamp(min=1 / self.HORIZON)
        variance = (1 - weight) * (variance + weight * moved**2)
        after = torch.stack([count + 1, mean, variance])
        self.state = torch.where(finite, after, self.state)
        return spike, scores


class Verdict(NamedTuple):
    """What the host learns of a step. Loss and gradient norm are means over the ranks."""

    step: int
    loss: float
    grad_norm: float
    finite: bool
    spike: bool
    skipped: bool


class Recent:
    """An iterator of batches that remembers the last `size` it gave out, so that a step can be looked at later."""

    def __init__(self, batches: Iterator[Batch], size: int):
        self._batches = batches
        self.kept: deque[Batch] = deque(maxlen=size)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.kept.append(batch)
        return batch

    def __iter__(self) -> "Recent":
        return self

    def close(self) -> None:
        self._batches.close()


class Guard:
    """Judges every step, and keeps account.

    Attributes:
        skipped, spikes: steps of the run so far that were left out, and that were spikes.
        in_a_row: how many steps up to the last were left out as not finite.
    """

    def __init__(self, fabric: Fabric, args: SafetyArgs, plan: Plan, leaving: Leaving, records: Records):
        self.fabric, self.args, self.plan, self.leaving, self.records = fabric, args, plan, leaving, records
        self.skipped = self.spikes = self.in_a_row = 0
        self._detector = SpikeDetector(args.spike_deviations, fabric.device)
        self._reports = DelayedRead()
        self._read: Optional[Verdict] = None
        self._steps: deque[int] = deque()

    def remember(self, batches: Iterator[Batch]) -> Recent:
        """The same batches, the last two steps of which the guard can look up."""
        self.batches = Recent(batches, 2 * self.plan.accumulation)
        return self.batches

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Decide on the device whether `optimizer`, at its next step, does anything.

        Args:
            loss: mean over this rank's sequences.
            grad_norm: norm of the gradient of the global batch before it was clipped.
        """
        report = torch.cat([torch.stack([loss, grad_norm]).float(), self.leaving.votes(loss.device)])
        report = mean_over_ranks(report)
        loss, grad_norm = report[:2]
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        spike, scores = self._detector.judge(loss, grad_norm, finite)
        skip = ~finite | spike if self.args.skip_spikes else ~finite
        optimizer.found_inf = skip.float()
        self._steps.append(step)
        self._reports.post(torch.cat([torch.stack([finite, spike, skip]).float(), scores, report]))

    def settle(self, wait: bool) -> Optional[Verdict]:
        """Act on what is known of the steps so far: up to the one before the last, or the last if `wait`.

        Returns the newest verdict.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        while len(self._reports) > (0 if wait else 1):
            finite, spike, skipped, loss_score, norm_score, loss, grad_norm, *votes = self._reports.take()
            verdict = Verdict(self._steps.popleft(), loss, grad_norm, bool(finite), bool(spike), bool(skipped))
            self.leaving.count(votes)
            self.skipped += verdict.skipped
            self.spikes += verdict.spike
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if verdict.skipped or verdict.spike:
                self._report(verdict, loss_score, norm_score)
            if self.in_a_row >= self.args.max_skipped_in_a_row:
                raise UserError(
                    f"{self.in_a_row} steps in a row, up to step {verdict.step}, had a loss or gradient that is not "
                    f"finite and were skipped. Checkpoints are as they were. Lower --learning_rate, or look at a "
                    f"batch: python scripts/replay_batch.py {self.plan.folder} {self._dump_path(verdict.step)}"
                )
            self._read = verdict
        return self._read

    @property
    def counts(self) -> dict:
        return {"skipped_steps": self.skipped, "spikes": self.spikes}

    def state_dict(self) -> dict:
        """All that later decisions depend on, and the counts, for a checkpoint's meta.json. Settle first."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
            "averages": self._detector.state.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint's account; from {}, of a checkpoint without one, from nothing."""
        if state:
            self.skipped, self.spikes, self.in_a_row = state["skipped"], state["spikes"], state["in_a_row"]
            self._detector.state = torch.tensor(state["averages"], device=self.fabric.device)

    def _report(self, verdict: Verdict, loss_score: float, norm_score: float) -> None:
        reason = "spike" if verdict.finite else "not finite"
        record = {"step": verdict.step, "tokens": self.plan.tokens_after(verdict.step)}
        record |= {"event": reason, "skipped": verdict.skipped}
        text = f"step {verdict.step:>7,}  {reason}: loss {verdict.loss:.4f}, gradient norm {verdict.grad_norm:.3f}"
        if verdict.finite:
            record |= {"at_loss": verdict.loss, "at_grad_norm": verdict.grad_norm}
            record |= {"deviations": [round(loss_score, 2), round(norm_score, 2)]}
            text += f", {loss_score:.1f} and {norm_score:.1f} deviations above their running means"
        if verdict.skipped:
            path = self._dump_path(verdict.step)
            text += ". Skipped on all ranks; its batch "
            try:
                self._dump(path, verdict)
                text += f"is in {path}"
            except OSError as error:  # a full disk: training goes on
                text += f"could not be kept: {error.strerror or error}"
        self.records.note(record, text)

    def _dump_path(self, step: int) -> Path:
        return self.plan.folder / "skipped" / f"step-{step:08d}-rank{self.fabric.global_rank}.npz"

    def _dump(self, path: Path, verdict: Verdict) -> None:
        """Keep this rank's part of a step's batch: where it stands in the run, and its tokens."""
        rank, world, rows = self.fabric.global_rank, self.fabric.world_size, self.plan.micro_batch
        count, ago = self.plan.accumulation, len(self._reports)  # steps done since
        recent = list(self.batches.kept)
        first = self.plan.sequences_after(verdict.step - 1)
        KeptBatch(
            step=verdict.step,
            rank=rank,
            world_size=world,
            loss=verdict.loss,
            grad_norm=verdict.grad_norm,
            sequences=[first + (i * world + rank) * rows + np.arange(rows) for i in range(count)],
            batches=recent[len(recent) - (ago + 1) * count : len(recent) - ago * count],
        ).save(path)
