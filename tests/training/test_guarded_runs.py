"""Runs in which something is not finite, spikes, or hangs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain
from data import TrainData
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training.guards import Guard, SpikeDetector
from lit_gpt.training.leaving import Leaving
from lit_gpt.training.records import read_metrics
from lit_gpt.training.replay import KeptBatch
from tests.ranks import run_ranks
from tests.runs import command_line, losses

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tiny_corpus, tiny_model, tmp_path):
    return lambda **flags: command_line(tiny_corpus, tiny_model, tmp_path, **flags)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "outputs" / "debug_test"


def events(folder: Path) -> list[dict]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "event" in r]


def spoil(monkeypatch, steps: dict[int, float], where: str = "gradient") -> None:
    """Multiply the gradient, or the loss, of these steps by a number."""
    real, done = pretrain.accumulate, []

    def spoilt(run, model, batches):
        loss = real(run, model, batches)
        factor = steps.get(run.step)
        done.append(run.step)
        if factor is not None and where == "gradient":
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
        return loss if factor is None or where == "gradient" else loss * factor

    monkeypatch.setattr(pretrain, "accumulate", spoilt)


INJECTION = """
import hashlib, torch
from lit_gpt.model import GPT
real_accumulate, real_fit = pretrain.accumulate, pretrain.fit
def accumulate(run, model, batches):
    loss = real_accumulate(run, model, batches)
    if run.step == 5 and rank == 1:  # after the gradients were reduced: in this rank alone
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        getattr(gradient, "_local_tensor", gradient).view(-1)[0] = float("nan")
    return loss * float("inf") if run.step == 9 and rank == 0 else loss
def fit(run, model, optimizer, *rest):
    real_fit(run, model, optimizer, *rest)
    full = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    finite = all(bool(p.isfinite().all()) for p in full)
    digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in full)).hexdigest()
    print("weights", digest, "finite" if finite else "not finite", run.guard.counts)
