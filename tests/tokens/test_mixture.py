import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.tokens.mixture import SLOTS, Mixture, slot_counts

GOLDEN = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 1, 1, 0, 0, 0, 2, 0, 0]
GOLDEN_HASH = "0368790642abe22c"


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_slots_are_the_nearest_whole_shares(weights):
    exact = np.array(weights) / sum(weights) * SLOTS
    if min(exact) < 1:
        return
    counts = slot_counts(weights)
    assert sum(counts) == SLOTS and np.abs(np.array(counts) - exact).max() < 1


def test_weights_that_cannot_be_served_are_refused():
    for weights in ([0.0, 1.0], [-1.0, 2.0], [float("inf"), 1.0], [float("nan"), 1.0]):
        with pytest.raises(UserError, match="positive"):
            slot_counts(weights)
    with pytest.raises(UserError, match="one sequence in 16384"):
        slot_counts([1e-6, 1.0])


def test_proportions_are_exact_in_every_window():
    counts = slot_counts([0.693584, 0.3, 0.006416])
    owners, _ = Mixture(counts, seed=3).locate(np.arange(3 * SLOTS))
    for k, count in enumerate(counts):
        seen = np.concatenate([[0], np.cumsum(owners == k)])
        assert (seen[SLOTS:] - seen[:-SLOTS] == count).all()


def test_every_corpus_is_counted_without_gaps():
    mixture = Mixture(slot_counts([0.5, 0.2, 0.3]), seed=1)
    owners, local = mixture.locate(np.arange(2 * SLOTS + 100))
    for k in range(3):
        assert np.array_equal(local[owners == k], np.arange((owners == k).sum()))
    for n in (0, 1, 77, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS + 99):
        assert mixture.taken(n) == np.bincount(owners[:n], minlength=3).tolist()
    places = np.array([2 * SLOTS + 5, 3, SLOTS])  # any order, any place
    assert np.array_equal(mixture.locate(places)[0], owners[places])


def test_one_corpus_alone_gets_every_sequence():
    owners, local = Mixture([SLOTS], seed=9).locate(np.arange(40_000))
    assert not owners.any() and np.array_equal(local, np.arange(40_000))


def test_the_arrangement_is_spread_and_follows_the_seed():
    owners, _ = Mixture(slot_counts([0.5, 0.5]), seed=0).locate(np.arange(SLOTS))
    shares = owners.reshape(64, 256).mean(axis=1)
    assert shares.min() > 0.35 and shares.max() < 0.65
    assert not np.array_equal(owners, Mixture(slot_counts([0.5, 0.5]), seed=1).locate(np.arange(SLOTS))[0])


def test_golden_arrangement():
    owners, local = Mixture(slot_counts([0.7, 0.2, 0.1]), seed=3407).locate(np.arange(SLOTS))
    content = np.stack([owners, local]).astype("<i8").tobytes()
    assert owners[:24].tolist() == GOLDEN
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN_HASH
