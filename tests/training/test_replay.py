"""Keeping a batch, and running it again."""

import dataclasses

import numpy as np
import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT
from lit_gpt.tokens.batch import Batch
from lit_gpt.training.replay import KeptBatch, replay


@pytest.fixture
def kept(tiny_model):
    torch.manual_seed(0)
    offsets = torch.tensor([0, 5, 16, 20, 32, 32], dtype=torch.int32)
    batches = [Batch(torch.randint(0, 304, (2, 17)), offsets), Batch(torch.randint(0, 304, (2, 17)), None)]
    numbers = [np.array([12, 13]), np.array([16, 17])]
    return KeptBatch(4, 0, 2, float("nan"), 1.5, numbers, batches)


def test_a_batch_survives_its_file(kept, tmp_path):
    kept.save(tmp_path / "skipped" / "batch.npz")
    again = KeptBatch.open(tmp_path / "skipped" / "batch.npz")
    for field in dataclasses.fields(KeptBatch):
        ours, theirs = getattr(kept, field.name), getattr(again, field.name)
        if field.name == "batches":
            assert all(
                torch.equal(a.tokens, b.tokens) and a.tokens.dtype == b.tokens.dtype for a, b in zip(ours, theirs)
            )
            assert torch.equal(ours[0].cu_seqlens, theirs[0].cu_seqlens) and theirs[1].cu_seqlens is None
        else:
            np.testing.assert_equal(ours, theirs)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no batch")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "object.npz", tokens_0=np.array([{}], dtype=object))
    for name in ("text.npz", "other.npz", "object.npz", "missing.npz"):
        with pytest.raises(UserError, match="no batch that a run kept"):
            KeptBatch.open(tmp_path / name)


def test_losses_and_gradients_are_those_of_the_batch(kept, tiny_model):
    model = GPT.from_name(str(tiny_model))
    result = replay(model, kept.batches, bf16=False, on_batch=lambda: None)
    assert result.first_not_finite is None
    total = torch.zeros(())
    for batch, losses in zip(kept.batches, result.losses):
        expected = model(batch.tokens[:, :-1], batch.tokens[:, 1:], cu_seqlens=batch.cu_seqlens, rows_apart=True)
        torch.testing.assert_close(losses, expected.mean(dim=1).detach())
        total = total + expected.mean() / 2
    model.zero_grad()
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert result.grad_norms["total"] == pytest.approx(norm, rel=1e-5)
    assert {"block 0", "block 1", "gdn2", "mlp"} <= result.grad_norms.keys()


def test_the_first_that_is_not_finite_is_named(kept, tiny_model):
    model = GPT.from_name(str(tiny_model))
    with torch.no_grad():
        model.transformer.h[1].mlp.gate_up.weight.mul_(1e30)  # finite, but the product is not
    found = replay(model, kept.batches, bf16=False, on_batch=lambda: None).first_not_finite
    assert found == "output of transformer.h.1.mlp.o_proj"
    with torch.no_grad():
        model.transformer.h[0].norm_1.weight[3] = float("inf")
    found = replay(model, kept.batches, bf16=False, on_batch=lambda: None).first_not_finite
    assert found == "parameter transformer.h.0.norm_1.weight"


def test_a_gradient_that_is_not_finite_is_named(kept, tiny_model):
    model = GPT.from_name(str(tiny_model))
    model.transformer.h[0].mixer.o_proj.weight.register_hook(lambda grad: grad * float("inf"))
    found = replay(model, kept.batches, bf16=False, on_batch=lambda: None).first_not_finite
    assert found == "gradient of transformer.h.0.mixer.o_proj.weight"
