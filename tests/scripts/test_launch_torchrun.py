"""scripts/launch_torchrun.sh: two agents as two nodes, one of them killed; one-line refusals."""

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.scripts.runs import ENVIRONMENT, ROOT, losses, wait_until

SCRIPT = ROOT / "scripts" / "launch_torchrun.sh"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--nnodes", "2"], ["--rdzv_endpoint"]),
        (["--nnodes"], ["--nnodes needs a value"]),
        (["--nnodes", "two"], ["at least 1", "two"]),
        (["--nproc_per_node", "1", "--max_restarts", "-1"], ["--max_restarts"]),
    ],
)
def test_mistakes_end_in_one_line(flags, words):
    done = subprocess.run([SCRIPT, *flags], env=ENVIRONMENT, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)


@pytest.mark.slow
def test_what_pretraining_refuses_is_refused_once(tmp_path):
    """Not again for every restart, and without torchrun's traceback."""
    flags = ["--model_name", "nosuch", "--train_config", "debug", "--output_root", tmp_path, "--exp_name", "x"]
    done = subprocess.run(
        [SCRIPT, "--nproc_per_node", "1", *flags], env=ENVIRONMENT, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_signal_while_workers_import_is_heard_later_and_starts_nothing_again(long_run, tmp_path):
    command = [SCRIPT, "--nproc_per_node", "1", *long_run, f"--output_root={tmp_path}", "--exp_name=early"]
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}  # where workers tell that they are there
    script = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests too may run under nohup
    )  # fmt: skip
    assert wait_until(lambda: list(tmp_path.glob("tmp.*/worker-0")), 60)
    script.send_signal(signal.SIGHUP)
    out, _ = script.communicate(timeout=120)
    assert script.returncode == 75 and "left on SIGTERM after step" in out, out


@pytest.fixture
def start(long_run, tmp_path):
    """Starts the script twice, as two nodes of one run; ends what is left of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def both(*options: str) -> list[subprocess.Popen]:
        meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", endpoint, *options]
        for node in range(2):
            with open(tmp_path / f"node{node}.log", "ab") as log:
                command = [SCRIPT, *meet, "--node_rank", str(node), *long_run, f"--output_root={tmp_path}"]
                started.append(
                    subprocess.Popen(
                        [*command, "--exp_name=run"], env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
                    )
                )
        return started[-2:]

    yield both
    for script in started:
        if script.poll() is None:
            for process in [script.pid, *below(script.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            script.wait()


def below(parent: int) -> list[int]:
    """Every process that comes from this one."""
    children = ""
    with suppress(OSError):  # it may be over by now, as the script's `sleep 1` soon is
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [process for child in map(int, children.split()) for process in [child, *below(child)]]


def process_of(script: subprocess.Popen, command: bytes, variable: bytes = b"") -> int:
    """The process below a script with this in its command line, and that in its environment."""
    for process in below(script.pid):
        proc = Path(f"/proc/{process}")
        with suppress(OSError):
            if command in (proc / "cmdline").read_bytes() and variable in (proc / "environ").read_bytes():
                return process
    raise AssertionError(f"no {command}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the node of the endpoint", "the other node"])
def test_a_killed_agent_is_restarted_and_the_run_goes_on_bit_for_bit(victim, start, undisturbed, tmp_path):
    folder = tmp_path / "outputs" / "debug_run"
    scripts = start("--restart")

    def reaches(step: int) -> None:
        done = wait_until(lambda: len(losses(folder)) >= step or any(s.poll() is not None for s in scripts), 240)
        logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("node*.log")))
        assert done and len(losses(folder)) >= step, f"waited for step {step}\n{logs}"

    reaches(40)
    os.kill(process_of(scripts[victim], b"torch.distributed.run"), signal.SIGKILL)
    wait_until(lambda: "starting again" in (tmp_path / f"node{victim}.log").read_text(), 60)
    reached = len(losses(folder))
    reaches(reached + 30)
    assert "resuming: step-" in "".join(path.read_text() for path in tmp_path.glob("node*.log"))
    ours = losses(folder)
    assert ours == undisturbed(len(ours))


@pytest.mark.slow
def test_a_signal_to_one_script_ends_all_with_75_and_the_same_command_goes_on(start, undisturbed, tmp_path):
    folder = tmp_path / "outputs" / "debug_run"
    scripts = start()
    assert wait_until(lambda: len(losses(folder)) >= 30, 240), (tmp_path / "node0.log").read_text()
    scripts[1].send_signal(signal.SIGTERM)
    assert [script.wait(timeout=120) for script in scripts] == [75, 75]
    for node in range(2):
        log = (tmp_path / f"node{node}.log").read_text()
        assert "left early (exit code 75)" in log and "Traceback" not in log
    reached = len(losses(folder))
    start("--max_restarts", "0")
    assert wait_until(lambda: len(losses(folder)) >= reached + 10, 240), (tmp_path / "node0.log").read_text()
    assert f"resuming: step-{reached:08d}" in "".join(path.read_text() for path in tmp_path.glob("node*.log"))
    ours = losses(folder)
    assert ours == undisturbed(len(ours))


@pytest.mark.slow
def test_a_second_signal_ends_everything_at_once(start, tmp_path):
    folder = tmp_path / "outputs" / "debug_run"
    scripts = start()
    assert wait_until(lambda: len(losses(folder)) >= 10, 240), (tmp_path / "node0.log").read_text()
    everything = below(scripts[0].pid)
    for child in everything:  # so that the first signal finds nobody who could leave
        with suppress(ProcessLookupError):  # the script's own `sleep 1`
            os.kill(child, signal.SIGSTOP)
    scripts[0].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    scripts[0].send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for child in everything:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)
    assert scripts[0].wait(timeout=30) not in (0, 2, 75)
    assert wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in everything), 10)


@pytest.mark.slow
def test_a_frozen_worker_is_not_waited_for_when_the_other_leaves_a_hang(long_run, tmp_path):
    folder = tmp_path / "outputs" / "debug_frozen"
    flags = ["--exp_name=frozen", f"--output_root={tmp_path}", "--hang_minutes=0.1", "--hang_exit=true"]
    command = [SCRIPT, "--nproc_per_node", "2", *long_run, *flags]
    with open(tmp_path / "log", "ab") as log:
        script = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    said = lambda: (tmp_path / "log").read_text()
    try:
        assert wait_until(lambda: len(losses(folder)) >= 10, 120), said()
        everything = below(script.pid)
        os.kill(process_of(script, b"pretrain.py\0--nnodes", b"LOCAL_RANK=1\0"), signal.SIGSTOP)
        assert script.wait(timeout=150) == 75, said()
    finally:
        script.kill()
    assert "rank 0: nothing done for" in said() and "had not ended 60 seconds after another left: killed." in said()
    assert wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in everything), 10)
