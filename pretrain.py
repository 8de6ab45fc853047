"""Pretrain a named model by a named recipe on a folder of token shards.

    python pretrain.py --train_data_dir D --output_root O --exp_name N \\
        --model_name swa_gdn2_1.3B --train_config tsz128x4k_100B

- setup -> main -> fit -> validate: arguments, objects, the loop, the evaluation.
- The whole position of a run is an integer, the sequences consumed. Learning rate, data order, evaluations and
  checkpoints follow from it, so the number of GPUs and the micro-batch change none of them.
- The same command again resumes from the newest complete checkpoint, bit for bit; a finished run says so.
- A global batch is exactly what the recipe says, or the run does not start.
- A signal or --time_limit ends it in order: checkpoint, one line, exit code 75; a step that is not finite is skipped.
"""

import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Optional

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from data import (
    RawTrainData,
    RawValidationData,
    TrainData,
    ValidationData,
    check_same_tokenizer,
    check_vocabulary,
    open_train,
    open_validation,
    tokenizer_of,
)
from lit_gpt.command_line import parse
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.model import count_parameters
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.checkpoint import Checkpoints
from lit_gpt.training.cluster import processes
from lit_gpt.training.describe import describe, resolved
from lit_gpt.training.guards import Guard
from lit_gpt.training.health import examine
from lit_gpt.training.leaving import EXIT_CODE, Leaving, Poll, seconds_of
from lit_gpt.training.memory import TrainingMemory
from lit_gpt.training.optimizer import adamw
from lit_gpt.training.plan import Origin, Plan, shortened
from lit_gpt.training.ranks import ending_together, supervise
from lit_gpt.training.records import Records
from lit_gpt.training.run_folder import decided_by_first, open_run_folder, resumable, where_to_start
from lit_gpt.training.schedule import learning_rate_at, recipe_flags
from lit_gpt.training.speed import Speedometer
from lit_gpt.training.strategy import Layout, build_fabric, build_model, device_bytes
from lit_gpt.training.warm_up import open_cache, warm_up
from lit_gpt.training.watch import PATIENCE, Watch

POSITIVE = ("sequences_per_batch", "sequence_length", "total_tokens", "num_extrapol", "keep_checkpoints")
POSITIVE += ("log_step_interval", "eval_step_interval", "save_step_interval", "max_skipped_in_a_row")
NOT_NEGATIVE = ("micro_batch_size", "train_num_workers", "eval_iters", "learning_rate", "weight_decay", "grad_clip")
NOT_NEGATIVE += ("milestone_tokens", "nnodes", "spike_deviations", "hang_minutes", "health_step_interval")


@dataclass
class Run:
    """What the loop works with, and where it is."""

    fabric: Fabric
    args: PretrainArgs
    plan: Plan
    checkpoints: Checkpoints
    records: Records
    leaving: Leaving
    guard: Guard
    watch: Watch
    identity: dict
    """Model, data and batch: what a resumed run must share, kept in every checkpoint."""
    step: int = 0
    """Steps done: with the plan, the sequences consumed, the only position there is."""

    @property
    def sequences(self) -> int:
        return self.plan.sequences_after(self.step)

    @property
    def tokens(self) -> int:
        return self.plan.tokens_after(self.step)

    @property
    def position(self) -> dict:
        return {"step": self.step, "tokens": self.tokens}


