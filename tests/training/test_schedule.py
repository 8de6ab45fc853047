"""Recipes by name, the learning rate, and the split of a global batch."""

import pytest

from lit_gpt.errors import UserError
from lit_gpt.training.schedule import ScheduleArgs, learning_rate_at, recipe_flags, split_batch


@pytest.mark.parametrize(
    "name, sequences, length, tokens",
    [
        ("tsz512x4k_20B", 512, 4096, 20 * 10**9),
        ("tsz256x8k_300M", 256, 8192, 300 * 10**6),
        ("tsz1x128k_1T", 1, 131072, 10**12),
        ("tsz96x2k_15B", 96, 2048, 15 * 10**9),
    ],
)
def test_a_recipe_is_read_off_its_name(name, sequences, length, tokens):
    assert recipe_flags(name) == [
        f"--sequences_per_batch={sequences}",
        f"--sequence_length={length}",
        f"--total_tokens={tokens}",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "tsz512x4k",
        "512x4k_20B",
        "tsz512x3k_20B",
        "tsz512x4k_20B_more",
        "xtsz512x4k_20B",
        "tsz0x4k_20B",
        "tsz512x4k_B",
        "",
    ],
)
def test_what_is_not_exactly_a_recipe_is_refused(name):
    with pytest.raises(UserError, match="unknown train_config"):
        recipe_flags(name)


def test_a_file_wins_over_the_name():
    (flag, path) = recipe_flags("tsz128x4k_100B")
    assert flag == "--config" and path.endswith("tsz128x4k_100B.yaml")


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    args = ScheduleArgs(learning_rate=4e-4)
    total = 100 * 10**9
    assert learning_rate_at(5 * 10**8, total, args) == pytest.approx(2e-4)
    assert learning_rate_at(10**9, total, args) == pytest.approx(4e-4)  # 1% of the tokens: the recipe's 1B
    assert learning_rate_at(10**9 + 99 * 10**9 // 2, total, args) == pytest.approx((4e-4 + 4e-5) / 2)
    assert learning_rate_at(total, total, args) == pytest.approx(4e-5)
    rates = [learning_rate_at(t, total, args) for t in range(10**9, total, 10**9)]
    assert rates == sorted(rates, reverse=True)


def test_learning_rate_follows_what_is_asked():
    args = ScheduleArgs(learning_rate=1.0, min_learning_rate=0.5, warmup_tokens=10)
    assert [learning_rate_at(t, 20, args) for t in (1, 10, 20, 30)] == pytest.approx([0.1, 1.0, 0.5, 0.5])
    assert learning_rate_at(1, 20, ScheduleArgs(learning_rate=1.0, warmup_tokens=0)) > 0.98


@pytest.mark.parametrize("world_size", [1, 2, 8, 32])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4])
def test_a_split_makes_up_the_batch_exactly(world_size, micro_batch):
    size, accumulation = split_batch(128, 4096, micro_batch, world_size)
    assert size * accumulation * world_size == 128
    assert size == micro_batch or (micro_batch == 0 and size == 4)


def test_without_a_micro_batch_the_largest_that_holds_16k_tokens_is_taken():
    assert split_batch(512, 512, 0, 1) == (32, 16)
    assert split_batch(6, 4096, 0, 1) == (3, 2)
    assert split_batch(8, 131072, 0, 2) == (1, 4)


@pytest.mark.parametrize(
    "sequences, micro_batch, world_size, advice",
    [
        (1024, 4, 24, "ranks"),
        (1024, 3, 1, "--micro_batch_size 2 or 4"),
        (128, 48, 2, "train_config of 96|train_config of 192"),
        (4, 0, 3, "ranks"),
    ],
)
def test_what_does_not_divide_is_refused_with_sizes_that_do(sequences, micro_batch, world_size, advice):
    with pytest.raises(UserError, match=advice) as error:
        split_batch(sequences, 4096, micro_batch, world_size)
    assert "\n" not in str(error.value)
