"""How a model is spread over the devices: ddp, fsdp2 or hsdp, in one precision and with the same weights in each.

- ddp: every device holds everything; gradients are all-reduced once per step.
- fsdp2: weights, gradients and optimizer states in one shard per device (torch's fully_shard).
- hsdp: shards within groups of devices (a node), copies across them; gradients are reduce-scattered in the group and
  all-reduced across groups once per step.

Master weights, gradients, their reduction and the optimizer are fp32 everywhere; on GPUs matrix products are bf16. What
is computed does not depend on the strategy beyond the order of sums.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

import torch
import torch.nn as nn
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError
from lit_gpt.model import GPT

STATE_BYTES = 16
"""Bytes per parameter of fp32 weight, gradient and AdamW's two moments."""


@dataclass(kw_only=True)
class StrategyArgs:
    strategy: Literal["auto", "ddp", "fsdp2", "hsdp"] = "auto"
    """How the model is spread over devices. ddp: copies; fsdp2: shards; hsdp: shards in a node, copies across nodes.
    auto: ddp if weights, gradients and AdamW take at most half of a device's memory, else hsdp on several nodes and
    fsdp2 on one.
    """
    shard_size: int = 0
    """Devices that share one copy of the model under hsdp; 0: those of a node."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it. selective: all of a block but its matrix products
    and softmax attention; full: whole blocks, from their inputs.
    """


@dataclass(frozen=True)
class Layout:
    """Which strategy, and over how many devices."""

    strategy: Literal["single", "ddp", "fsdp2", "hsdp"]
    replicas: int
    """Copies of the model."""
    shards: int
    """Devices over which each copy is spread."""
    why: str

    @classmethod
    def choose(
        cls, args: StrategyArgs, parameters: int, nodes: int, devices: int, device_bytes: Optional[int]
    ) -> "Layout":
        """The layout for a model of that many parameters on nodes x devices with device_bytes of memory each; None for
        CPUs, where it is taken to fit.

        Raises:
            UserError: shard_size does not divide the devices, or is given without hsdp.
        """
        world, strategy, why = nodes * devices, args.strategy, "as asked"
        if args.shard_size < 0 or (args.shard_size and strategy != "hsdp"):
            raise UserError(f"--shard_size {args.shard_size} is a number of devices, with --strategy hsdp only.")
        if strategy == "auto":
            fits = device_bytes is None or STATE_BYTES * parameters <= device_bytes / 2
            strategy = "ddp" if fits else "hsdp" if nodes > 1 else "fsdp2"
            need = f"its states of {STATE_BYTES * parameters / 2**30:.1f} GiB take"
            why = f"{need} at most half of a device" if fits else f"{need} more than half of a device"
            if world == 1:
                strategy, why = "single", "there is one device"
        if strategy == "fsdp2":
            return cls(strategy, 1, world, why)
        if strategy == "hsdp":
            shards = args.shard_size or devices
            if world % shards:
                near = [n for n in range(1, world + 1) if world % n == 0]
                raise UserError(
                    f"--shard_size {shards} does not divide {world} devices. Use {', '.join(map(str, near))}."
                )
            return cls(strategy, world // shards, shards, why)
        return cls(strategy, world, 1, why)

    def __str__(self) -> str:
        size = f", {self.replicas} copies of {self.shards} shards" if self.strategy == "hsdp" else ""
        return f"{self.strategy}{size}: {self.why}"


def device_bytes(cuda: bool) -> Optional[int]:
    """Memory of a GPU of this machine; None on CPUs, whose memory is not ours alone."""
    return torch.cuda.get_device_properties(0).total_memory if cuda else None


def build_fabric(
    layout: Layout, nodes: int, devices: int, cuda: bool, environment: Optional[ClusterEnvironment]
) -> Fabric:
    """The Fabric of a layout: fp32 master weights; on GPUs bf16 autocast, NCCL, and gloo beside it for checkpoints."""
    for package in ("lightning.fabric", "lightning.pytorch"):  # our own table says what runs where
        logging.getLogger(package).setLevel(logging.WARNING)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    strategy: str | DDPStrategy = "auto"
    if layout.strategy == "ddp":
        strategy = CopiesStrategy(process_group_backend=backend)
    elif layout.strategy != "single":
        strategy = FullyShardedStrategy(layout, process_group_backend=backend)
    return Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision="bf16-mixed" if cuda else "32-true",
        plugins=[environment] if environment else None,
    )


class CopiesStrategy(DDPStrategy):
    """ddp, wrapped on the stream that it trains on: Fabric's own takes a side stream, as CUDA graphs would need, and
    each gradient would wait for that one.
    """

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        device_ids = None if self.root_device.type == "cpu" else [self.root_device.index]
        return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


