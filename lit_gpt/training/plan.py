"""What a run comes to: sizes, steps and the moments at which things happen."""

import dataclasses
from pathlib import Path
from typing import Optional

from data import ValidationData
from lit_gpt.errors import UserError
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.schedule import Fits, any_size, split_batch

VALIDATION_BATCH = 8
"""Blocks that --eval_iters counts as one validation batch, on any number of ranks."""
DEBUG_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the present batch size and data took over: at the start, or at a resume that changed them."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Derived once from the arguments, the number of ranks and the validation data."""

    folder: Path
    """The run folder."""
    micro_batch: int
    """Sequences in a forward pass."""
    accumulation: int
    """Forward passes of each rank in a step."""
    batch_sequences: int
    """Sequences in a step."""
    batch_tokens: int
    """Tokens in a step."""
    total_steps: int
    """Steps in the run."""
    eval_blocks: int
    """Validation blocks in an evaluation."""
    origin: Origin = Origin()
    """From where on batches are of this size."""

    @classmethod
    def make(
        cls, args: PretrainArgs, world_size: int, validation: Optional[ValidationData], fits: Fits = any_size
    ) -> "Plan":
        """Raises UserError if the batch does not divide, the run is shorter than a step, or its name is a path."""
        if "/" in args.exp_name:
            raise UserError(f"--exp_name {args.exp_name!r} should be a name, without a /.")
        batch_tokens = args.sequences_per_batch * args.sequence_length
        micro_batch, accumulation = split_batch(
            args.sequences_per_batch, args.sequence_length, args.micro_batch_size, world_size, fits
        )
        if args.total_tokens < batch_tokens:
            raise UserError(f"total_tokens {args.total_tokens:,} are less than one batch of {batch_tokens:,}.")
        blocks = validation.num_blocks if validation else 0
        return cls(
            folder=args.output_root / "outputs" / f"{args.train_config}_{args.exp_name}",
            micro_batch=micro_batch,
            accumulation=accumulation,
            batch_sequences=args.sequences_per_batch,
            batch_tokens=batch_tokens,
            total_steps=args.total_tokens // batch_tokens,
            eval_blocks=min(blocks, args.eval_iters * VALIDATION_BATCH or blocks),
        )

    def going_on_from(self, origin: Origin, total_tokens: int) -> "Plan":
        """The same plan for a run whose batches are of this size only from `origin` on."""
        steps = origin.step + max(0, total_tokens - origin.tokens) // self.batch_tokens
        return dataclasses.replace(self, origin=origin, total_steps=steps)

    def sequences_after(self, step: int) -> int:
        """Sequences that the run has consumed after this many steps."""
        return self.origin.sequences + (step - self.origin.step) * self.batch_sequences

    def tokens_after(self, step: int) -> int:
        """Tokens that the run has consumed after this many steps."""
        return self.origin.tokens + (step - self.origin.step) * self.batch_tokens

    def due(self, step: int, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens after this many."""
        return step % interval == 0 or step == self.total_steps


def shortened(args: PretrainArgs, world_size: int, fits: Fits = any_size) -> PretrainArgs:
    """The same run for --debug: a few steps of two micro-batches on each rank, one evaluation, one checkpoint, no
    loader thread.
    """
    micro_batch, accumulation = split_batch(
        args.sequences_per_batch, args.sequence_length, args.micro_batch_size, world_size, fits
    )
    sequences = micro_batch * min(2, accumulation) * world_size
    return dataclasses.replace(
        args,
        exp_name=f"{args.exp_name}_debug",
        sequences_per_batch=sequences,
        total_tokens=DEBUG_STEPS * sequences * args.sequence_length,
        warmup_tokens=sequences * args.sequence_length,
        micro_batch_size=micro_batch,
        train_num_workers=0,
        log_step_interval=1,
        eval_step_interval=DEBUG_STEPS,
        save_step_interval=DEBUG_STEPS,
        eval_iters=1,
    )
