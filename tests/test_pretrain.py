"""The training entry, as a user runs it: exact resumes, one-line errors, records."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import pretrain
from data import TrainData
from lit_gpt.model import GPT
from lit_gpt.tokens.shards import HEADER
from lit_gpt.training.records import read_metrics
from tests.runs import STEPS, command_line, losses

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def arguments(tmp_path, tiny_corpus, tiny_model):
    """The command line of a run of 40 steps of 4 sequences of 32 tokens, with other flags."""
    return lambda **others: command_line(tiny_corpus, tiny_model, tmp_path, **others)


def evaluations(folder: Path) -> list[dict]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: r[k] for k in r if k != "seconds"} for r in records if "blocks" in r]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus, tiny_model):
    """The run folder of 40 steps in one go."""
    root = tmp_path_factory.mktemp("undisturbed")
    pretrain.setup(command_line(tiny_corpus, tiny_model, root))
    return root / "outputs" / "debug_test"


class Stop(Exception):
    """Stands in for whatever ends a process."""


def stop_after(step: int, monkeypatch) -> None:
    """Make training end as soon as this many steps are done and all that is due then is written."""
    real = pretrain.Records.step

    def counted(self, current):
        if current > step:
            raise Stop
        real(self, current)

    monkeypatch.setattr(pretrain.Records, "step", counted)


def test_a_run_leaves_everything_it_says(undisturbed):
    assert [s for s, _ in losses(undisturbed)] == list(range(1, STEPS + 1))
    assert losses(undisturbed)[-1][1] < losses(undisturbed)[0][1] - 1
    assert [e["step"] for e in evaluations(undisturbed)] == [20, 40]
    assert {f"val_loss@{n}" for n in (32, 64, 96, 128)} <= evaluations(undisturbed)[-1].keys()
    first = read_metrics(undisturbed / "metrics.jsonl")[0]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"} <= first.keys()
    assert first["tokens"] == 128 and first["mfu"] is None
    names = {"config.yaml", "metrics.jsonl", "loss.png", "summary.json", "checkpoints", "tokenizer"}
    assert names <= set(os.listdir(undisturbed))
    assert sorted(os.listdir(undisturbed / "checkpoints")) == [f"step-{n:08d}" for n in (17, 34, 40)]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["step"] == STEPS and summary["loss"] == losses(undisturbed)[-1][1]


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(undisturbed, arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(20, patch)  # so that steps 18 to 20 are trained, and logged, twice
        with pytest.raises(Stop):
            pretrain.setup(arguments())
    folder = tmp_path / "outputs" / "debug_test"
    assert [p for p in os.listdir(folder / "checkpoints")] == ["step-00000017"]
    pretrain.setup(arguments())
    assert losses(folder) == losses(undisturbed)
    assert evaluations(folder) == evaluations(undisturbed)


def test_micro_batches_do_not_change_what_is_trained(undisturbed, arguments, tmp_path):
    pretrain.setup(arguments(micro_batch_size=4, train_num_workers=0, total_tokens=STEPS * 4 * 32))
    ours, theirs = (
        np.array([loss for _, loss in losses(f)]) for f in (tmp_path / "outputs" / "debug_test", undisturbed)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_killed_process_goes_on_bit_for_bit(undisturbed, arguments, tmp_path):
    folder = tmp_path / "outputs" / "debug_test"
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments(save_step_interval=5)]
    victim_step = random.randrange(1, STEPS)
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if len(losses(folder)) >= victim_step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    assert len(losses(folder)) >= victim_step, "the run ended before it could be killed"
    pretrain.setup(arguments(save_step_interval=5))
    assert losses(folder) == losses(undisturbed)


def test_a_finished_run_says_so_and_stays(undisturbed, arguments, tmp_path, capsys):
    root = tmp_path / "again"
    shutil.copytree(undisturbed.parent, root / "outputs")
    before = (root / "outputs" / "debug_test" / "metrics.jsonl").read_bytes()
    pretrain.setup(arguments(output_root=root))
    assert "finished" in capsys.readouterr().out
    assert (root / "outputs" / "debug_test" / "metrics.jsonl").read_bytes() == before


def test_the_documented_command_parses_word_for_word(tiny_corpus, tmp_path, capsys):
    command = (
        f"--train_data_dir {tiny_corpus} --val_data_dir {tiny_corpus} --output_root {tmp_path} --exp_name N "
        "--model_name swa_gdn2_1.3B --train_config tsz1024x4k_100B --eval_iters 15 --learning_rate 4e-4 "
        "--micro_batch_size 4 --interactive_job --debug --dry_run --num_extrapol 1"
    )
    try:
        pretrain.setup(command.split())
    except SystemExit:  # the tiny corpus has no sequence of 4096 tokens for every rank and block: parsed all the same
        assert "tokens" in capsys.readouterr().err
    else:
        out = capsys.readouterr().out
        assert "1,447,772,688" in out and "nothing written" in out
    assert not (tmp_path / "outputs").exists()


def test_debug_runs_are_short_fresh_and_apart(arguments, tmp_path, capsys):
    for _ in range(2):
        pretrain.setup([*arguments(sequences_per_batch=16), "--debug", "--interactive_job"])
    folder = tmp_path / "outputs" / "debug_test_debug"
    assert [s for s, _ in losses(folder)] == [1, 2, 3, 4]
    assert len(evaluations(folder)) == 1 and os.listdir(folder / "checkpoints") == ["step-00000004"]
    assert read_metrics(folder / "metrics.jsonl")[0]["tokens"] == 2 * 2 * 32  # two micro-batches of two sequences
    assert "sequences_per_batch" in capsys.readouterr().out and os.listdir(tmp_path / "outputs") == ["debug_test_debug"]


def refused(argv: list[str], capsys) -> str:
    """The one line with which a command ends before anything is written."""
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"model_name": "swa_gdn2_1.4B"}, ["unknown model", "swa_gdn2_1.3B"]),
        ({"train_config": "tsz512x4k_20"}, ["unknown train_config", "tsz128x4k_100B"]),
        ({"train_data_dir": "nowhere"}, ["nowhere", "does not exist"]),
        ({"val_data_dir": "nowhere"}, ["nowhere", "does not exist"]),
        ({"micro_batch_size": 3}, ["does not split", "--micro_batch_size 1 or 2 or 4"]),
        ({"total_tokens": 100}, ["total_tokens", "128"]),
        ({"sequence_length": 10**6}, ["tokens"]),
        ({"devices": "many"}, ["--devices"]),
        ({"learning_rate": "fast"}, ["learning_rate"]),
        ({"learning_rate": -1e-3}, ["--learning_rate", "at least 0"]),
        ({"grad_clip": -1}, ["--grad_clip", "at least 0"]),
        ({"log_step_interval": 0}, ["--log_step_interval", "at least 1"]),
        ({"keep_checkpoints": 0}, ["--keep_checkpoints", "at least 1"]),
        ({"num_extrapol": 0}, ["--num_extrapol", "at least 1"]),
        ({"micro_batch_size": -2}, ["--micro_batch_size", "at least 0"]),
        ({"learning_rat": 1}, ["learning_rat"]),
        ({"exp_name": "a/b"}, ["--exp_name", "a/b"]),
        ({"output_root": Path(__file__)}, ["cannot write to", "Not a directory"]),
        ({"wandb_project": "x"}, []),
        ({"train_data_dir": "a=0.5,b"}, ["b has no weight"]),
        ({"train_data_dir": "nosuch://a"}, ["nosuch"]),
        ({"shuffle_unit": 33}, ["shuffle unit 33", "32"]),
        ({"use_stream_tok": "true"}, ["--train_data_dir_raw"]),
        ({"use_stream_tok": "true", "train_data_dir_raw": "."}, ["--tokenizer_path"]),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(flags, words, arguments, tmp_path, capsys, monkeypatch):
    if "wandb_project" in flags:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    err = refused(arguments(**flags), capsys)
    assert all(word in err for word in words), err
    assert not (tmp_path / "outputs").exists()


def test_a_model_too_small_for_the_tokenizer_is_refused(arguments, tmp_path, tiny_model, capsys):
    small = tmp_path / "small.yaml"
    small.write_text(tiny_model.read_text().replace("vocab_size: 304", "vocab_size: 100"))
    assert "vocabulary" in refused(arguments(model_name=small), capsys)


def test_validation_of_another_tokenizer_is_refused(arguments, tiny_corpus, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_corpus, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    refused(arguments(val_data_dir=foreign), capsys)


def test_a_truncated_shard_is_refused_by_name(arguments, tiny_corpus, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_corpus, damaged)
    shard = next(damaged.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[: HEADER.size + 100])
    assert shard.name in refused(arguments(train_data_dir=damaged), capsys)


def test_a_run_whose_checkpoints_vanished_is_not_started_over(undisturbed, arguments, tmp_path, capsys):
    root = tmp_path / "vanished"
    shutil.copytree(undisturbed.parent, root / "outputs")
    shutil.rmtree(root / "outputs" / "debug_test" / "checkpoints")
    assert "checkpoints are gone" in refused(arguments(output_root=root), capsys)


@pytest.mark.parametrize("flags", [{"seed": 1}, {"sequences_per_batch": 8}, {"sequence_length": 64}])
def test_a_run_of_another_kind_is_not_resumed(flags, undisturbed, arguments, tmp_path, capsys):
    root = tmp_path / "other"
    shutil.copytree(undisturbed.parent, root / "outputs")
    err = refused(arguments(output_root=root, **flags), capsys)
    assert next(iter(flags)) in err and "--exp_name" in err


def test_data_may_change_at_a_resume_that_allows_it(arguments, tmp_path, tiny_corpus, monkeypatch, capsys):
    twin = tmp_path / "twin"  # the same documents, read as a bare folder: other data to the program
    twin.mkdir()
    for path in tiny_corpus.glob("*.bin"):
        shutil.copy(path, twin / path.name)
    with monkeypatch.context() as patch:
        stop_after(20, patch)
        with pytest.raises(Stop):
            pretrain.setup(arguments())
    folder = tmp_path / "outputs" / "debug_test"
    other = {"train_data_dir": f"{tiny_corpus}=0.5,{twin}=0.5", "sequence_length": 64, "sequences_per_batch": 2}
    other |= {"num_extrapol": 2, "micro_batch_size": 1}
    err = refused(arguments(**other), capsys)
    assert "data.sequence_length (32 then, 64 now)" in err and "--allow_data_change" in err
    pretrain.setup(arguments(**other, allow_data_change="true", save_step_interval=5, total_tokens=30 * 128))
    out = capsys.readouterr().out
    assert "from step 17 on" in out and "50.00% from" in out
    pretrain.setup(arguments(**other, save_step_interval=5))  # the change is part of the run now
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [(r["step"], r["tokens"]) for r in metrics if "loss" in r] == [(n, 128 * n) for n in range(1, STEPS + 1)]
    meta = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "meta.json").read_text())
    assert meta["sequences"] == 17 * 4 + (STEPS - 17) * 2 and meta["origin"]["sequences"] == 17 * 4
    assert [phase["start"] for phase in meta["data_state"]["phases"]] == [0, 17 * 4]
    assert "seed" in refused(arguments(**other, seed=1, allow_data_change="true"), capsys)


@pytest.mark.parametrize("document_reset", [True, False])
def test_the_first_loss_is_that_of_the_documents_apart_or_not(
    document_reset, arguments, tmp_path, tiny_model, tiny_corpus
):
    pretrain.setup(arguments(document_reset=str(document_reset).lower(), total_tokens=128))
    torch.manual_seed(3407)
    model = GPT.from_name(str(tiny_model))
    tokens, cu_seqlens = TrainData(tiny_corpus, 32, seed=3407).batch(0, 4)
    assert len(cu_seqlens.unique()) > 5
    with torch.no_grad():
        expected = [model(row[None, :-1], row[None, 1:])[0] for row in tokens]
        if document_reset:
            bounds = cu_seqlens.unique().tolist()
            inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
            expected = [model(inputs[a:b][None], targets[a:b][None])[0] for a, b in pairwise(bounds)]
    loss = losses(tmp_path / "outputs" / "debug_test")[0][1]
    assert loss == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def test_raw_text_trains_and_resumes_bit_for_bit(arguments, tmp_path, tiny_corpus, monkeypatch):
    source, flags = tmp_path / "source", {"total_tokens": 20 * 128, "raw_validation_fraction": 0.3}
    source.mkdir()
    for i in range(40):
        (source / f"{i}.txt").write_text(f"Document {i} counts: {' '.join(str(n * i) for n in range(60))}\n")
    raw = {"train_data_dir_raw": source, "tokenizer_path": tiny_corpus / "tokenizer", "use_stream_tok": "true"}
    pretrain.setup(arguments(**raw, **flags, exp_name="whole"))
    with monkeypatch.context() as patch:
        stop_after(18, patch)
        with pytest.raises(Stop):
            pretrain.setup(arguments(**raw, **flags))
    pretrain.setup(arguments(**raw, **flags))
    whole, resumed = tmp_path / "outputs" / "debug_whole", tmp_path / "outputs" / "debug_test"
    assert len(losses(whole)) == 20 and losses(resumed) == losses(whole) and evaluations(resumed) == evaluations(whole)
    assert (whole / "tokenizer").is_dir()


@pytest.mark.slow
def test_two_ranks_train_what_one_does_and_hand_over(undisturbed, arguments, tmp_path):
    """17 steps on one rank, 17 on two, 6 on one: gloo processes on this machine."""
    folder = tmp_path / "outputs" / "debug_test"
    for steps, devices in ((17, 1), (34, 2), (STEPS, 1)):
        flags = {"devices": devices, "total_tokens": steps * 128, "warmup_tokens": 51, "min_learning_rate": 1e-2}
        command = [sys.executable, str(ROOT / "pretrain.py"), *arguments(**flags)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    reference = tmp_path / "reference"
    flags = {"warmup_tokens": 51, "min_learning_rate": 1e-2, "output_root": reference}
    pretrain.setup(arguments(**flags))
    ours, theirs = (np.array([loss for _, loss in losses(f)]) for f in (folder, reference / "outputs" / "debug_test"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_two_processes_cannot_train_in_one_folder(arguments, tmp_path, capsys):
    folder = tmp_path / "outputs" / "debug_test"
    holder = pretrain.open_run_folder(folder, {}, tmp_path / "none", fresh=False)
    assert "another process" in refused(arguments(), capsys)
    holder.close()


def test_a_file_system_without_locks_is_told_and_trained_on(arguments, capsys, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    pretrain.setup(arguments(total_tokens=128))
    said = capsys.readouterr()
    assert "has no locks (Function not implemented)" in said.err and "another process" not in said.err
    assert "step       1 / 1" in said.out


def test_steps_that_are_not_finite_end_the_run_without_a_checkpoint(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.setup(arguments(learning_rate=1e30, grad_clip=0, save_step_interval=STEPS, max_skipped_in_a_row=3))
    assert stop.value.code == 2
    assert "3 steps in a row" in capsys.readouterr().err
    assert not list((tmp_path / "outputs" / "debug_test" / "checkpoints").glob("step-*"))
