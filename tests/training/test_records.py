"""metrics.jsonl survives kills and resumes; pictures and summaries are made from it."""

import errno
import json
import resource

import pytest

from lit_gpt.errors import UserError
from lit_gpt.training.records import Records, peak_flops, read_metrics


def line(step: int, loss: float) -> dict:
    speed = {"tokens_per_second": 100.0, "mfu": None, "seconds_left": 1.0}
    return {"step": step, "tokens": 10 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, **speed}


def test_lines_after_the_checkpoint_are_dropped_at_a_resume(tmp_path):
    records = Records(tmp_path, total_steps=4, active=True)
    with records.opened(0):
        for step in (1, 2, 3):
            records.training(line(step, float(step)))
    records = Records(tmp_path, total_steps=4, active=True)
    with records.opened(2):
        records.training(line(3, 30.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(1, 2.0)) + "\n" + '{"step": 2, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1]


def test_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n" + json.dumps(line(1, 2.0)) + "\n")
    with pytest.raises(UserError, match="line 1"):
        read_metrics(path)


def test_summary_and_picture_come_from_the_lines(tmp_path):
    records = Records(tmp_path, total_steps=2, active=True)
    with records.opened(0):
        records.training(line(1, 2.0))
        records.training(line(2, 1.5))
        records.validation(
            {"step": 2, "tokens": 20, "val_loss@8": 1.7, "val_loss@16": 1.6, "blocks": 2, "seconds": 0.1}
        )
        saved = {"step": 2, "tokens": 20, "checkpoint": "step-00000002", "seconds": 0.1, "stall_seconds": 0.0}
        records.checkpoints([saved])
        records.summarize({"step": 2})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"step": 2, "loss": 1.5, "median_tokens_per_second": 100.0, "val_loss@8": 1.7, "val_loss@16": 1.6}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_save_is_loud_at_once_recorded_and_told_again(tmp_path, capsys):
    records = Records(tmp_path, total_steps=2, active=True)
    failed = {"step": 1, "tokens": 10, "save_error": "No space left on device", "seconds": 0.1, "stall_seconds": 0.0}
    with records.opened(0):
        records.checkpoints([failed])
        assert "CHECKPOINT NOT SAVED: No space left on device" in capsys.readouterr().out
        records.summarize({"step": 2})
    assert "No space left on device" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["failed_saves"] == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == [failed]


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, capsys):
    """A limit on the size of files stands in for the disk."""
    records, path = Records(tmp_path, total_steps=9, active=True), tmp_path / "metrics.jsonl"
    with records.opened(0):
        records.training(line(1, 1.0))
        size = path.stat().st_size
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, unlimited[1]))  # room for a part of a line
        try:
            records.training(line(2, 2.0))
            records.training(line(3, 3.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert path.stat().st_size == size and "wait in memory" in capsys.readouterr().out
        records.training(line(4, 4.0))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_a_picture_that_cannot_be_drawn_is_told_and_ends_nothing(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lit_gpt.training.records.plot_losses", full)
    records = Records(tmp_path, total_steps=2, active=True)
    with records.opened(0):
        records.training(line(1, 2.0))
        records.plot()
    assert "could not be drawn: No space left on device" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path):
    records = Records(tmp_path, total_steps=2, active=False)
    with records.opened(0):
        records.training(line(1, 2.0))
        records.summarize({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_peaks_by_name():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("GeForce") is None and peak_flops("") is None
