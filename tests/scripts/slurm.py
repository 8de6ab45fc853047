"""A real Slurm on this machine: munged, slurmctld and two slurmd, each a node, in a folder of its own."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from tests.scripts.runs import ENVIRONMENT

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=60
OverTimeLimit=0
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def why_not() -> Optional[str]:
    """Why no Slurm can be started here; None where one can."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.getuid() != 0:
        return "slurmd starts jobs only as root"
    return None


class Slurm:
    """Two nodes named n1 and n2, both this machine, while it is open."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has at most 107 letters
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Slurm":
        self.folder.chmod(0o755)
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        configuration = CONFIGURATION.format(folder=self.folder, host=socket.gethostname(), ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(configuration)
        self.environment = {**ENVIRONMENT, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            munge = self.folder / "munge"
            files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
            self._daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
            self.wait_for(lambda: (munge / "socket").exists(), "munged")
            self._daemon("slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_for(lambda: set(self.node_states().values()) == {"IDLE"}, "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=30, capture_output=True)
        for node in NODES:
            self.kill_node(node)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, cwd: Optional[Path] = None, **variables: str) -> str:
        """What a command of Slurm prints; it has to succeed."""
        environment = {**self.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=cwd, timeout=60, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Everything that Slurm knows of a job, by name: JobState, Restarts, ExitCode ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def node_states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %T"], env=self.environment, timeout=30, capture_output=True
        )
        return {node: state.upper() for node, state in re.findall(r"(n\d) (\S+)", done.stdout.decode())}

    def start_node(self, node: str) -> None:
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def tasks(self, node: str) -> list[int]:
        """The processes of jobs on a node."""
        return _processes_of(node, self.folder)[1]

    def kill_node(self, node: str) -> None:
        """End everything that runs on a node at once, as a failure of its power does: slurmd, steps and their tasks."""
        daemon = self.daemons.pop(f"slurmd-{node}", None)
        if daemon:
            daemon.kill()
            daemon.wait()
        daemons, tasks = _processes_of(node, self.folder)
        for process in daemons + tasks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))

    def _daemon(self, name: str, *command: str) -> None:
        command = command if command[0] in PROGRAMS else (name, *command)
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to anyone who asks: a node that comes back needs its own again."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(25_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def _processes_of(node: str, folder: Path) -> tuple[list[int], list[int]]:
    """Step daemons of a node, known by the log that they hold open, then what they started, known by its variables."""
    daemons, tasks = [], []
    log, name, configuration = folder / f"slurmd-{node}.log", f"SLURMD_NODENAME={node}", f"SLURM_CONF={folder}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_text(errors="replace").split("\0")
            if name in variables and any(v.startswith(configuration) for v in variables):
                tasks.append(int(process.name))
            elif any(os.readlink(link) == str(log) for link in (process / "fd").iterdir()):
                daemons.append(int(process.name))
    return daemons, tasks
