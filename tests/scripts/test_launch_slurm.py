"""scripts/launch_slurm.sh under a real Slurm of two nodes: it trains, leaves ahead of its limit, survives a node."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts.runs import ROOT, losses, wait_until
from tests.scripts.slurm import Slurm, why_not

SUBMIT = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: {why_not()}")]


@pytest.fixture(scope="module")
def slurm():
    with Slurm() as cluster:
        yield cluster


class Job:
    """A submitted run of two tasks on two nodes."""

    def __init__(self, slurm: Slurm, folder: Path, flags: list[str], *options: str, **variables: str):
        self.slurm, self.folder, self.run = slurm, folder, folder / "runs" / "outputs" / "debug_job"
        # the batch script runs where it was submitted: a folder that looks like the repository, so as to write its logs
        for name in ("pretrain.py", "data.py", "cache.py", "lit_gpt", "configs", "scripts"):
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        command = [*SUBMIT, *options, "scripts/launch_slurm.sh", *flags, f"--output_root={folder}/runs"]
        self.number = slurm.run(*command, "--exp_name=job", cwd=folder, **variables).strip()

    @property
    def output(self) -> str:
        """What the batch script printed."""
        path = self.folder / f"pretrain-{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def node_outputs(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("slurm-*/node*.log"))]

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        wait_until(lambda: condition() or self.state in ("FAILED", "COMPLETED"), seconds)
        everything = "\n".join([self.output, *self.node_outputs, self.slurm.logs()])
        assert condition(), f"waited for {what}, job is {self.state}\n{everything}"

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def cancel(self) -> None:
        self.slurm.run("scancel", self.number)
        self.slurm.wait_for(lambda: set(self.slurm.node_states().values()) == {"IDLE"}, "idle nodes", 90)
        assert self.state == "CANCELLED", self.output


def test_a_job_leaves_ahead_of_its_limit_is_requeued_and_goes_on_bit_for_bit(slurm, long_run, undisturbed, tmp_path):
    """Slurm sends the signal up to 30 s early and looks every 30 s: here between 60 and 90 seconds after the start."""
    job = Job(slurm, tmp_path, long_run, "--time=3", "--signal=USR1@90")
    job.wait(lambda: "start 2: 2 nodes" in job.output, "the requeue")
    assert "left early: job" in job.output and int(slurm.job(job.number)["Restarts"]) == 1
    left_after = int(re.search(r"left on SIGUSR1 after step ([\d,]+)", job.node_outputs[0])[1].replace(",", ""))
    assert left_after >= 10
    job.wait(lambda: len(losses(job.run)) >= left_after + 10, "10 steps more")
    assert f"resuming: step-{left_after:08d}" in job.node_outputs[0]  # not a step twice
    job.cancel()
    assert "left early, ended by Slurm" in job.output and "left on SIGTERM" in job.node_outputs[0]
    assert not job.output.count("start 3")
    ours = losses(job.run)
    assert ours == undisturbed(len(ours))


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["the node of the batch script", "the other node"])
def test_a_job_whose_node_dies_goes_on_bit_for_bit(node, slurm, long_run, undisturbed, tmp_path):
    job = Job(slurm, tmp_path, long_run, "--time=30")
    job.wait(lambda: len(losses(job.run)) >= 60, "60 steps")
    slurm.kill_node(node)
    slurm.wait_for(lambda: slurm.job(job.number)["Restarts"] == "1", "Slurm's own requeue")
    reached = len(losses(job.run))
    slurm.start_node(node)
    job.wait(lambda: len(losses(job.run)) >= reached + 30, "30 steps more")
    job.cancel()
    assert "start 1: 2 nodes" in job.output and "start 2: 2 nodes" in job.output
    assert re.search(r"resuming: step-\d+", "".join(job.node_outputs))
    assert len(job.node_outputs) == 2
    ours = losses(job.run)
    assert ours == undisturbed(len(ours))


def test_a_job_with_a_killed_task_goes_on_bit_for_bit(slurm, long_run, undisturbed, tmp_path):
    job = Job(slurm, tmp_path, long_run, "--time=30")
    job.wait(lambda: len(losses(job.run)) >= 30, "30 steps")
    for task in slurm.tasks("n2"):
        os.kill(task, signal.SIGKILL)
    job.wait(lambda: "start 2: 2 nodes" in job.output, "the requeue")
    reached = len(losses(job.run))
    job.wait(lambda: len(losses(job.run)) >= reached + 10, "10 steps more")
    job.cancel()
    assert "failed with exit code 137" in job.output and "failed: job" in job.output
    assert re.search(r"resuming: step-\d+", job.node_outputs[0])
    ours = losses(job.run)
    assert ours == undisturbed(len(ours))


def test_a_job_that_fails_again_and_again_stops(slurm, long_run, tmp_path):
    job = Job(slurm, tmp_path, long_run, "--time=30", PYTHON="false", MAX_RESTARTS="1")
    slurm.wait_for(lambda: job.state == "FAILED", "the end of it", 120)
    assert job.output.count("failed with exit code 1: see") == 2 and "start 3" not in job.output
    assert "failed 2 times in a row" in job.output


def test_what_cannot_be_is_refused_in_the_log(slurm, long_run, tmp_path):
    job = Job(slurm, tmp_path, [*long_run, "--nnodes=3"], "--time=30")
    slurm.wait_for(lambda: job.state == "FAILED", "the refusal")
    assert "--nnodes 3, but srun started 2 x 1 processes" in job.node_outputs[0]
    assert "failed with exit code 2" in job.output and slurm.job(job.number)["ExitCode"] == "2:0"


def test_a_run_in_a_container_finishes(slurm, long_run, tmp_path):
    """With a stand-in for apptainer that notes what it is asked for, and runs it here."""
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n[ "$1" = exec ] && shift 6 && exec "$@"\n')
    stand_in.chmod(0o755)
    variables = {"CONTAINER": "image.sif", "CONTAINER_MOUNTS": "/data"}
    variables["PATH"] = f"{stand_in.parent}:{os.environ['PATH']}"
    job = Job(slurm, tmp_path, [*long_run, "--total_tokens=2048"], "--time=30", **variables)
    slurm.wait_for(lambda: job.state in ("COMPLETED", "FAILED"), "the end of the run")
    assert job.state == "COMPLETED" and "finished." in job.output, "".join([job.output, *job.node_outputs])
    asked = (tmp_path / "asked").read_text().splitlines()
    start = f"exec --bind {tmp_path},/data --pwd {tmp_path} image.sif {sys.executable} pretrain.py --nnodes 2 "
    assert len(asked) == 2 and all(line.startswith(start) for line in asked)
    assert len(losses(job.run)) == 4
