"""The order of training data as a formula: which tokens the g-th sequence of a run holds, without any state.

- Every epoch is a permutation of all sequences, so each token is a target exactly once per epoch.
- It costs no memory and no start-up time, and does not know about ranks, workers or batches.
- It is frozen: the arithmetic below is the data order of every run ever made with it; golden tests hold it in place.
"""

from typing import Optional

import numpy as np

from lit_gpt.errors import UserError

ORDER_VERSION = 1
ROUNDS = 8
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): a bijection on uint64; every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Keyed permutation of range(size): a Feistel network on the next power of two, walked until it lands inside.

    Args:
        index: uint64 [n], each below `size`.
        key: uint64 [n]; equal keys select the same permutation.

    Returns:
        uint64 [n]
    """
    bits = max(2, (size - 1).bit_length())
    result = index.copy()
    walking = np.ones(index.shape, dtype=bool)
    while walking.any():  # at most one in two lands outside, so a few turns end it
        result[walking] = _feistel(result[walking], bits, key[walking])
        walking = result >= np.uint64(size)
    return result


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """ROUNDS rounds of (left, right) -> (right, left ^ F(right)) on `bits` bits, split as evenly as they go."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for round_number in range(1, ROUNDS + 1):
        round_key = key + np.uint64(round_number * GOLDEN_GAMMA & MASK64)
        noise = mix64(mix64(right ^ round_key) + round_key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ noise
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


class Sampler:
    """Maps a global sequence number g = 0, 1, 2, ... to the place of its tokens in a corpus.

        N = (num_tokens - 1) // sequence_length,  epoch e = g // N,  i = permutation_{seed, e}(g mod N),  start = i * L

    A sample is the L + 1 tokens from `start`: inputs and, one further, targets.

    With a shuffle unit of U = m * L tokens, units are permuted and their m sequences follow each other. What the first
    t tokens of an epoch cover is then the same for every L, so L can change between two sequences of an epoch.

    Raises:
        UserError: the corpus is shorter than one unit and its last target, or a unit is no whole number of sequences.
    """

    def __init__(self, num_tokens: int, sequence_length: int, seed: int, shuffle_unit: Optional[int] = None):
        if sequence_length < 1:
            raise UserError(f"sequence length {sequence_length} must be at least 1.")
        unit = sequence_length if shuffle_unit is None else shuffle_unit
        if unit < 1 or unit % sequence_length:
            raise UserError(f"a shuffle unit of {unit} tokens is no multiple of the sequence length {sequence_length}.")
        if not 0 <= seed <= MASK64:
            raise UserError(f"data seed {seed} must be between 0 and 2^64 - 1.")
        self.sequence_length = sequence_length
        self.seed = seed
        self.unit = unit
        self.num_units = (num_tokens - 1) // unit
        self.num_sequences = self.num_units * (unit // sequence_length)
        if self.num_units < 1:
            what = "sequence" if unit == sequence_length else "shuffle unit"
            raise UserError(
                f"{num_tokens} tokens are too few for one {what} of {unit} and its last target. "
                f"Use more data or shorter {what}s."
            )

    def epoch(self, g: "int | np.ndarray") -> "int | np.ndarray":
        """Which pass over the data sequence g belongs to, from 0."""
        return g // self.num_sequences

    def start(self, g: "int | np.ndarray") -> "int | np.ndarray":
        """First token of sequence g: an int for an int, int64 [n] for an array [n]."""
        numbers = np.atleast_1d(np.asarray(g, dtype=np.int64))
        if (numbers < 0).any():
            raise ValueError("sequence numbers start at 0")
        epochs = (numbers // self.num_sequences).astype(np.uint64)
        unit, piece = np.divmod(numbers % self.num_sequences, self.unit // self.sequence_length)
        seed_key = mix64(np.full(1, self.seed, dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))
        # SplitMix64's stream from that key, one number an epoch. A plain sum would let seed and epoch trade places.
        keys = mix64(seed_key + (epochs + np.uint64(1)) * np.uint64(GOLDEN_GAMMA))
        units = permute(unit.astype(np.uint64), self.num_units, keys).astype(np.int64)
        starts = units * self.unit + piece * self.sequence_length
        return starts if np.ndim(g) else int(starts[0])
