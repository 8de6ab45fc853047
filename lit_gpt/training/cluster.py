"""Which processes make up a run: those that srun or torchrun started, or those that it starts itself."""

import os
import re
from dataclasses import dataclass

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from lit_gpt.errors import UserError
from lit_gpt.training.args import PretrainArgs

LAUNCHER_VARIABLES = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LAUNCHER_VARIABLES += ("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Processes:
    """One process per device, the same number on every node."""

    nodes: int
    devices: int
    """Processes on each node."""
    environment: ClusterEnvironment
    """How Fabric finds its rank among them."""

    @property
    def to_be_started(self) -> bool:
        """Whether nobody has started them yet, and one process will not do."""
        return self.nodes * self.devices > 1 and not self.environment.creates_processes_externally


def processes(args: PretrainArgs, cuda: bool) -> Processes:
    """The processes of this run, from the environment that srun or torchrun made, or else from the flags.

    Raises:
        UserError: --nnodes, --devices or the GPUs of this machine do not fit the processes that there are.
    """
    if args.devices != "auto" and not (args.devices.isdigit() and int(args.devices) >= 1):
        raise UserError(f"--devices should be a number or auto, not {args.devices!r}.")
    if args.interactive_job:
        if args.nnodes > 1:
            raise UserError(f"--interactive_job is for this machine alone, but --nnodes is {args.nnodes}: drop one.")
        _forget_launchers()
    elif TorchElasticEnvironment.detect():
        nodes, devices = (int(os.environ[name]) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if nodes * devices != int(os.environ["WORLD_SIZE"]):
            raise UserError("torchrun started unlike numbers of processes on its nodes: use one --nproc_per_node.")
        return _joined("torchrun", nodes, devices, TorchElasticEnvironment, args, cuda)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # a task of srun; a lone one is as good as any process
        uniform = re.fullmatch(r"(\d+)(?:\(x\d+\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
        if uniform is None:
            raise UserError("srun started unlike numbers of tasks on its nodes: use --ntasks-per-node.")
        os.environ["SLURM_NTASKS_PER_NODE"] = uniform[1]  # Fabric asks for it, and `srun --ntasks` does not set it
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        return _joined("srun", nodes, int(uniform[1]), SLURMEnvironment, args, cuda)

    if args.nnodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"--nnodes {args.nnodes}, but neither srun nor torchrun started this process: "
            "use scripts/launch_slurm.sh or scripts/launch_torchrun.sh."
        )
    devices = int(args.devices) if args.devices != "auto" else torch.cuda.device_count() if cuda else 1
    _check_gpus(devices, cuda, f"--devices {devices}")
    return Processes(max(args.nnodes, 1), devices, LightningEnvironment())


def _joined(
    launcher: str, nodes: int, devices: int, environment: type[ClusterEnvironment], args: PretrainArgs, cuda: bool
) -> Processes:
    """Processes that are there already; flags that say otherwise are refused."""
    there = f"but {launcher} started {nodes} x {devices} processes (nodes x devices)"
    if args.nnodes and args.nnodes != nodes:
        raise UserError(f"--nnodes {args.nnodes}, {there}. Leave the flag out, or start as many.")
    if args.devices != "auto" and int(args.devices) != devices:
        raise UserError(f"--devices {args.devices}, {there}. Leave the flag out, or start as many.")
    _check_gpus(devices, cuda, f"{launcher} started {devices} processes here")
    return Processes(nodes, devices, environment())


def _check_gpus(devices: int, cuda: bool, what: str) -> None:
    if cuda and devices > torch.cuda.device_count():
        raise UserError(
            f"{what}, but this process sees {torch.cuda.device_count()} GPUs. "
            "Each process needs to see all GPUs of its machine, one for each process."
        )


def _forget_launchers() -> None:
    """Drop what a launcher left in the environment, but in a process that this run itself started."""
    if "LOCAL_RANK" not in os.environ or TorchElasticEnvironment.detect():
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
