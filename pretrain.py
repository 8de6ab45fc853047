"""Pretrain a named model by a named recipe on a folder of token shards.

    python pretrain.py --train_data_dir D --output_root O --exp_name N --model_name swa_gdn2_1.3B --train_config tsz128x4k_100B

- setup -> main -> fit -> validate: arguments, objects, the loop, the evaluation.
- The whole position of a run is an integer, the sequences consumed. Learning rate, data order, evaluations and checkpoints follow from it,
  so the number of GPUs and the micro-batch change none of them.
- The same command again resumes from the newest complete checkpoint, bit for bit; a finished run says so.
- A global batch is exactly what the recipe says, or the run does not start.
"""

import dataclasses
import fcntl
import importlib.util
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Optional

import lightning
import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from rich.console import Console
from rich.table import Table

from data import TrainData, ValidationData, check_same_tokenizer, check_vocabulary
from lit_gpt.command_line import parse
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.files import write_atomically
from lit_gpt.model import GPT
from lit_gpt.ops import attention
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.checkpoint import Checkpoints, newest_checkpoint, read_meta
from lit_gpt.training.optimizer import adamw, describe_groups, parameter_groups
from lit_gpt.training.records import Records, duration, peak_flops, read_metrics
from lit_gpt.training.schedule import learning_rate_at, recipe_flags, split_batch

VALIDATION_BATCH = 8
"""Blocks that --eval_iters counts as one validation batch, on any number of ranks."""
DEBUG_STEPS = 4


@dataclasses.dataclass
class Plan:
    """What a run comes to on this many ranks."""

    folder: Path
    micro_batch: int
    accumulation: int
    total_steps: int
    batch_tokens: int
    eval_blocks: int

    def due(self, step: int, interval: int) -> bool:
        """Whether something that happens every `interval` steps happens after `step` of them."""
        return step % interval == 0 or step == self.total_steps


