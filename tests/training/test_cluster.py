"""Which processes make up a run, by the environments that launchers make."""

import os
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lit_gpt.errors import UserError
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.cluster import LAUNCHER_VARIABLES, processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
TORCHRUN |= {"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
SRUN |= {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment to what a launcher makes, and nothing else of launchers."""

    def make(values: dict) -> None:
        for name in [*LAUNCHER_VARIABLES, *(n for n in os.environ if n.startswith("SLURM_"))]:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return make


def flags(**given) -> PretrainArgs:
    return PretrainArgs(train_config="debug", model_name="m", output_root=Path("o"), exp_name="n", **given)


@pytest.mark.parametrize(
    "values, given, nodes, devices, kind",
    [
        ({}, {}, 1, 1, LightningEnvironment),
        ({}, {"devices": "3"}, 1, 3, LightningEnvironment),
        ({"MASTER_ADDR": "10.0.0.1"}, {"devices": "3", "nnodes": 2}, 2, 3, LightningEnvironment),
        (TORCHRUN, {}, 2, 4, TorchElasticEnvironment),
        (TORCHRUN, {"nnodes": 2, "devices": "4"}, 2, 4, TorchElasticEnvironment),
        (SRUN, {}, 3, 2, SLURMEnvironment),
        (SRUN, {"nnodes": 3, "devices": "2"}, 3, 2, SLURMEnvironment),
        (SRUN | TORCHRUN, {}, 2, 4, TorchElasticEnvironment),  # srun started torchrun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, {"devices": "3"}, 1, 3, LightningEnvironment),
        ({"SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, {}, 1, 1, LightningEnvironment),  # a batch script without srun
        (TORCHRUN, {"interactive_job": True, "devices": "3"}, 1, 3, LightningEnvironment),
        (SRUN, {"interactive_job": True}, 1, 1, LightningEnvironment),
    ],
)
def test_the_environment_says_which_processes_there_are(values, given, nodes, devices, kind, environment):
    environment(values)
    found = processes(flags(**given), cuda=False)
    assert (found.nodes, found.devices, type(found.environment)) == (nodes, devices, kind)
    if kind is SLURMEnvironment:
        assert (found.environment.global_rank(), found.environment.world_size()) == (4, 6)
    if given.get("interactive_job"):
        assert not found.environment.creates_processes_externally and "MASTER_ADDR" not in os.environ


def test_a_process_that_an_interactive_job_started_keeps_its_rank(environment):
    environment({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"})
    processes(flags(interactive_job=True, devices="2"), cuda=False)
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "values, given, words",
    [
        ({}, {"devices": "many"}, ["--devices", "many"]),
        ({}, {"devices": "0"}, ["--devices", "0"]),
        ({}, {"nnodes": 2}, ["--nnodes 2", "launch_slurm.sh", "launch_torchrun.sh"]),
        ({}, {"nnodes": 2, "interactive_job": True}, ["--interactive_job", "--nnodes"]),
        (TORCHRUN, {"nnodes": 3}, ["--nnodes 3", "torchrun started 2 x 4"]),
        (TORCHRUN, {"devices": "8"}, ["--devices 8", "torchrun started 2 x 4"]),
        (TORCHRUN | {"WORLD_SIZE": "7"}, {}, ["torchrun", "--nproc_per_node"]),
        (SRUN, {"nnodes": 1}, ["--nnodes 1", "srun started 3 x 2"]),
        (SRUN, {"devices": "1"}, ["--devices 1", "srun started 3 x 2"]),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, {}, ["srun", "--ntasks-per-node"]),
    ],
)
def test_flags_against_the_environment_are_refused_in_one_line(values, given, words, environment):
    environment(values)
    with pytest.raises(UserError) as refusal:
        processes(flags(**given), cuda=False)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("values, given", [({}, {"devices": "8"}), (SRUN, {}), (TORCHRUN, {})])
def test_more_processes_than_gpus_are_refused(values, given, environment, monkeypatch):
    environment(values)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="sees 1 GPUs"):
        processes(flags(**given), cuda=True)
