"""What is a spike, what is skipped, and what is kept of it."""

import json

import numpy as np
import pytest
import torch

from lit_gpt.training.guards import SpikeDetector
from lit_gpt.training.optimizer import OptimizerArgs, adamw


def judged(detector: SpikeDetector, losses: list[float], norms: list[float]) -> list[bool]:
    """Whether each step is a spike."""
    spikes = []
    for loss, norm in zip(losses, norms):
        values = torch.tensor([loss, norm], dtype=torch.float32)
        spike, _ = detector.judge(*values, torch.isfinite(values).all())
        spikes.append(bool(spike))
    return spikes


def series(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall as those of a run do, with noise, and gradient norms with more of it."""
    rng = np.random.default_rng(seed)
    losses = 2.5 + 8 * np.exp(-np.arange(steps) / 150) + rng.normal(0, 0.03, steps)
    return losses, np.exp(rng.normal(0, 0.15, steps))


def test_an_ordinary_run_has_no_spikes():
    for seed in range(5):
        assert not any(judged(SpikeDetector(6.0, torch.device("cpu")), *series(2000, seed)))


@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_seen_and_hardly_moves_the_averages(which):
    pair = series(600)
    pair[which][[400, 402]] *= 4
    spikes = judged(SpikeDetector(6.0, torch.device("cpu")), *pair)
    assert [i for i, spike in enumerate(spikes) if spike] == [400, 402]


def test_what_lasts_stops_being_a_spike():
    losses, norms = series(1500)
    losses[1000:] += 1.0
    spikes = judged(SpikeDetector(6.0, torch.device("cpu")), losses, norms)
    assert spikes[1000] and not any(spikes[:1000]) and not any(spikes[1200:])


def test_what_is_not_finite_leaves_the_averages_alone():
    detector = SpikeDetector(6.0, torch.device("cpu"))
    judged(detector, *series(200))
    before = detector.state.clone()
    assert judged(detector, [float("nan"), float("inf"), 3.0], [1.0, 1.0, float("nan")]) == [False] * 3
    assert torch.equal(detector.state, before)


def test_the_averages_survive_json_to_the_bit():
    detector = SpikeDetector(6.0, torch.device("cpu"))
    judged(detector, *series(200))
    assert torch.equal(torch.tensor(json.loads(json.dumps(detector.state.tolist()))), detector.state)


def test_the_averages_are_those_of_the_logs():
    losses, norms = series(SpikeDetector.MEAN_HORIZON)
    detector = SpikeDetector(6.0, torch.device("cpu"))
    judged(detector, losses, norms)
    logs = np.log(np.stack([losses, norms]))
    count, mean, variance = detector.state.numpy()
    assert (count == len(losses)).all()
    np.testing.assert_allclose(mean, logs.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(variance, logs.var(axis=1), rtol=1e-3)


def test_the_optimizer_leaves_a_step_out_moments_and_all():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = adamw(model, OptimizerArgs())
    for group in optimizer.param_groups:
        group["lr"] = 0.1

    def step(skip: float) -> None:
        model(torch.ones(1, 4)).sum().backward()
        if skip:
            model.weight.grad[0] = float("nan")
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[torch.Tensor]:
        return [t.clone() for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]

    step(0.0)
    before = everything()
    step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything()))
    step(0.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, everything()))
