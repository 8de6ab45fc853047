"""Whole runs under every strategy: the same losses on any number of ranks, and to the bit across a resume."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import generate
import pretrain
from lit_gpt import GPT
from lit_gpt.training.checkpoint import load_model
from lit_gpt.training.checkpoint_manifest import complete_checkpoints
from lit_gpt.training.records import read_metrics
from tests.runs import command_line, losses

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH_TOKENS = 30, 8 * 32
LAYOUTS = [(1, "ddp", 0), (1, "fsdp2", 0), (1, "hsdp", 0), (2, "ddp", 0), (2, "fsdp2", 0), (2, "hsdp", 1)]
LAYOUTS += [(4, "ddp", 0), (4, "fsdp2", 0), (4, "hsdp", 2)]

pytestmark = pytest.mark.slow


def arguments(root: Path, corpus: Path, model: Path | str, **flags) -> list[str]:
    """30 steps of 8 sequences of 32 tokens, in two micro-batches or more on each rank."""
    own = {"sequences_per_batch": 8, "total_tokens": STEPS * BATCH_TOKENS, "micro_batch_size": 1}
    return command_line(corpus, model, root, **{**own, "eval_step_interval": 15, **flags})


def run(argv: list[str], code: int = 0) -> subprocess.CompletedProcess:
    """pretrain.py as a user starts it."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == code, done.stderr
    return done


def history(root: Path) -> np.ndarray:
    """Loss and gradient norm of each step, and the losses of each evaluation, to the last digit."""
    records = read_metrics(root / "outputs" / "debug_test" / "metrics.jsonl")
    trained = [[r["loss"], r["grad_norm"]] for r in records if "loss" in r]
    validated = [[r["val_loss@32"], r["val_loss@128"]] for r in records if "blocks" in r]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1)) and len(validated) == 2
    return np.array(trained + validated)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus, tiny_model) -> Path:
    """The output root of the run in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    pretrain.setup(arguments(root, tiny_corpus, tiny_model))
    return root


@pytest.mark.parametrize("ranks, strategy, shard_size", LAYOUTS)
def test_losses_do_not_depend_on_the_strategy(
    ranks, strategy, shard_size, undisturbed, tmp_path, tiny_corpus, tiny_model
):
    flags = {"devices": ranks, "strategy": strategy, "shard_size": shard_size}
    said = run(arguments(tmp_path, tiny_corpus, tiny_model, **flags))
    assert said.stderr == "" and f"{strategy}" in said.stdout
    np.testing.assert_allclose(history(tmp_path), history(undisturbed), rtol=1e-5)


@pytest.mark.parametrize("strategy, shard_size", [("ddp", 0), ("fsdp2", 0), ("hsdp", 2)])
def test_a_resume_on_the_same_ranks_is_the_same_to_the_bit(strategy, shard_size, tmp_path, tiny_corpus):
    """With a model large enough for its gradients to travel in pieces, whose order of sums must not change."""
    flags = {"devices": 4, "strategy": strategy, "shard_size": shard_size, "save_step_interval": 6}
    argv = arguments(tmp_path, tiny_corpus, "swa_gdn2_3M", **flags)
    run(argv)
    whole, folder = history(tmp_path), tmp_path / "outputs" / "debug_test" / "checkpoints"
    for path in complete_checkpoints(folder)[1:]:
        shutil.rmtree(path)
    said = run(argv)
    assert "resuming: step-00000018" in said.stdout
    assert np.array_equal(history(tmp_path), whole)


def test_a_run_moved_from_one_rank_to_four_shards_to_two_copies_goes_on_as_if_it_was_not(
    tmp_path, tiny_corpus, tiny_model
):
    flags = {"warmup_tokens": 1, "min_learning_rate": 1e-2}  # the same learning rates whatever the total
    moved, reference = tmp_path / "moved", tmp_path / "reference"
    for steps, ranks, strategy in ((11, 1, "auto"), (23, 4, "fsdp2"), (STEPS, 2, "ddp")):
        place = {"devices": ranks, "strategy": strategy, "total_tokens": steps * BATCH_TOKENS}
        run(arguments(moved, tiny_corpus, tiny_model, **flags, **place))
    pretrain.setup(arguments(reference, tiny_corpus, tiny_model, **flags))

    ours, theirs = (np.array(losses(root / "outputs" / "debug_test")) for root in (moved, reference))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    spread = np.abs(np.diff(theirs[:, 1]))
    assert np.sort(spread)[3] > 1e-4  # the losses tell the batches apart


def test_a_checkpoint_of_shards_is_read_by_whoever_reads_checkpoints(tmp_path, tiny_corpus, tiny_model, capsys):
    weights = []
    for exp_name, flags in (("whole", {}), ("shards", {"devices": 2, "strategy": "fsdp2"})):
        run(arguments(tmp_path, tiny_corpus, tiny_model, exp_name=exp_name, **flags))
        folder = tmp_path / "outputs" / f"debug_{exp_name}"
        model = GPT.from_name(str(tiny_model))
        load_model(complete_checkpoints(folder / "checkpoints")[-1], model)
        weights.append(model.state_dict())
        generate.main([f"--checkpoint={folder}", "--prompt=Document 3", "--max_new_tokens=20", "--temperature=0"])
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, rtol=1e-2, atol=1e-3, err_msg=name)
    texts = capsys.readouterr().out.splitlines()
    assert len(texts) >= 2 and texts[0] == texts[len(texts) // 2]


def test_what_only_the_first_rank_meets_ends_all_in_one_line(tmp_path, tiny_corpus, tiny_model):
    folder = tmp_path / "outputs" / "debug_test"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = arguments(tmp_path, tiny_corpus, tiny_model, devices=2, strategy="fsdp2")
        said = run(argv, code=2)
    assert said.stderr.startswith("error: another process is training in") and said.stderr.count("\n") == 1


def test_a_dry_run_says_what_it_chose_and_what_that_takes(tmp_path, tiny_corpus, tiny_model):
    argv = arguments(tmp_path, tiny_corpus, tiny_model, devices=2, strategy="hsdp", micro_batch_size=0)
    said = " ".join(run([*argv, "--dry_run", "--activation_checkpointing=full"]).stdout.replace("│", " ").split())
    assert "hsdp, 1 copies of 2 shards: as asked" in said and "GiB on each device" in said
    assert "the largest that divides" in said and "computed again from the inputs of the blocks" in said
    assert not (tmp_path / "outputs").exists()
