"""Checkpoints of several ranks: saved in one layout, loaded in another; one rank that cannot write."""

import json
import os

import pytest
import torch
from lightning.fabric import Fabric

from lit_gpt.tensor_file import TensorFile
from lit_gpt.training.checkpoint import Checkpoints
from lit_gpt.training.checkpoint_manifest import damage
from tests.checkpoint_ranks import trained, whole, work
from tests.runs import forks


def run(folder, world: int, save_as: str, load_as: str, broken: int | None = None) -> list[list[dict]]:
    """What each rank was told of its saves."""
    arguments = (world, folder, save_as, load_as, broken)
    ranks = [forks().Process(target=work, args=(rank, *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("save_as, load_as", [("ddp", "fsdp2"), ("fsdp2", "hsdp"), ("hsdp", "ddp")])
def test_any_layout_loads_what_any_other_saved(save_as, load_as, tmp_path):
    run(tmp_path, 4, save_as, load_as)
    path = tmp_path / "checkpoints" / "step-00000002"
    assert damage(path) is None
    expected, (model, optimizer) = trained(1), trained(3)
    Checkpoints(path.parent, 3, Fabric(accelerator="cpu", devices=1)).load(path, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole(*expected), whole(model, optimizer)))

    files = sorted(path.glob("*-*.safetensors"))
    sizes = [sum(t.numel() for t in map(TensorFile(file).__getitem__, TensorFile(file).entries)) for file in files]
    parameters = list(model.parameters())
    moments = 2 * sum(p.numel() for p in parameters) + len(parameters)
    assert sum(sizes) == sum(t.numel() for t in model.state_dict().values()) + moments  # no element twice
    of_ranks = [model_part + optimizer_part for model_part, optimizer_part in zip(sizes[:4], sizes[4:])]
    assert len(files) == 8 and max(of_ranks) < 1.2 * min(of_ranks)


@pytest.mark.parametrize("broken", [0, 1])
def test_one_rank_that_cannot_write_fails_the_save_on_all_and_the_next_one_works(broken, tmp_path):
    for first, second in run(tmp_path, 2, "fsdp2", "ddp", broken):
        assert first["save_error"] == "No space left on device" and second["checkpoint"] == "step-00000002"
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]