class FullyShardedStrategy(DDPStrategy):
    """Parameters, gradients and optimizer states in shards; processes and their collectives are those of ddp.

    Gradients are reduced into shards with every micro-batch, so that no device ever holds all of them; only what goes
    across copies of the model waits for the last one.
    """

    def __init__(self, layout: Layout, **options):
        super().__init__(**options)
        self.layout = layout
        self._backward_sync_control = _AllReduceLater()

    def setup_environment(self) -> None:
        super().setup_environment()
        device, layout = self.root_device.type, self.layout
        if layout.strategy == "hsdp":
            self.mesh = init_device_mesh(
                device, (layout.replicas, layout.shards), mesh_dim_names=("replicate", "shard")
            )
        else:
            self.mesh = init_device_mesh(device, (layout.shards,), mesh_dim_names=("shard",))

    def module_to_device(self, module: nn.Module) -> None:
        pass  # build_model has put each shard where it belongs

    def setup_module(self, module: nn.Module) -> nn.Module:
        # The losses are a view of flat ones, and nobody changes them in place, which is what this warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        return module

    def clip_gradients_norm(self, *args, **options) -> Tensor:
        norm = super().clip_gradients_norm(*args, **options)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _AllReduceLater(_BackwardSyncControl):
    """What Fabric.no_backward_sync does on shards: keep sums within each copy, all-reduce across them afterwards."""

    @contextmanager
    def no_backward_sync(self, module: FSDPModule, enabled: bool) -> Iterator[None]:
        module.set_requires_all_reduce(not enabled)
        try:
            yield
        finally:
            module.set_requires_all_reduce(True)


def build_model(fabric: Fabric, config: ModelConfig, args: StrategyArgs, seed: Optional[int]) -> _FabricModule:
    """The model as Fabric runs it, its GPT as `.module`; each rank has its part of the same weights.

    No rank ever holds more than its shard and one full parameter.

    Args:
        seed: of the weights, which it determines on any number of ranks; None leaves them undefined, to be loaded.
    """
    with torch.device("meta"):
        model = GPT(config)
    recompute_activations(model, args.activation_checkpointing)
    if isinstance(fabric.strategy, FullyShardedStrategy):
        shard(model, fabric.strategy.mesh, torch.bfloat16 if fabric.device.type == "cuda" else None)
    model.to_empty(device=fabric.device)
    model.tie_weights()
    if seed is not None:
        initialize(model, seed)
    wrapped = fabric.setup_module(model)
    if isinstance(fabric.strategy, CopiesStrategy):
        _lay_out_buckets(fabric, wrapped)
    return wrapped


def _lay_out_buckets(fabric: Fabric, model: nn.Module) -> None:
    """DDP lays out its buckets anew after the first backward pass, and with them the order of sums. Have that behind
    us, so that the first step of a resumed run is to the bit what that step is in a run that was not interrupted.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=fabric.device)
    fabric.backward(model(tokens, tokens).sum())
    model.zero_grad()


def shard(model: GPT, mesh: DeviceMesh, matrix_dtype: Optional[torch.dtype]) -> None:
    """Shard every parameter over the last dimension of the mesh, with copies over the first of two.

    The matrices of each block are gathered in matrix_dtype, as autocast would cast them anyway; the rest (norms, decay
    parameters, the embedding that starts the residual stream) stay in fp32, as under ddp.
    """
    matrices = MixedPrecisionPolicy(param_dtype=matrix_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], mesh=mesh, mp_policy=matrices)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Draw the weights that `torch.manual_seed(seed); GPT(config)` gives on a CPU, one full parameter at a time."""
    torch.manual_seed(seed)
    for module in model.modules():  # what PyTorch draws as it builds a layer, before we draw
        if isinstance(module, nn.Embedding):
            nn.Embedding(*module.weight.shape)
        elif isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key, parameter in own.items():
            module.register_parameter(key, nn.Parameter(torch.empty(parameter.shape)))
        model.init_module(name, module)
        for key, parameter in own.items():
            full = module.get_parameter(key)
            module.register_parameter(key, parameter)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                full = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
                parameter = parameter.to_local()
            parameter.copy_(full)


def recompute_activations(model: GPT, mode: Literal["none", "selective", "full"]) -> None:
    """Let each block keep less for its backward pass; the gradients stay the same."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing draws while training
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.transformer.h if mode != "none" else ():
        block.forward = partial(checkpoint, block.forward, **options)


def _keep_products(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Matrix products and softmax attention are dear to compute and small to keep; the recurrence of GDN-2 is the
    reverse.
    """
    kept = str(operator) in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


KEPT = {
    "aten.mm.default",
    "aten.addmm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "flash_attn._flash_attn_forward.default",
}
"""Operators whose results selective checkpointing keeps."""
