"""Everything that was resolved, for people, before anything is done."""

import dataclasses
import sys
from pathlib import Path

import lightning
import torch
import yaml
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table

from data import RawTrainData, RawValidationData, TrainData, ValidationData
from lit_gpt.config import ModelConfig
from lit_gpt.model import GPT
from lit_gpt.ops import attention
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.memory import TrainingMemory
from lit_gpt.training.optimizer import describe_groups, parameter_groups
from lit_gpt.training.plan import Plan
from lit_gpt.training.strategy import Layout

ACTIVATIONS = {
    "none": "kept for the backward pass",
    "selective": "matrix products and softmax attention kept, the rest computed again",
    "full": "computed again from the inputs of the blocks",
}


def describe(
    console: Console,
    fabric: Fabric,
    args: PretrainArgs,
    config: ModelConfig,
    layout: Layout,
    memory: TrainingMemory,
    plan: Plan,
    train: "TrainData | RawTrainData",
    validation: "ValidationData | RawValidationData | None",
) -> None:
    """Print model, devices, batch, data and parameter groups; with --debug or --dry_run every argument too."""
    with torch.device("meta"):
        skeleton = GPT(config)
    blocks, parameters = skeleton.num_parameters(blocks_only=True), skeleton.num_parameters()
    layers = [config.mixer(i) for i in range(config.n_layer)]
    cuda = fabric.device.type == "cuda"
    kernels = attention.backend(fabric.device, torch.bfloat16 if cuda else torch.float32, args.document_reset)
    device = torch.cuda.get_device_name() if cuda else "CPU"
    micro_tokens = plan.micro_batch * args.sequence_length
    split = f"{fabric.world_size} ranks x {plan.accumulation} micro-batches of {plan.micro_batch}"
    chosen = "as asked" if args.micro_batch_size else "the largest that divides, holds at most 16,384 tokens and fits"
    rows = {
        "run folder": str(plan.folder),
        "model": f"{config.n_layer} layers: {', '.join(f'{layers.count(m)} {m}' for m in dict.fromkeys(layers))}",
        "parameters": f"{blocks:,} in the blocks, {parameters:,} in all",
        "training FLOPs": f"{skeleton.flops_per_token(args.sequence_length) / 1e9:.3g} G per token",
        "devices": f"{fabric.world_size} x {device}, {'bf16-mixed' if cuda else 'fp32'}",
        "strategy": str(layout),
        "activations": ACTIVATIONS[args.activation_checkpointing],
        "memory": memory.describe(plan.micro_batch),
        "kernels": f"GDN-2: {'fused Triton' if cuda else 'chunkwise PyTorch'}; attention: {kernels}",
        "global batch": f"{args.sequences_per_batch} x {args.sequence_length} = {plan.batch_tokens:,} tokens: {split}",
        "micro-batch": f"{plan.micro_batch} x {args.sequence_length} = {micro_tokens:,} tokens: {chosen}",
        "steps": f"{plan.total_steps:,}, {plan.total_steps * plan.batch_tokens:,} tokens",
        "training data": "\n".join(train.describe(plan.total_steps * args.sequences_per_batch)),
        "documents": "kept apart" if args.document_reset else "not kept apart: a sequence is one text",
        "validation": "none: no validation shards",
    }
    if validation:
        rows["validation"] = f"{plan.eval_blocks} blocks of {validation.block_length} tokens"
    table = Table(title=f"{args.model_name}, {args.train_config}", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(describe_groups(parameter_groups(skeleton, args.weight_decay)))
    if args.debug or args.dry_run:
        console.print(yaml.safe_dump(resolved(args, config), sort_keys=False), markup=False)


def resolved(args: PretrainArgs, config: ModelConfig) -> dict:
    """Every argument, the model's config and the versions, as config.yaml holds them."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
    versions = {"torch": str(torch.__version__), "lightning": lightning.__version__, "python": sys.version.split()[0]}
    return {**values, "model": config.to_dict(), "versions": versions}
