"""What is said of the data before training."""

import pytest

from data import TrainData
from lit_gpt.training.describe import describe_sources


def test_each_corpus_says_how_often_it_is_seen(tiny_corpus, tmp_path):
    for path in tiny_corpus.glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = TrainData(f"{tiny_corpus}=0.9,{tmp_path}=0.1", 32, seed=0)
    sequences = (data.corpus.num_tokens - 1) // 32
    large, small = sorted(describe_sources(data, 5 * sequences), key=lambda line: "10.00%" in line)
    assert f"90.00% from {tiny_corpus}: {data.corpus.num_tokens:,} tokens" in large and "more than 4" in large
    assert f"10.00% from {tmp_path}" in small and "more than" not in small
    epochs = [float(line.split("sees ")[1].split()[0]) for line in (large, small)]
    assert epochs == pytest.approx([4.5, 0.5], abs=0.05)


@pytest.mark.parametrize("epochs, warned", [(4, False), (4.1, True)])
def test_many_epochs_are_warned_of(tiny_corpus, epochs, warned):
    data = TrainData(tiny_corpus, 32, seed=0)
    consumed = int(epochs * ((data.corpus.num_tokens - 1) // 32))
    (line,) = describe_sources(data, consumed)
    assert ("more than 4" in line) == warned and f"{epochs:.2f} epochs" in line
