"""Runs that are left early and gone on with: signals and the time limit, whenever and to whichever process."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pretrain
from data import ValidationData
from lit_gpt.training.records import read_metrics
from tests.runs import STEPS, command_line, losses

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def outcome(folder: Path) -> tuple:
    """All that a disturbance must not change: losses, evaluations, and the last checkpoint's tensors to the bit."""
    evaluations = [
        {k: r[k] for k in r if k != "seconds"} for r in read_metrics(folder / "metrics.jsonl") if "blocks" in r
    ]
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in last.glob("*.safetensors")}
    assert tensors
    return losses(folder), evaluations, tensors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus, tiny_model):
    root = tmp_path_factory.mktemp("undisturbed")
    pretrain.setup(command_line(tiny_corpus, tiny_model, root))
    return outcome(root / "outputs" / "debug_test")


@pytest.fixture
def command(tiny_corpus, tiny_model, tmp_path):
    return lambda **flags: command_line(tiny_corpus, tiny_model, tmp_path, **flags)


def at_call(monkeypatch, owner: object, name: str, call: int, act) -> None:
    """Do `act()` just before the given call of a function."""
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


PLACES = {
    "start": (pretrain, "open_data", 1, 0),
    "first step": (pretrain, "accumulate", 1, 1),
    "step": (pretrain, "accumulate", 9, 9),
    "evaluation": (ValidationData, "batch", 3, 20),
    "save": (pretrain.Checkpoints, "save", 1, 18),
    "last step": (pretrain, "accumulate", STEPS, STEPS),
    "last evaluation": (ValidationData, "batch", 11, STEPS),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_a_signal_ended_goes_on_bit_for_bit(place, undisturbed, command, tmp_path, monkeypatch, capsys):
    owner, name, call, step = PLACES[place]
    number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[list(PLACES).index(place) % 3]

    def send() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.05)  # for the thread that hears it

    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, send)
        with pytest.raises(SystemExit) as stop:
            pretrain.setup(command())
    assert stop.value.code == 75
    folder = tmp_path / "outputs" / "debug_test"
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"left on {number.name} after step {step:,}: ") and "The same command goes on" in last
    assert len(losses(folder)) == step and not (folder / "summary.json").exists()
    if step:
        saved = folder / "checkpoints" / f"step-{step:08d}"
        assert str(saved) in last and (saved / "manifest.json").exists()
    pretrain.setup(command())
    assert outcome(folder) == undisturbed and (folder / "summary.json").exists()


def test_the_time_limit(undisturbed, command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, pretrain, "accumulate", 12, lambda: time.sleep(2))
        with pytest.raises(SystemExit) as stop:
            pretrain.setup(command(time_limit="2s"))
    assert stop.value.code == 75
    assert "left on the time limit after step" in capsys.readouterr().out.splitlines()[-1]
    pretrain.setup(command())
    assert outcome(tmp_path / "outputs" / "debug_test") == undisturbed


def test_leaving_again_and_again_makes_progress_and_no_difference(undisturbed, command, tmp_path, monkeypatch):
    folder = tmp_path / "outputs" / "debug_test"
    for _ in range(STEPS):
        with monkeypatch.context() as patch:
            at_call(patch, pretrain, "accumulate", 6, lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.05)))
            try:
                pretrain.setup(command())
                break
            except SystemExit as stop:
                assert stop.code == 75
    assert outcome(folder) == undisturbed


def test_a_bad_time_limit_is_refused(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(command(time_limit="3 hours"))
    assert stop.value.code == 2 and "3h30m" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that it started, those of the ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def start(argv: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *argv],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses(folder)) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


TWO_RANKS = {"devices": 2, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def undisturbed_by_two(tmp_path_factory, tiny_corpus, tiny_model):
    root = tmp_path_factory.mktemp("two")
    process = start(command_line(tiny_corpus, tiny_model, root, **TWO_RANKS))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return outcome(root / "outputs" / "debug_test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "to, number, step",
    [
        ("the command", signal.SIGTERM, 3),
        ("its group", signal.SIGINT, 7),
        ("rank 0", signal.SIGUSR1, 5),
        ("rank 1", signal.SIGTERM, 11),
        ("rank 1", signal.SIGUSR1, 0),
    ],
)
def test_two_ranks_leave_together(to, number, step, undisturbed_by_two, command, tmp_path):
    folder = tmp_path / "outputs" / "debug_test"
    process = start(command(**TWO_RANKS))
    if step:
        wait_for_step(process, folder, step)
    else:  # right after the start, before the ranks have imported anything
        while len(ranks_of(process)) < 2 and process.poll() is None:
            time.sleep(0.01)
    targets = {"the command": process.pid, "its group": -process.pid}
    target = targets[to] if to in targets else ranks_of(process)[int(to[-1])]
    os.kill(target, number) if target > 0 else os.killpg(-target, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"left on {number.name} after step" in out and "Traceback" not in err
    again = start(command(**TWO_RANKS))
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert outcome(folder) == undisturbed_by_two


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the command", "rank 1"])
def test_a_second_signal_ends_two_ranks_at_once(to, command, tmp_path):
    folder = tmp_path / "outputs" / "debug_test"
    process = start(command(**TWO_RANKS, total_tokens=10**7))
    wait_for_step(process, folder, 3)
    ranks = ranks_of(process)
    target = process.pid if to == "the command" else ranks[1]
    os.kill(ranks[0], signal.SIGSTOP)  # so that the agreement to leave has to wait
    os.kill(target, signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(target, signal.SIGTERM)
    process.communicate(timeout=30)  # whoever waited for the stopped rank would wait for longer
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
