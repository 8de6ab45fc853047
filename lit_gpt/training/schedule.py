"""Recipes, the learning rate, and how a global batch is split: pure functions of tokens and sizes."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

from lit_gpt.config import CONFIG_DIR, suggest
from lit_gpt.errors import UserError

RECIPE_NAME = re.compile(r"tsz([1-9]\d*)x(2|4|8|16|32|64|128)k_([1-9]\d*)(M|B|T)")
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
MICRO_BATCH_TOKENS = 16384
"""What a micro-batch holds at most where none is asked for: 4 sequences of 4096."""


Fits = Callable[[int], bool]
"""Whether a device has the memory for micro-batches of so many sequences."""


def any_size(micro_batch: int) -> bool:
    return True


def recipe_flags(name: str) -> list[str]:
    """Command-line flags that a training recipe stands for: configs/train/<name>.yaml if there is one, else read off
    the name.

    `tsz<sequences>x<length>_<tokens>`, such as tsz128x4k_100B: batches of exactly 128 sequences of 4096 tokens, 100
    billion tokens in all.

    Raises:
        UserError: neither a file nor a name of that form.
    """
    path = CONFIG_DIR / "train" / f"{name}.yaml"
    if path.is_file():
        return ["--config", str(path)]
    match = RECIPE_NAME.fullmatch(name)
    if not match:
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(
            f"unknown train_config {name!r}. Write tsz<sequences>x<length>_<tokens> with a length of 2k, 4k, ... 128k, "
            f"such as tsz128x4k_100B, or name a file of configs/train. {suggest(name, known)}"
        )
    sequences, length, amount, unit = match.groups()
    values = {
        "sequences_per_batch": sequences,
        "sequence_length": int(length) * 1024,
        "total_tokens": int(amount) * UNITS[unit],
    }
    return [f"--{key}={value}" for key, value in values.items()]


@dataclass(kw_only=True)
class ScheduleArgs:
    learning_rate: float = 4e-4
    """Peak learning rate."""
    min_learning_rate: Optional[float] = None
    """Where the cosine ends; by default a tenth of the peak."""
    warmup_tokens: Optional[int] = None
    """Tokens of linear warmup from zero; by default 1% of all, so 1B of 100B."""


def learning_rate_at(tokens: int, total_tokens: int, args: ScheduleArgs) -> float:
    """Linear warmup, then cosine. A pure function of the tokens seen, so it survives any change of world size."""
    warmup = total_tokens // 100 if args.warmup_tokens is None else args.warmup_tokens
    floor = args.learning_rate / 10 if args.min_learning_rate is None else args.min_learning_rate
    if tokens < warmup:
        return args.learning_rate * tokens / warmup
    progress = min(1.0, (tokens - warmup) / max(1, total_tokens - warmup))
    return floor + (args.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def split_batch(
    sequences_per_batch: int,
    sequence_length: int,
    micro_batch_size: int,
    world_size: int,
    fits: Fits = any_size,
) -> tuple[int, int]:
    """Micro-batch size and micro-batches per rank and step that make up the global batch exactly.

    A micro_batch_size of 0 picks the largest that divides the batch, holds at most 16,384 tokens and `fits`; if none
    does, 1.

    Raises:
        UserError: the batch does not divide, with sizes that do.
    """
    per_rank, rest = divmod(sequences_per_batch, world_size)
    divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
    if rest or (micro_batch_size and per_rank % micro_batch_size):
        size = f"{world_size} rank{'s' * (world_size > 1)} x micro-batch {micro_batch_size or 1}"
        if rest:
            ranks = [w for w in range(1, 2 * world_size) if sequences_per_batch % w == 0]
            near = sorted(sorted(ranks, key=lambda w: abs(w - world_size))[:3])
            whole = round_to(sequences_per_batch, world_size)
            advice = f"Use {_either(near)} ranks, or a train_config of {whole} sequences."
        else:
            near = sorted(sorted(divisors, key=lambda d: abs(math.log(d / micro_batch_size)))[:3])
            whole = round_to(sequences_per_batch, world_size * micro_batch_size)
            advice = f"Use --micro_batch_size {_either(near)}, or a train_config of {whole} sequences."
        raise UserError(f"a global batch of {sequences_per_batch} sequences does not split into {size}. {advice}")
    if not micro_batch_size:
        small = (d for d in divisors if d * sequence_length <= MICRO_BATCH_TOKENS and fits(d))
        micro_batch_size = max(small, default=1)
    return micro_batch_size, per_rank // micro_batch_size


def round_to(value: int, multiple: int) -> int:
    """The multiple nearest to value, at least one of it."""
    return max(1, round(value / multiple)) * multiple


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
