"""How fast training goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric import Fabric

from lit_gpt.training.plan import Plan
from lit_gpt.training.records import peak_flops


class Speedometer:
    """Tokens per second between two readings, without the time spent on evaluations and checkpoints."""

    def __init__(self, fabric: Fabric, plan: Plan, step: int, flops_per_token: float):
        self.plan, self.step, self.began = plan, step, time.perf_counter()
        peak = peak_flops(torch.cuda.get_device_name()) if fabric.device.type == "cuda" else None
        self.flops_per_token, self.peak = flops_per_token, peak and peak * fabric.world_size

    def read(self, step: int) -> dict:
        """Speed since the last reading, share of the devices' peak (None where we know none), and time left at that
        speed, after `step` steps.
        """
        now, steps = time.perf_counter(), step - self.step
        seconds = (now - self.began) / steps
        self.step, self.began = step, now
        speed = self.plan.batch_tokens / seconds
        mfu = speed * self.flops_per_token / self.peak if self.peak else None
        return {"tokens_per_second": speed, "mfu": mfu, "seconds_left": seconds * (self.plan.total_steps - step)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began