@exit_on_user_error
def setup(argv: Optional[list[str]] = None) -> None:
    """Resolve the arguments and start every process of the run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(PretrainArgs, argv, __doc__, preset=lambda given: recipe_flags(given.train_config))
    for name in ("sequences_per_batch", "sequence_length", "total_tokens"):
        if not getattr(args, name):
            raise UserError(f"train_config {args.train_config!r} says no {name}; add it there or as --{name}.")
    if args.wandb_project and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb_project needs the package wandb: pip install wandb, or leave the flag out.")
    config = ModelConfig.from_name(args.model_name)

    cuda = args.accelerator != "cpu" and torch.cuda.is_available()
    if args.accelerator == "cuda" and not cuda:
        raise UserError("--accelerator cuda, but PyTorch sees no GPU here. Use --accelerator cpu, or a machine with one.")
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=_devices(args.devices, cuda),
        num_nodes=args.nnodes,
        strategy="auto" if args.nnodes == 1 and _devices(args.devices, cuda) == 1 else "ddp",
        precision="bf16-mixed" if cuda else "32-true",
        plugins=[LightningEnvironment()] if args.interactive_job else None,
    )
    fabric.launch()
    torch.set_float32_matmul_precision("high")
    main(fabric, _shorten(args, fabric.world_size) if args.debug else args, config)


def main(fabric: Fabric, args: PretrainArgs, config: ModelConfig) -> None:
    """Build data, model and optimizer, check that they belong together, resume, train, sum up."""
    train = TrainData(args.train_data_dir, args.sequence_length, args.seed)
    validation = _open_validation(args, train)
    for split in filter(None, (train, validation)):
        check_vocabulary(split.corpus, config.vocab_size)
    plan = _plan(args, fabric.world_size, validation)
    console = Console(quiet=not fabric.is_global_zero, highlight=False)
    _describe(console, fabric, args, config, plan, train, validation)
    if args.dry_run:
        console.print("dry run: everything checked, nothing written.")
        return

    lock = _open_folder(args, plan.folder, train) if fabric.is_global_zero else None
    fabric.barrier()
    checkpoints = Checkpoints(plan.folder / "checkpoints", args.keep_checkpoints, fabric)
    newest = _checkpoint_to_resume(plan.folder)
    identity = {
        "model": {k: v for k, v in config.to_dict().items() if k != "name"},
        "data": train.fingerprint,
        "sequences_per_batch": args.sequences_per_batch,
    }
    step = _matching_step(newest, identity) if newest else 0

    fabric.seed_everything(args.seed, verbose=False)
    with fabric.init_module():
        model = GPT(config)
    optimizer = adamw(model, args)
    if newest:
        checkpoints.load(newest, model, optimizer)
        console.print(f"resuming from {newest.name}, after {step * plan.batch_tokens:,} tokens.")

    records = Records(plan.folder, fabric.is_global_zero, plan.total_steps)
    records.open(step, _wandb_options(args, plan.folder))
    try:
        if step < plan.total_steps:
            with torch.autograd.set_detect_anomaly(args.debug):
                fit(fabric, args, plan, model, optimizer, train, validation, checkpoints, records, step, identity)
        else:
            records.say(f"this run is finished: {plan.total_steps:,} steps, {step * plan.batch_tokens:,} tokens.")
        records.close(_summary(plan, model, train))
    finally:
        records.close()
    console.print(f"run folder: {plan.folder}")
    del lock


def fit(
    fabric: Fabric,
    args: PretrainArgs,
    plan: Plan,
    raw_model: GPT,
    raw_optimizer: torch.optim.Optimizer,
    train: TrainData,
    validation: Optional[ValidationData],
    checkpoints: Checkpoints,
    records: Records,
    step: int,
    identity: dict,
) -> None:
    """Train from `step` to the end of the plan."""
    model, optimizer = fabric.setup(raw_model, raw_optimizer)
    batches = train.micro_batches(
        consumed=step * args.sequences_per_batch,
        global_batch=args.sequences_per_batch,
        micro_batch=plan.micro_batch,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        prefetch=args.train_num_workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )
    flops = raw_model.flops_per_token(args.sequence_length)
    peak = peak_flops(torch.cuda.get_device_name()) if fabric.device.type == "cuda" else None
    logged_step, logged_at = step, time.perf_counter()

    while step < plan.total_steps:
        step += 1
        learning_rate = learning_rate_at(step * plan.batch_tokens, args.total_tokens, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = accumulate(fabric, model, batches, plan.accumulation)
        if args.grad_clip:
            grad_norm = fabric.clip_gradients(model, optimizer, max_norm=args.grad_clip, error_if_nonfinite=False)
        else:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in raw_model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        records.step(step)

        log, evaluate, save = (plan.due(step, n) for n in (args.log_step_interval, args.eval_step_interval, args.save_step_interval))
        if log or save:
            mean_loss = fabric.all_reduce(loss, reduce_op="mean").item()
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss is {mean_loss} at step {step}. The newest checkpoint is from before; lower --learning_rate or look at the "
                    f"data of sequences {(step - 1) * args.sequences_per_batch} to {step * args.sequences_per_batch - 1}."
                )
            seconds = (time.perf_counter() - logged_at) / (step - logged_step)
            speed = plan.batch_tokens / seconds
            record = {
                "step": step,
                "tokens": step * plan.batch_tokens,
                "loss": mean_loss,
                "lr": learning_rate,
                "grad_norm": grad_norm.item(),
                "tokens_per_second": speed,
                "mfu": speed * flops / (peak * fabric.world_size) if peak else None,
                "seconds_left": seconds * (plan.total_steps - step),
            }
            records.training(record)
            logged_step = step
        if validation is not None and plan.due(step, args.eval_step_interval):
            began = time.perf_counter()
            losses = validate(fabric, model, validation, plan, args.num_extrapol)
            seconds = time.perf_counter() - began
            records.validation(
                {"step": step, "tokens": step * plan.batch_tokens, **losses, "blocks": plan.eval_blocks, "seconds": seconds}
            )
        if save:
            began = time.perf_counter()
            meta = {
                "step": step,
                "sequences": step * args.sequences_per_batch,
                "tokens": step * plan.batch_tokens,
                "model_name": args.model_name,
                **identity,
            }
            path = checkpoints.save(step, raw_model, raw_optimizer, meta)
            seconds = time.perf_counter() - began
            records.checkpoint({"step": step, "tokens": step * plan.batch_tokens, "checkpoint": path.name, "seconds": seconds})
        if log or evaluate or save:
            logged_step, logged_at = step, time.perf_counter()
    batches.close()


def accumulate(fabric: Fabric, model: Any, batches: Any, accumulation: int) -> torch.Tensor:
    """Gradients of the mean loss over this rank's part of a global batch, synchronised once; returns that loss, on the device."""
    total = torch.zeros((), device=fabric.device)
    for i in range(accumulation):
        batch = fabric.to_device(next(batches))
        wait = fabric.world_size > 1 and i < accumulation - 1
        with fabric.no_backward_sync(model, enabled=wait):
            loss = model(batch[:, :-1], batch[:, 1:]).mean() / accumulation
            fabric.backward(loss)
        total += loss.detach()
    return total