@exit_on_user_error
def setup(argv: Optional[list[str]] = None) -> None:
    """Resolve the arguments and start every process of the run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(PretrainArgs, argv, __doc__.splitlines()[0], preset=lambda given: recipe_flags(given.train_config))
    for name in ("sequences_per_batch", "sequence_length", "total_tokens"):
        if not getattr(args, name):
            raise UserError(f"train_config {args.train_config!r} says no {name}; add it there or as --{name}.")
    for name in POSITIVE:
        if not getattr(args, name) >= 1:
            raise UserError(f"--{name} should be at least 1, not {getattr(args, name)}.")
    for name in NOT_NEGATIVE:
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name} should be at least 0, not {getattr(args, name)}.")
    if args.wandb_project and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb_project needs the package wandb: pip install wandb, or leave the flag out.")
    time_limit = None if args.time_limit is None else seconds_of(args.time_limit)
    config = ModelConfig.from_name(args.model_name)

    cuda = args.accelerator != "cpu" and torch.cuda.is_available()
    if args.accelerator == "cuda" and not cuda:
        raise UserError(
            "--accelerator cuda, but PyTorch sees no GPU here. Use --accelerator cpu, or a machine with one."
        )
    torch.set_float32_matmul_precision("high")
    group = processes(args, cuda)
    layout = Layout.choose(args, count_parameters(config)[1], group.nodes, group.devices, device_bytes(cuda))
    if group.to_be_started:
        sys.exit(supervise([sys.executable, os.path.abspath(__file__), *argv], group.nodes, group.devices))
    with Leaving(time_limit) as leaving:
        fabric = build_fabric(layout, group.nodes, group.devices, cuda, group.environment)
        fabric.launch()
        with ending_together():
            main(fabric, args, config, layout, leaving)
            if leaving.agreed:
                sys.exit(EXIT_CODE)


def main(fabric: Fabric, args: PretrainArgs, config: ModelConfig, layout: Layout, leaving: Leaving) -> None:
    """Build data, model and optimizer, check that they belong together, resume, train, sum up."""
    memory = TrainingMemory(args, config, layout, fabric.device)
    args = shortened(args, fabric.world_size, memory.fits) if args.debug else args
    train, validation = open_data(args, config)
    plan = Plan.make(args, fabric.world_size, validation, memory.fits)
    console = Console(quiet=not fabric.is_global_zero, highlight=False)
    describe(console, fabric, args, config, layout, memory, plan, train, validation)
    if args.dry_run:
        console.print("dry run: everything checked, nothing written.")
        return
    cache = open_cache(fabric, args.compile_cache_dir or args.output_root / "compile_cache")
    if args.warm_up:
        console.print(warm_up(fabric, args, plan, config, cache), soft_wrap=True)
        if leaving.ask(fabric.device):
            console.print(leaving.farewell(0, plan.folder), soft_wrap=True)
        return

    architecture = {k: v for k, v in config.to_dict().items() if k != "name"}
    identity = {"model": architecture, "data": train.fingerprint, "sequences_per_batch": args.sequences_per_batch}
    start = decided_by_first(fabric, lambda: where_to_start(plan.folder, args, architecture, console))
    step, changes = 0, []
    if start.checkpoint:
        meta, changes = resumable(start.checkpoint, identity, args.allow_data_change)
        step = meta["step"]
        here = Origin(step, meta["sequences"], meta["tokens"])
        plan = plan.going_on_from(here if changes else Origin(**meta["origin"]), args.total_tokens)
        train.load_state(meta["data_state"])

    lock = None
    if fabric.is_global_zero:
        lock = open_run_folder(plan.folder, resolved(args, config), tokenizer_of(args, train), fresh=args.debug)
    fabric.barrier()
    records = Records(plan.folder, plan.total_steps, active=fabric.is_global_zero)
    run = Run(
        fabric=fabric,
        args=args,
        plan=plan,
        checkpoints=Checkpoints(plan.folder / "checkpoints", args.keep_checkpoints, fabric, args.milestone_tokens),
        records=records,
        leaving=leaving,
        guard=Guard(fabric, args, plan, leaving, records),
        watch=Watch(
            plan.folder / "stacks" / f"rank{fabric.global_rank}.txt",
            fabric.global_rank,
            args.hang_minutes,
            EXIT_CODE if args.hang_exit else None,
        ),
        identity=identity,
        step=step,
    )
    run.checkpoints.go_on_from(run.tokens, start.damaged)
    if changes:
        console.print(f"from step {step} on with another", "\n    ".join(["", *changes]))
        console.print("\n".join(train.describe(plan.sequences_after(plan.total_steps))))

    with run.watch:
        model = build_model(fabric, config, args, seed=None if start.checkpoint else args.seed)
        optimizer = adamw(model.module, args)
        if start.checkpoint:
            run.checkpoints.load(start.checkpoint, model.module, optimizer)
            run.guard.load_state_dict(meta.get("guard", {}))
            done = "this run is finished" if run.step >= plan.total_steps else "resuming"
            console.print(f"{done}: {start.checkpoint.name}, after {run.tokens:,} tokens.")
        elif start.weights:
            start.weights.load_into(model.module)
            console.print(f"starting from the weights of {start.weights.path}.")
        opened = run.records.opened(run.step, _wandb_options(args, plan))
        with opened, run.checkpoints, torch.autograd.set_detect_anomaly(args.debug):
            fit(run, model, optimizer, train, validation)
            if not leaving.agreed:
                counts = {"epochs": train.epochs(run.sequences), **run.guard.counts, **(cache.counts if cache else {})}
                run.records.summarize({**run.position, **counts, "parameters": model.module.num_parameters()})
            run.checkpoints.require_saved()
    if leaving.agreed:
        console.print(leaving.farewell(run.step, plan.folder), soft_wrap=True)
    if lock:
        lock.close()


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: TrainData | RawTrainData,
    validation: ValidationData | RawValidationData | None,
) -> None:
    """Train from where the run is to the end of its plan, or until all ranks agree to leave."""
    fabric, args, plan, guard, leaving = run.fabric, run.args, run.plan, run.guard, run.leaving
    wrapped_optimizer = fabric.setup_optimizers(optimizer)
    batches = train.micro_batches(
        consumed=run.sequences,
        global_batch=args.sequences_per_batch,
        micro_batch=plan.micro_batch,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        prefetch=args.train_num_workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    leaving.ask(fabric.device)
    if validation and fabric.broadcast(run.records.evaluation_missing(run.step, args.eval_step_interval)):
        validate(run, model, validation)  # the run was left before it was done
    speedometer = Speedometer(fabric, plan, run.step, model.module.flops_per_token(args.sequence_length))

    with closing(guard.remember(batches)) as batches:
        while run.step < plan.total_steps and not leaving.agreed:
            run.step += 1
            learning_rate = learning_rate_at(run.tokens, args.total_tokens, args)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss = accumulate(run, model, batches)
            if args.health_step_interval and plan.due(run.step, args.health_step_interval):
                run.records.health(run.position | examine(fabric, model, batches.kept[-1]))
            grad_norm = fabric.clip_gradients(
                model, wrapped_optimizer, max_norm=args.grad_clip or math.inf, error_if_nonfinite=False
            )
            guard.judge(run.step, loss, grad_norm, optimizer)  # on the device: the optimizer may leave this step out
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            run.records.step(run.step)

            evaluate = validation and plan.due(run.step, args.eval_step_interval)
            save = plan.due(run.step, args.save_step_interval)
            log = save or plan.due(run.step, args.log_step_interval)
            verdict = guard.settle(wait=log or evaluate)  # otherwise that of the step before, so that nobody waits
            run.watch.beat()
            if log:
                speed = speedometer.read(run.step)
                losses = {"loss": verdict.loss, "lr": learning_rate, "grad_norm": verdict.grad_norm}
                run.records.training({**run.position, **losses, **speed})
            with speedometer.paused():
                if evaluate and not leaving.agreed:
                    validate(run, model, validation)
                if save or leaving.agreed:
                    run.watch.beat(PATIENCE)
                    guard.settle(wait=True)
                    meta = {**run.position, "sequences": run.sequences, "origin": asdict(plan.origin), **run.identity}
                    meta |= {"data_state": train.state(run.sequences), "document_format": train.corpus.document_format}
                    meta |= {"guard": guard.state_dict()}
                    run.checkpoints.save(model.module, optimizer, meta)
            run.records.checkpoints(run.checkpoints.finished())
    run.checkpoints.wait()
    run.records.checkpoints(run.checkpoints.finished())


def accumulate(run: Run, model: nn.Module, batches: Iterator[Batch]) -> Tensor:
    """Gradients of the mean loss over this rank's part of a global batch, synchronised once; returns that loss, on the
    device.
    """
    fabric, accumulation = run.fabric, run.plan.accumulation
    total = torch.zeros((), device=fabric.device)
    for i in range(accumulation):
        tokens, cu_seqlens = fabric.to_device(next(batches))
        with fabric.no_backward_sync(model, enabled=fabric.world_size > 1 and i < accumulation - 1):
            losses = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens, rows_apart=True)
            loss = losses.mean() / accumulation
            fabric.backward(loss)
        total += loss.detach()
    return total


@torch.no_grad()
def validate(run: Run, model: nn.Module, validation: ValidationData | RawValidationData) -> None:
    """Record the mean loss over the first 1, 2, ... num_extrapol training lengths of every block, read from one forward
    pass per block; nothing if all ranks agree to leave meanwhile.
    """
    fabric, lengths, blocks = run.fabric, run.args.num_extrapol, run.plan.eval_blocks
    began, poll = time.perf_counter(), Poll(run.leaving, fabric.device)
    model.eval()
    sums = torch.zeros(lengths, dtype=torch.float64, device=fabric.device)
    for first in range(0, blocks, fabric.world_size):
        if poll.ask():
            break
        run.watch.beat(PATIENCE)
        block = first + fabric.global_rank
        # ranks for which no block is left run one uncounted: a sharded model runs on all ranks together
        tokens, cu_seqlens = fabric.to_device(validation.batch(min(block, blocks - 1)))
        losses = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens, rows_apart=True)
        if block < blocks:
            sums += losses.double().view(lengths, -1).sum(dim=1)
    model.train()
    if run.leaving.agreed:
        return
    sums = fabric.all_reduce(sums, reduce_op="sum").cumsum(dim=0).tolist()
    ends = [run.args.sequence_length * (n + 1) for n in range(lengths)]
    losses = {f"val_loss@{end}": total / (blocks * end) for end, total in zip(ends, sums)}
    run.records.validation({**run.position, **losses, "blocks": blocks, "seconds": time.perf_counter() - began})


def open_data(
    args: PretrainArgs, config: ModelConfig
) -> tuple[TrainData | RawTrainData, ValidationData | RawValidationData | None]:
    """Training and validation data that fit each other and the model; None without a validation split."""
    train = open_train(args, args.sequence_length, args.seed)
    validation = open_validation(args, args.sequence_length * args.num_extrapol, train)
    for corpus in [*train.corpora, *([validation.corpus] if validation else [])]:
        check_vocabulary(corpus, config.vocab_size)
    check_same_tokenizer(train, validation)
    return train, validation


def _wandb_options(args: PretrainArgs, plan: Plan) -> Optional[dict]:
    """Arguments of wandb.init, offline when debugging; None without --wandb_project."""
    if not args.wandb_project:
        return None
    name = plan.folder.name
    options = {"project": args.wandb_project, "group": args.exp_group, "name": name, "id": name, "resume": "allow"}
    options |= {"dir": str(args.wandb_dir or plan.folder), "config": asdict(args)}
    return options | ({"mode": "offline"} if args.debug else {})


if __name__ == "__main__":
    setup()