pretrain.accumulate, pretrain.fit = accumulate, fit
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_what_one_rank_has_is_skipped_by_all(strategy, command, folder, tiny_corpus):
    flags = {"micro_batch_size": 1, "total_tokens": 12 * 128, "strategy": strategy, "health_step_interval": 4}
    results = run_ranks(2, INJECTION, command(**flags))
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    weights = [next(line for line in out.splitlines() if line.startswith("weights")) for _, out, _ in results]
    assert weights[0] == weights[1] and " finite " in weights[0] and "'skipped_steps': 2" in weights[0]
    assert [(e["step"], e["event"], e["skipped"]) for e in events(folder)] == [
        (step, "not finite", True) for step in (5, 9)
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped_steps"] == 2 and summary["step"] == 12
    of_all = [loss for _, loss in losses(folder)]
    assert of_all[8] is None and all(loss is not None for i, loss in enumerate(of_all) if i != 8)

    data = TrainData(tiny_corpus, 32, seed=3407)
    seen = []
    for rank in (0, 1):
        kept = KeptBatch.open(folder / "skipped" / f"step-00000009-rank{rank}.npz")
        assert (kept.step, kept.rank, kept.world_size) == (9, rank, 2)
        for numbers, batch in zip(kept.sequences, kept.batches):
            seen += numbers.tolist()
            for number, tokens in zip(numbers.tolist(), batch.tokens):
                assert torch.equal(tokens, data.batch(number, 1).tokens[0])
    assert sorted(seen) == [32, 33, 34, 35]  # of the ninth step

    dump = folder / "skipped" / "step-00000005-rank1.npz"
    replay = [sys.executable, str(ROOT / "scripts" / "replay_batch.py"), str(folder), str(dump), "--accelerator=cpu"]
    done = subprocess.run(replay, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no sound checkpoint at or before step 5" in done.stderr


def test_a_skipped_step_leaves_weights_alone_and_position_not(command, folder, monkeypatch, capsys):
    """As if the learning rate of that step had been 0, but for AdamW's moments, which it does not touch either."""
    spoil(monkeypatch, {7: float("nan"), 8: float("inf")})
    before = {}
    real = Guard.judge

    def judge(self, step, loss, grad_norm, optimizer):
        state = [p for group in optimizer.param_groups for p in group["params"]]
        state += [t for s in optimizer.state.values() for t in s.values()]
        before[step] = [t.detach().clone() for t in state]
        real(self, step, loss, grad_norm, optimizer)

    monkeypatch.setattr(Guard, "judge", judge)
    pretrain.setup(command(total_tokens=10 * 128, save_step_interval=6))
    assert all(torch.equal(a, b) for a, b in zip(before[7], before[9]))
    assert not any(torch.equal(a, b) for a, b in zip(before[6], before[7]))
    assert not any(torch.equal(a, b) for a, b in zip(before[9], before[10]))
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "lr" in r] == list(range(1, 11))
    out = capsys.readouterr().out
    assert "step       7  not finite: loss" in out and "step-00000007-rank0.npz" in out

    replay = [sys.executable, str(ROOT / "scripts" / "replay_batch.py"), str(folder)]
    replay += [str(folder / "skipped" / "step-00000007-rank0.npz"), "--accelerator=cpu"]
    done = subprocess.run(replay, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Weights of step-00000006: those it met" in done.stdout, done.stderr
    assert all(f"│ {number} " in done.stdout for number in (24, 25, 26, 27)) and "block 1" in done.stdout
    assert "All is finite here" in done.stdout
    tokens = KeptBatch.open(folder / "skipped" / "step-00000007-rank0.npz").batches[0].tokens[0]
    assert " ".join(Tokenizer(folder / "tokenizer").decode(tokens).split())[:20] in done.stdout


def test_too_many_in_a_row_end_the_run_and_older_checkpoints_stay(command, folder, monkeypatch, capsys):
    spoil(monkeypatch, dict.fromkeys([18, *range(20, 30)], float("nan")))
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(command(max_skipped_in_a_row=4, log_step_interval=10))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: 4 steps in a row, up to step 23,") and err.count("\n") == 1
    assert "replay_batch.py" in err and [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000017"]
    del stop


def test_the_count_in_a_row_goes_on_across_a_resume(command, monkeypatch, capsys):
    spoil(monkeypatch, dict.fromkeys(range(16, 30), float("nan")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Leaving, "votes", lambda self, device: torch.tensor([1.0, 0, 0, 0]) * (len(saw) == 17))
        real, saw = pretrain.Records.step, []
        patch.setattr(pretrain.Records, "step", lambda self, step: (saw.append(step), real(self, step)))
        pretrain.setup(command(max_skipped_in_a_row=4))
    assert stop.value.code == 75
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(command(max_skipped_in_a_row=4))
    assert stop.value.code == 2 and "4 steps in a row, up to step 19," in capsys.readouterr().err


@pytest.mark.parametrize("skip", [False, True])
def test_spikes_are_told_and_skipped_if_asked(skip, command, folder, monkeypatch, capsys):
    monkeypatch.setattr(SpikeDetector, "HORIZON", 16)
    spoil(monkeypatch, {30: 50.0})
    pretrain.setup(command(skip_spikes=str(skip).lower(), grad_clip=0))
    (event,) = events(folder)
    assert (event["step"], event["event"], event["skipped"]) == (30, "spike", skip)
    assert event["deviations"][1] > 6 > event["deviations"][0]
    assert "step      30  spike: loss" in capsys.readouterr().out
    assert (folder / "skipped" / "step-00000030-rank0.npz").exists() == skip
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["spikes"], summary["skipped_steps"]) == (1, int(skip))


def test_spikes_are_judged_alike_across_a_resume(command, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(SpikeDetector, "HORIZON", 16)
    spoil(monkeypatch, {25: 30.0, 36: 30.0})
    pretrain.setup(command(skip_spikes="true", spike_deviations=4, output_root=tmp_path / "whole"))
    whole = tmp_path / "whole" / "outputs" / "debug_test"
    real, saved = pretrain.Records.checkpoints, []

    def stop_after_the_second(self, ended):
        real(self, ended)
        saved.extend(ended)
        if len(saved) == 2:
            raise KeyError("stands in for whatever ends a process")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(pretrain.Records, "checkpoints", stop_after_the_second)
        pretrain.setup(command(skip_spikes="true", spike_deviations=4))
    pretrain.setup(command(skip_spikes="true", spike_deviations=4))
    assert losses(folder) == losses(whole) and events(folder) == events(whole)
    assert len(events(whole)) >= 2


def test_an_ordinary_step_never_waits_for_the_device(command, monkeypatch):
    """No tensor becomes a Python number between two log steps but through the delayed read."""
    reads, real_accumulate, real_settle = {}, pretrain.accumulate, Guard.settle

    class Reads(TorchDispatchMode):
        step = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.setdefault(self.step, []).append(str(operator))
            return operator(*args, **(kwargs or {}))

    mode = Reads()

    def accumulate(run, model, batches):
        mode.step = run.step
        return real_accumulate(run, model, batches)

    waits = {}

    def settle(self, wait):
        waits[mode.step] = wait
        return real_settle(self, wait)

    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    monkeypatch.setattr(Guard, "settle", settle)
    with mode:
        pretrain.setup(
            command(log_step_interval=10, save_step_interval=30, eval_step_interval=30, total_tokens=30 * 128)
        )
    assert [step for step, wait in waits.items() if wait] == [10, 20, 30]
    assert not [step for step in range(2, 30) if step in reads], reads


def test_a_log_of_steps_that_are_not_finite_is_json(command, folder, monkeypatch):
    spoil(monkeypatch, {3: float("nan"), 5: float("inf")}, where="loss")
    pretrain.setup(command(total_tokens=6 * 128))

    def refuse(name):
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines if "lr" in line] == [False, False, True, False, True, False]


HANG = """
import time
real = pretrain.accumulate
def accumulate(run, model, batches):
    if run.step == 4 and rank == 1:
        time.sleep(300)  # this rank never comes; the other waits for it in a collective
    return real(run, model, batches)
pretrain.accumulate = accumulate
"""


def test_a_hang_leaves_the_stacks_of_every_rank(command, folder):
    flags = {"micro_batch_size": 1, "hang_minutes": 0.06, "hang_exit": "true"}
    results = run_ranks(2, HANG, command(**flags))
    assert [code for code, _, _ in results] == [75, 75]
    for rank, (_, _, err) in enumerate(results):
        path = folder / "stacks" / f"rank{rank}.txt"
        assert f"rank {rank}: nothing done for" in err and str(path) in err
        stacks = path.read_text()
        assert "most recent call first" in stacks and "in fit" in stacks and "pretrain.py" in stacks
    assert "in accumulate" in (folder / "stacks" / "rank1.txt").read_text()


@pytest.mark.slow
def test_health_of_shards_is_that_of_the_whole_and_changes_nothing(command, tmp_path):
    flags = {"micro_batch_size": 1, "total_tokens": 12 * 128}
    found = {}
    for name, ranks, others in (
        ("one", 1, {"health_step_interval": 3}),
        ("shards", 2, {"health_step_interval": 3, "strategy": "fsdp2"}),
        ("unwatched", 2, {"health_step_interval": 0, "strategy": "fsdp2"}),
    ):
        results = run_ranks(ranks, "", command(**flags, **others, output_root=tmp_path / name))
        assert {code for code, _, _ in results} == {0}, results
        found[name] = tmp_path / name / "outputs" / "debug_test"
    assert losses(found["shards"]) == losses(found["unwatched"])
    one, shards = ([r for r in read_metrics(found[n] / "metrics.jsonl") if "health" in r] for n in ("one", "shards"))
    assert [r["step"] for r in one] == [r["step"] for r in shards] == [3, 6, 9, 12]
    for a, b in zip(one, shards):
        for name in ("grad_norm", "param_norm"):
            assert b["health"][name] == pytest.approx(a["health"][name], rel=1e-3)
        for name in ("block_grad_norm", "decay", "A_min", "A_max"):
            assert b["health"][name] == pytest.approx(a["health"][name], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_ordinary_step_never_waits_for_the_gpu(command, monkeypatch):
    """PyTorch raises at every call inside an ordinary step that would wait; the first ones compile."""
    real_accumulate, real_settle = pretrain.accumulate, Guard.settle

    def accumulate(run, model, batches):
        torch.cuda.set_sync_debug_mode("error" if run.step > 3 and run.step % 10 else "default")
        return real_accumulate(run, model, batches)

    def settle(self, wait):
        if wait:
            torch.cuda.set_sync_debug_mode("default")
        return real_settle(self, wait)

    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    monkeypatch.setattr(Guard, "settle", settle)
    intervals = {"log_step_interval": 10, "save_step_interval": 30, "eval_step_interval": 30, "total_tokens": 30 * 512}
    try:
        flags = {"model_name": "swa_gdn2_3M", "accelerator": "cuda", "sequence_length": 128, "health_step_interval": 10}
        pretrain.setup(command(**flags, **intervals))
    finally:
        torch.cuda.set_sync_debug_mode("default")
