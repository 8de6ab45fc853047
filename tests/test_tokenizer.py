import json
import random

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, train_tokenizer

WORDS = ["def", "return", "class", "self", "None", "assert", "<s>", "</s>", "x = y + 1", "12345", "naïve", "漢字"]


def texts():
    rng = random.Random(0)
    lines = ["    " * rng.randrange(3) + " ".join(rng.choices(WORDS, k=8)) for _ in range(800)]
    return ["\n".join(lines[i : i + 40]) for i in range(0, 800, 40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(texts(), 360, tmp_path_factory.mktemp("tokenizers") / "small")


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("  leading\n\n\ttab  double   triple \r\n end ")
@example("</s> <s> <unk> <0x0A>")
@example("\u2581a\u2581\u2581b \u2585 \0 \ufeff \U0001f642 e\u0301 \u00a0\u2028")
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not {trained.bos_id, trained.eos_id, 0} & set(ids)


def test_training_is_deterministic_and_ids_are_where_they_belong(trained, tmp_path):
    again = train_tokenizer(texts(), 360, tmp_path)
    assert again.path.read_bytes() == trained.path.read_bytes() and again.sha256 == trained.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    assert (trained.bos_id, trained.eos_id, trained.vocab_size, trained.name) == (1, 2, 360, "small")
    indentation = trained.encode("        return")
    assert len(indentation) < 4


def test_batches_equal_single_texts(trained):
    batch = [*texts()[:3], "", "\u2581", "a"]
    assert trained.encode_batch(batch) == [trained.encode(text) for text in batch]


def test_ids_are_those_of_sentencepiece(trained):
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    for text in texts()[:5]:
        assert trained.encode(text) == model.encode(text)


def test_a_tokenizer_with_dummy_prefix_keeps_its_own_ids(tmp_path):
    """As Llama's: text gets a leading space, and U+2581 is one."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = Tokenizer(tmp_path / "llama.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    for text in ("return self", "a\u2581b", " x"):
        assert tokenizer.encode(text) == model.encode(text)
    assert tokenizer.name == "llama"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "hf"
    folder.mkdir()
    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizer_json(hugging_face, tmp_path):
    tokenizer = Tokenizer(hugging_face)
    text = "</s> <s>  def x:\n\treturn 漢字 </s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {0, 1, 2} & set(tokenizer.encode(text)), "text became a special id"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 300)
    (tmp_path / "tokenizer.json").write_bytes((hugging_face / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    configured = Tokenizer(tmp_path / "tokenizer.json")
    assert (configured.bos_id, configured.eos_id) == (0, 2)
    copy = Tokenizer(configured.save(tmp_path / "copy").parent)
    assert (copy.eos_id, copy.sha256) == (2, configured.sha256)


def test_an_end_token_that_is_not_marked_special_is_text_all_the_same(hugging_face, tmp_path):
    content = json.loads((hugging_face / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a</s><s>b")
    assert not {0, 1} & set(ids) and tokenizer.decode([*ids, 1]) == "a</s><s>b"
    assert tokenizer.encode("<end>") == [2], "a token of the author's stays one"


def test_a_folder_with_both_uses_the_model_file(hugging_face, trained, tmp_path):
    for path in (hugging_face / "tokenizer.json", trained.path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Tokenizer(tmp_path).sha256 == trained.sha256


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer(tmp_path / "nothing.model")
    with pytest.raises(UserError, match="neither"):
        Tokenizer(tmp_path)
    for name, content in (("a.model", b"junk"), ("a.json", b"{}"), ("b.json", b"junk"), ("a.txt", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            Tokenizer(tmp_path / name)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_size_that_does_not_fit_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"{size} pieces"):
        train_tokenizer(texts(), size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_text_to_train_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot train"):
        train_tokenizer([], 400, tmp_path)
