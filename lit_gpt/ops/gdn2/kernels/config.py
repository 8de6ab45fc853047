"""The fixed launch configurations of the GDN-2 kernels: no tuning at run time. benchmarks/tune_gdn2.py searches for
them, checks each against float64 and prints the rows below."""

from dataclasses import astuple, dataclass, field, fields
from typing import Optional

import torch

from lit_gpt.errors import UserError

TILE = 64
"""Channels of V, or of K, that one program of a scan or of the gradients takes. Triton 3.6 computes narrower tiles
wrongly there on Hopper (illegal accesses, garbage), so head sizes are padded to at least this."""


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched."""

    warps: int = 4
    stages: int = 1
    """Depth of the software pipeline."""
    tile: int = TILE
    """Channels of K that a program holds at a time."""
    registers: Optional[int] = None
    """Registers of a thread at most; fewer let more programs share a multiprocessor, too few spill."""


@dataclass(frozen=True)
class Config:
    """One row of the table: rows of a chunk, and how each kernel is launched."""

    chunk: int = 64
    block_scores: Launch = field(default_factory=lambda: Launch(warps=1, stages=4, tile=32))
    chunk_scores: Launch = field(default_factory=lambda: Launch(warps=2, stages=2))
    forward_scan: Launch = field(default_factory=lambda: Launch(stages=3))
    backward_scan: Launch = field(default_factory=lambda: Launch(stages=2))
    score_gradients: Launch = field(default_factory=lambda: Launch(stages=2))
    state_gradients: Launch = field(default_factory=lambda: Launch(stages=2, registers=168))
    input_gradients: Launch = field(default_factory=lambda: Launch(stages=3))

    def flat(self) -> list[int]:
        """As integers, which operators take; no bound on registers is 0."""
        launches = [getattr(self, field.name) for field in fields(self)[1:]]
        return [self.chunk, *(number or 0 for launch in launches for number in astuple(launch))]

    @classmethod
    def from_flat(cls, numbers: list[int]) -> "Config":
        """The inverse of flat."""
        chunk, *rest = numbers
        launches = (rest[i : i + 4] for i in range(0, len(rest), 4))
        return cls(chunk, *(Launch(*launch, registers or None) for *launch, registers in launches))


def shared_memory(capability: tuple[int, int]) -> int:
    """KiB of shared memory that one program may have on a GPU of this compute capability."""
    if capability in ((8, 0), (8, 7)):  # A100, Orin
        return 163
    return 227 if (9, 0) <= capability < (12, 0) else 99


def config_for(dot: torch.dtype, KP: int, capability: tuple[int, int]) -> Config:
    """The configuration for dot operands of type `dot`, padded key size KP and a device of this compute capability.

    Each fits the shared memory of a multiprocessor: 227 KiB on Hopper (9, 0), 163 KiB on Ampere's A100 (8, 0), 99 KiB
    on its smaller kin. Measured on Hopper; the others keep to what fits, untimed. Raises UserError where none fits.
    """
    room, wide, half = shared_memory(capability), KP > 128, dot == torch.bfloat16
    needed = (100 if half else 184) if wide else 99  # both scans at their smallest
    if needed > room:
        dtype, instead = ("bf16", "") if half else ("fp32 and fp16", "bf16 or ")
        raise UserError(
            f"chunk_gdn2: head sizes above 128 need {needed} KiB of shared memory in {dtype} and this GPU has {room}. "
            f"Use {instead}heads of at most 128."
        )
    hopper = room >= 227
    flat = dict.fromkeys(("score_gradients", "state_gradients"), Launch())
    scan = Launch(warps=8 if wide else 4)
    if half:
        if hopper:
            return Config(forward_scan=scan, backward_scan=scan) if wide else Config()
        return Config(chunk=32 if wide else 64, forward_scan=scan, backward_scan=scan, **flat)
    chunk = 32 if wide or not hopper else 64
    return Config(chunk, Launch(), Launch(), forward_scan=scan, backward_scan=scan, **flat)