@torch.no_grad()
def validate(fabric: Fabric, model: Any, validation: ValidationData, plan: Plan, lengths: int) -> dict[str, float]:
    """Mean loss over the first 1, 2, ... `lengths` parts of each validation block, all read from one forward pass per block."""
    model.eval()
    part = validation.block_length // lengths
    sums = torch.zeros(lengths, dtype=torch.float64, device=fabric.device)
    for i in range(fabric.global_rank, plan.eval_blocks, fabric.world_size):
        block = fabric.to_device(validation.block(i)[None])
        losses = model(block[:, :-1], block[:, 1:])
        sums += losses.double().view(lengths, part).sum(dim=1)
    sums = fabric.all_reduce(sums, reduce_op="sum").cumsum(0)
    model.train()
    return {f"val_loss@{part * n}": sums[n - 1].item() / (plan.eval_blocks * part * n) for n in range(1, lengths + 1)}


def _devices(asked: str, cuda: bool) -> int:
    """GPUs, or CPU processes, to use on this machine."""
    if asked == "auto":
        return torch.cuda.device_count() if cuda else 1
    if not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--devices should be a number or auto, not {asked!r}.")
    if cuda and int(asked) > torch.cuda.device_count():
        raise UserError(f"--devices {asked}, but this machine has {torch.cuda.device_count()} GPUs.")
    return int(asked)


def _shorten(args: PretrainArgs, world_size: int) -> PretrainArgs:
    """The same run as a few steps of two micro-batches on each rank, with one evaluation and one checkpoint."""
    micro_batch, accumulation = split_batch(args.sequences_per_batch, args.sequence_length, args.micro_batch_size, world_size)
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


def _open_validation(args: PretrainArgs, train: TrainData) -> Optional[ValidationData]:
    """The validation data, unless the training folder holds none and no other was given."""
    folder = args.val_data_dir or args.train_data_dir
    if args.val_data_dir is None and not list(Path(folder).glob("validation*.bin")):
        return None
    validation = ValidationData(folder, args.sequence_length * args.num_extrapol)
    check_same_tokenizer(train, validation)
    return validation


def _plan(args: PretrainArgs, world_size: int, validation: Optional[ValidationData]) -> Plan:
    batch_tokens = args.sequences_per_batch * args.sequence_length
    micro_batch, accumulation = split_batch(args.sequences_per_batch, args.sequence_length, args.micro_batch_size, world_size)
    if args.total_tokens < batch_tokens:
        raise UserError(f"total_tokens {args.total_tokens:,} are less than one batch of {batch_tokens:,}.")
    available = validation.num_blocks if validation else 0
    return Plan(
        folder=args.output_root / "outputs" / f"{args.train_config}_{args.exp_name}",
        micro_batch=micro_batch,
        accumulation=accumulation,
        total_steps=args.total_tokens // batch_tokens,
        batch_tokens=batch_tokens,
        eval_blocks=min(available, args.eval_iters * VALIDATION_BATCH or available),
    )


def _describe(
    console: Console, fabric: Fabric, args: PretrainArgs, config: ModelConfig, plan: Plan, train: TrainData, validation: Any
) -> None:
    """Everything that was resolved, before anything is done."""
    with torch.device("meta"):
        skeleton = GPT(config)
    blocks, parameters = skeleton.num_parameters(blocks_only=True), skeleton.num_parameters()
    layers = [config.mixer(i) for i in range(config.n_layer)]
    device = torch.cuda.get_device_name() if fabric.device.type == "cuda" else "CPU"
    compute = torch.bfloat16 if fabric.device.type == "cuda" else torch.float32
    table = Table(title=f"{args.model_name}, {args.train_config}", show_header=False)
    table.add_row("run folder", str(plan.folder))
    table.add_row("model", f"{config.n_layer} layers: {', '.join(f'{layers.count(m)} {m}' for m in dict.fromkeys(layers))}")
    table.add_row("parameters", f"{blocks:,} in the blocks, {parameters:,} in all")
    table.add_row("training FLOPs", f"{skeleton.flops_per_token(args.sequence_length) / 1e9:.2f} G per token")
    table.add_row("memory", f"{16 * parameters / 2**30:.1f} GiB of weights, gradients and AdamW on each device, besides activations")
    table.add_row("devices", f"{fabric.world_size} x {device}, {fabric._precision.precision}")
    table.add_row("GDN-2, attention", f"chunkwise PyTorch, {attention.backend(fabric.device, compute)}")
    split = f"{fabric.world_size} ranks x {plan.accumulation} micro-batches of {plan.micro_batch}"
    table.add_row("global batch", f"{args.sequences_per_batch} x {args.sequence_length} = {plan.batch_tokens:,} tokens: {split}")
    table.add_row("steps", f"{plan.total_steps:,}, {plan.total_steps * plan.batch_tokens:,} tokens")
    epochs = train.epochs(plan.total_steps * args.sequences_per_batch)
    table.add_row("training data", f"{train.corpus.num_tokens:,} tokens, {epochs:.2f} epochs")
    shown = f"{plan.eval_blocks} blocks of {args.sequence_length * args.num_extrapol}" if validation else "none: no validation shards"
    table.add_row("validation", shown)
    console.print(table)
    console.print(describe_groups(parameter_groups(skeleton, args.weight_decay)))
    if args.debug or args.dry_run:
        console.print(yaml.safe_dump(_plain(args, config), sort_keys=False), markup=False)


