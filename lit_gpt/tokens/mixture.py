"""Several corpora in exact proportions: which corpus the n-th sequence comes from, as a formula.

A pattern of 16,384 slots, permuted by the seed, repeats without end; corpus k owns as many of its slots as its weight
says. So every window of 16,384 sequences, wherever it begins, holds exactly the same number of each corpus. Frozen, as
the order inside a corpus is: golden tests hold it in place.
"""

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.tokens.sampler import GOLDEN_GAMMA, mix64, permute

SLOTS = 16384


def slot_counts(weights: list[float]) -> list[int]:
    """Slots for each weight: the nearest whole shares of SLOTS that add up to it (largest remainders first).

    Raises:
        UserError: a weight that is not positive, or too small for a single slot.
    """
    total = sum(weights)
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"mixture weights {', '.join(map(str, weights))} must be positive numbers.")
    exact = [weight / total * SLOTS for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: SLOTS - sum(counts)]:
        counts[k] += 1
    if min(counts) < 1:
        raise UserError(f"weight {min(weights):g} of {total:g} is less than one sequence in {SLOTS}. Leave it out.")
    return counts


class Mixture:
    """Corpora 0, 1, ... owning `counts` of the SLOTS slots, in the arrangement that `seed` selects."""

    def __init__(self, counts: list[int], seed: int):
        self.counts = np.asarray(counts, dtype=np.int64)
        seed_key = mix64(np.full(1, seed, dtype=np.uint64) ^ np.uint64(GOLDEN_GAMMA))
        slots = permute(np.arange(SLOTS, dtype=np.uint64), SLOTS, np.repeat(seed_key, SLOTS)).astype(np.int64)
        self._owner = np.searchsorted(np.cumsum(self.counts), slots, side="right")
        owned = self._owner[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), dtype=np.int64), np.cumsum(owned, axis=0)])
        self._rank = self._before[np.arange(SLOTS), self._owner]

    def locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sequences n [count]: the corpus of each, and its number j = 0, 1, ... among that corpus's sequences."""
        rounds, slots = np.divmod(n, SLOTS)
        owners = self._owner[slots]
        return owners, rounds * self.counts[owners] + self._rank[slots]

    def taken(self, n: int) -> list[int]:
        """How many of the first n sequences come from each corpus."""
        return (n // SLOTS * self.counts + self._before[n % SLOTS]).tolist()
