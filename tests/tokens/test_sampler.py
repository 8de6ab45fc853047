import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.tokens.sampler import Sampler


def test_the_order_is_frozen():
    """These numbers are the data order of runs that exist: if this fails, the code is wrong, not the numbers."""
    small = Sampler(num_tokens=101, sequence_length=10, seed=1)
    # fmt: off
    assert small.start(np.arange(25)).tolist() == [
        20, 40, 90, 80, 10, 50, 0, 70, 60, 30, 30, 0, 10, 40, 70, 60, 90, 20, 50, 80, 70, 20, 90, 40, 60,
    ]
    # fmt: on
    large = Sampler(num_tokens=100_000_000_001, sequence_length=4096, seed=3407)
    assert large.num_sequences == 24_414_062
    assert [large.start(g) for g in (0, 1, 2, 24_414_061, 24_414_062, 10**12)] == [
        98976821248,
        25138253824,
        15563091968,
        86138396672,
        52307791872,
        72093270016,
    ]


def test_every_epoch_is_a_permutation_for_every_small_size():
    for size in range(1, 301):
        starts = Sampler(size * 3 + 1, 3, seed=size).start(np.arange(3 * size))
        for epoch in np.split(starts, 3):
            assert np.array_equal(np.sort(epoch), 3 * np.arange(size)), size


@pytest.mark.parametrize("size", [2**20, 1_000_003])
def test_a_large_epoch_covers_everything_in_an_order_like_chance(size):
    order = Sampler(size + 1, 1, seed=5).start(np.arange(size, 2 * size))
    assert np.array_equal(np.sort(order), np.arange(size))
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.0015
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.005


def test_no_two_epochs_or_seeds_share_an_order():
    numbers = np.arange(1000)
    orders = [Sampler(1001, 1, seed).start(numbers + 1000 * epoch) for seed in range(5) for epoch in range(5)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (order == other).sum() < 12  # chance: 1 on average


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(2, 10**12),
    length=st.integers(1, 10**5),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 10**13),
)
def test_one_by_one_equals_all_at_once_and_samples_lie_inside(tokens, length, seed, first):
    length = min(length, tokens - 1)
    sampler = Sampler(tokens, length, seed)
    numbers = np.arange(first, first + 5)
    starts = sampler.start(numbers)
    assert starts.tolist() == [sampler.start(int(g)) for g in numbers]
    assert (starts >= 0).all() and (starts + length + 1 <= tokens).all() and (starts % length == 0).all()
    assert sampler.epoch(numbers).tolist() == [g // sampler.num_sequences for g in numbers.tolist()]


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(UserError, match="10 tokens are too few for one sequence of 10"):
        Sampler(10, 10, seed=0)
    with pytest.raises(UserError, match="seed"):
        Sampler(100, 10, seed=-1)
    with pytest.raises(ValueError):
        Sampler(100, 10, seed=0).start(np.array([3, -1]))


@pytest.mark.parametrize("unit", [16, 32, 64])
def test_units_stay_together_and_lengths_agree_on_what_is_seen(unit):
    lengths = [length for length in (8, 16, 32, 64) if unit % length == 0]
    samplers = {length: Sampler(1000, length, 5, shuffle_unit=unit) for length in lengths}
    for sampler in samplers.values():
        assert sampler.num_sequences * sampler.sequence_length == 999 // unit * unit
    for units in (1, 3, 999 // unit, 999 // unit + 2):
        seen = [
            sorted(start + i for start in sampler.start(np.arange(units * unit // length)) for i in range(length))
            for length, sampler in samplers.items()
        ]
        assert all(places == seen[0] for places in seen)


def test_a_unit_of_one_sequence_is_the_plain_order():
    g = np.arange(500)
    assert np.array_equal(Sampler(1000, 16, 5, shuffle_unit=16).start(g), Sampler(1000, 16, 5).start(g))


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="shuffle unit of 40 tokens is no multiple of the sequence length 16"):
        Sampler(1000, 16, 5, shuffle_unit=40)
    with pytest.raises(UserError, match="too few for one shuffle unit of 1024"):
        Sampler(1000, 16, 5, shuffle_unit=1024)
