"""Fixtures that several rooms share."""

import pytest
import yaml

from lit_gpt.tokenizer import train_tokenizer
from lit_gpt.tokens import prepare
from lit_gpt.tokens.sources import list_units


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A prepared corpus of some 40,000 tokens, with a validation split and a tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("corpus")
    source, out = folder / "source", folder / "corpus"
    source.mkdir()
    for i in range(60):
        numbers = " ".join(str(n * i) for n in range(60))
        (source / f"{i:02d}.txt").write_text(f"Document {i} counts: {numbers}\n" * 3)
    tokenizer = train_tokenizer([p.read_text() for p in sorted(source.iterdir())], 300, folder / "tokenizer")
    job = prepare.Job(out, "tiny", "text", "bos_eos", 0.1)
    units = list_units(source, (".txt",), None, "text", exclude=out)
    with prepare.begin(job, prepare.plan_of(job, units, tokenizer)):
        tokenizer = prepare.make_tokenizer(job, units, tokenizer)
        for unit in units:
            prepare.prepare_unit(job, unit, tokenizer, lambda source_bytes, tokens: None)
        prepare.finish(job, units, tokenizer)
    return out


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a model config of a few thousand parameters for that corpus."""
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    values = {
        "n_layer": 2,
        "n_embd": 16,
        "intermediate_size": 32,
        "block_pattern": ["gdn2", "swa"],
        "vocab_size": 304,
        "gdn2": {"num_heads": 2, "head_dim": 8, "decay_rank": 4, "output_gate_rank": 4},
        "attention": {"num_heads": 2, "head_dim": 8, "window": 16},
    }
    path.write_text(yaml.safe_dump(values))
    return path