def _plain(args: PretrainArgs, config: ModelConfig) -> dict:
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
    versions = {"torch": torch.__version__, "lightning": lightning.__version__, "python": sys.version.split()[0]}
    return {**values, "model": config.to_dict(), "versions": versions}


def _open_folder(args: PretrainArgs, folder: Path, train: TrainData) -> Any:
    """Make the run folder ours until the process ends: locked, with the resolved config and a copy of the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another process is training in {folder}. Wait for it, or use another --exp_name.") from error
    if args.debug:  # its folder is its own, and each debug run is a fresh one
        for item in folder.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    write_atomically(folder / "config.yaml", yaml.safe_dump(_plain(args, ModelConfig.from_name(args.model_name)), sort_keys=False).encode())
    tokenizer = train.corpus.folder / "tokenizer"
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    return lock


def _checkpoint_to_resume(folder: Path) -> Optional[Path]:
    """The newest complete checkpoint; a run that has saved some and now has none is not started over."""
    newest = newest_checkpoint(folder / "checkpoints")
    saved = [r["checkpoint"] for r in read_metrics(folder / "metrics.jsonl") if "checkpoint" in r]
    if newest is None and saved:
        raise UserError(
            f"{folder} has trained up to {saved[-1]}, but its checkpoints are gone. Put them back, or start over with another --exp_name."
        )
    return newest


def _matching_step(checkpoint: Path, identity: dict) -> int:
    """The step of a checkpoint, if it is of this very run."""
    meta = read_meta(checkpoint)
    for key, ours in identity.items():
        theirs = meta.get(key)
        if theirs != ours:
            fields = [k for k in ours if theirs.get(k) != ours[k]] if isinstance(ours, dict) and isinstance(theirs, dict) else []
            what = ", ".join(f"{key}.{k} ({theirs.get(k)} then, {ours[k]} now)" for k in fields) or f"{key} ({theirs} then, {ours} now)"
            raise UserError(f"{checkpoint} was trained with another {what}. Use the same, or another --exp_name.")
    return meta["step"]


def _wandb_options(args: PretrainArgs, folder: Path) -> Optional[dict]:
    if not args.wandb_project:
        return None
    where = {"dir": str(args.wandb_dir or folder), "id": folder.name, "resume": "allow"}
    mode = {"mode": "offline"} if args.debug else {}
    return {"project": args.wandb_project, "group": args.exp_group, "name": folder.name, "config": dataclasses.asdict(args), **where, **mode}


def _summary(plan: Plan, model: GPT, train: TrainData) -> dict:
    """What the run came to, read from its records."""
    records = read_metrics(plan.folder / "metrics.jsonl")
    training = [r for r in records if "loss" in r]
    validation = [r for r in records if "blocks" in r]
    last = {k: v for k, v in validation[-1].items() if k.startswith("val_loss@")} if validation else {}
    return {
        "steps": plan.total_steps,
        "tokens": plan.total_steps * plan.batch_tokens,
        "epochs": train.epochs(plan.total_steps * plan.batch_tokens // train.sequence_length),
        "loss": training[-1]["loss"] if training else None,
        **last,
        "tokens_per_second": sorted(r["tokens_per_second"] for r in training)[len(training) // 2] if training else None,
        "parameters": model.num_parameters(),
        "checkpoint": str(newest_checkpoint(plan.folder / "checkpoints")),
    }


if __name__ == "__main__":
    setup()
