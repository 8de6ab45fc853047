"""Sampling, generation with a cache, and text that streams."""

import random

import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_gpt.config import AttentionConfig, GDN2Config, ModelConfig
from lit_gpt.errors import UserError
from lit_gpt.generation import TextStream, cache_bytes, generate, new_cache, sample
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = 61


def tiny(*pattern: str, window: int = 48) -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2,
        n_embd=32,
        intermediate_size=48,
        block_pattern=list(pattern),
        vocab_size=VOCABULARY,
        gdn2=GDN2Config(num_heads=2, head_dim=8, decay_rank=8, output_gate_rank=8),
        attention=AttentionConfig(num_heads=2, head_dim=8, window=window),
    )
    model = GPT(config).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # far enough apart that the likeliest token is not a matter of rounding
    return model


def prompt_of(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


# sample


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(5, 100)
    assert torch.equal(sample(logits, temperature=0, top_k=3, top_p=0.1), logits.argmax(-1))
    assert sample(logits[0], temperature=0).shape == ()


def frequencies(logits: torch.Tensor, **options) -> torch.Tensor:
    draws = sample(logits.expand(40_000, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(draws, minlength=len(logits)) / len(draws)


def test_samples_follow_the_softmax_of_the_temperature():
    logits = torch.tensor([0.3, 2.0, -1.0, 1.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(logits / temperature, 0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=0.01, rtol=0)


def test_top_k_keeps_exactly_k_and_their_proportions():
    logits = torch.tensor([0.3, 2.0, -1.0, 1.0])
    expected = torch.softmax(torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0]), 0)
    torch.testing.assert_close(frequencies(logits, top_k=2), expected, atol=0.01, rtol=0)
    assert (frequencies(torch.zeros(6), top_k=2) > 0).sum() == 2  # ties too
    torch.testing.assert_close(frequencies(logits, top_k=99), frequencies(logits, top_k=0))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    for top_p, kept in ((0.3, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 3, 2]), (0.95, [0, 1, 2, 3]), (1e-6, [1])):
        expected = torch.zeros(4).index_copy(0, torch.tensor(kept), probabilities[kept])
        # a little below each threshold, since 0.5 as a sum of exponentials need not be 0.5
        found = frequencies(probabilities.log(), top_p=top_p - 1e-7)
        torch.testing.assert_close(found, expected / expected.sum(), atol=0.01, rtol=0)


def test_top_p_counts_what_top_k_has_left():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    found = frequencies(probabilities.log(), top_k=2, top_p=0.5)  # 0.4 / 0.7 is above 0.5 already
    assert found.tolist() == [1, 0, 0, 0]


def test_samples_repeat_with_the_generator_and_differ_between_rows():
    logits = torch.zeros(8, 1000)
    first, again = (sample(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and len(first.unique()) > 1


def test_extreme_logits():
    logits = torch.tensor([1e30, -1e30, 0.0, -torch.inf])
    assert sample(logits, temperature=1e-3) == 0
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="not finite"):
            sample(torch.tensor([0.0, bad]), temperature=0)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sampling_options_out_of_range(options, name):
    with pytest.raises(UserError, match=name):
        sample(torch.zeros(4), **options)
    with pytest.raises(UserError, match=name):
        generate(tiny("gdn2"), prompt_of(3), 2, **options)


# generate


@pytest.mark.parametrize("pattern", [("gdn2",), ("gdn2", "swa"), ("gdn2", "full")])
@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_greedy_tokens_are_those_of_full_forwards(pattern, length):
    model, ids = tiny(*pattern), prompt_of(length)
    new = list(generate(model, ids, 12, temperature=0, prefill_chunk=64))
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor(new)])[None])[0]
    assert new == logits[length - 1 : -1].argmax(-1).tolist()
    assert new == list(generate(model, ids, 12, temperature=0))


def test_batch_gives_what_each_prompt_gives_alone():
    model, ids = tiny("gdn2", "swa"), prompt_of(3, 70)
    rows = list(zip(*generate(model, ids, 10, temperature=0)))
    assert [list(row) for row in rows] == [list(generate(model, row, 10, temperature=0)) for row in ids]


def test_seed_decides_the_tokens():
    model, ids = tiny("gdn2", "swa"), prompt_of(20)
    draw = lambda seed: list(generate(model, ids, 30, temperature=5.0, generator=torch.Generator().manual_seed(seed)))
    assert draw(1) == draw(1) != draw(2)


def test_stop_id_ends_and_is_the_last_token():
    model, ids = tiny("gdn2"), prompt_of(9)
    free = list(generate(model, ids, 20, temperature=5.0, generator=torch.Generator().manual_seed(0)))
    stop = free[7]
    stopped = generate(model, ids, 20, temperature=5.0, generator=torch.Generator().manual_seed(0), stop_ids=[stop])
    assert list(stopped) == free[: free.index(stop) + 1]


def test_a_stopped_row_waits_for_the_others():
    model, ids = tiny("gdn2"), prompt_of(2, 9)
    options = {"temperature": 5.0, "max_new_tokens": 40}
    free = list(zip(*generate(model, ids, generator=torch.Generator().manual_seed(0), **options)))
    stop = next(token for token in free[0][1:] if token in free[1] and free[0].index(token) != free[1].index(token))
    ends = [row.index(stop) for row in free]
    rows = list(zip(*generate(model, ids, generator=torch.Generator().manual_seed(0), stop_ids=[stop], **options)))
    for row, unstopped, end in zip(rows, free, ends):
        assert row == unstopped[:end] + (stop,) * (max(ends) + 1 - end)


def test_ids_beyond_the_tokenizer_are_never_sampled():
    tokens = list(generate(tiny("gdn2"), prompt_of(5), 60, temperature=100.0, vocab_size=7))
    assert max(tokens) < 7 and len(set(tokens)) > 3


def test_tokens_stream_before_the_rest_is_computed():
    model, calls = tiny("gdn2"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate(model, prompt_of(130), 50, prefill_chunk=64)
    next(tokens)
    assert len(calls) == 3
    assert not torch.is_inference_mode_enabled()
    next(tokens)
    assert len(calls) == 4


def test_a_cache_goes_on_where_it_was():
    model, ids = tiny("gdn2", "swa"), prompt_of(100)
    whole = list(generate(model, ids, 8, temperature=0))
    cache = new_cache(model, 1, 0)
    list(generate(model, ids[:90], 1, temperature=0, cache=cache))
    assert list(generate(model, ids[90:], 8, temperature=0, cache=cache)) == whole


def test_cache_does_not_grow_and_is_counted():
    model = tiny("gdn2", "swa")
    cache = new_cache(model, 1, 0)
    size = cache_bytes(cache)
    state, inputs, ring = 2 * 8 * 8, 3 * 3 * 2 * 8, 2 * 48 * 2 * 8
    assert size == 8 * (state + inputs + ring)
    list(generate(model, prompt_of(100), 100, cache=cache))
    assert cache_bytes(cache) == size


def test_cache_follows_autocast():
    model = tiny("gdn2", "swa").float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = new_cache(model, 1, 0)
        list(generate(model, prompt_of(70), 3, cache=cache))
    assert (cache[0].state.dtype, cache[0].inputs.dtype, cache[1].k.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (torch.zeros(0, dtype=torch.long), {}, "no tokens"),
        (torch.zeros(2, 0, dtype=torch.long), {}, "no tokens"),
        (torch.tensor([1, VOCABULARY]), {}, f"token id {VOCABULARY}"),
        (torch.tensor([1, -1]), {}, "token id -1"),
        (torch.tensor([1]), {"max_new_tokens": 0}, "max_new_tokens"),
        (torch.tensor([1]), {"prefill_chunk": 100}, "prefill_chunk"),
        (torch.tensor([1]), {"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_bad_prompts_and_options_are_refused_at_the_call(ids, options, message):
    with pytest.raises(UserError, match=message):
        generate(tiny("gdn2"), ids, **{"max_new_tokens": 4, **options})


def test_a_diverged_model_is_reported():
    model = tiny("gdn2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="diverged"):
        list(generate(model, prompt_of(4), 2, temperature=0))


# TextStream

TEXT = "the cat sat, the hat: naïve café, 5 € for 你好\n\tand\u2581more  spaces 👋🏽 done"


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory) -> dict[str, Tokenizer]:
    """Ours; SentencePiece with a dummy prefix, as Llama's; a byte-level BPE, whose tokens may split a character."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    ours = train_tokenizer([TEXT[:30]] * 20, 290, folder / "ours")
    (folder / "llama").mkdir()
    with open(folder / "llama" / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT[:30]] * 20),
            model_writer=file,
            model_type="bpe",
            vocab_size=285,
            byte_fallback=True,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    byte_level = HuggingFaceTokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    byte_level.train_from_iterator([TEXT] * 5, trainer)
    (folder / "bytes").mkdir()
    byte_level.save(str(folder / "bytes" / "tokenizer.json"))
    return {"ours": ours, "llama": Tokenizer(folder / "llama"), "bytes": Tokenizer(folder / "bytes")}


def pieces(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    stream = TextStream(tokenizer, **options)
    texts = []
    for token in ids:
        texts.append(stream.push(token))
        if stream.stopped:
            break
    return [*texts, stream.flush()]


@pytest.mark.parametrize("name", ["ours", "llama", "bytes"])
def test_pieces_add_up_to_the_text(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    ids = tokenizer.encode(TEXT)
    for split in range(0, len(ids), 3):
        prompt = tokenizer.decode(ids[:split])
        if prompt.endswith("\ufffd"):
            continue
        assert prompt + "".join(pieces(tokenizer, ids[split:], before=ids[:split])) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["ours", "llama", "bytes"])
def test_text_comes_when_it_is_final_and_no_character_in_halves(tokenizers_by_name, name):
    tokenizer = tokenizers_by_name[name]
    ids = tokenizer.encode(TEXT)
    texts = pieces(tokenizer, ids)
    assert not any("\ufffd" in text for text in texts)
    assert texts[-1] == ""
    for n in range(1, len(ids)):
        if not tokenizer.decode(ids[:n]).endswith("\ufffd"):
            assert "".join(texts[:n]) == tokenizer.decode(ids[:n])


@pytest.mark.parametrize("name", ["ours", "llama", "bytes"])
def test_any_tokens_at_all_add_up_to_their_text(tokenizers_by_name, name):
    tokenizer, draw = tokenizers_by_name[name], random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(40)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_are_no_character_come_with_what_follows(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    first_half, (letter,) = tokenizer.encode("é")[0], tokenizer.encode("c")
    assert pieces(tokenizer, [first_half, first_half, letter]) == ["", "", "\ufffd\ufffdc", ""]
    assert pieces(tokenizer, [letter, first_half]) == ["c", "", "\ufffd"]


def test_end_tokens_have_no_text(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    ids = [tokenizer.bos_id, *tokenizer.encode("a cat"), tokenizer.eos_id]
    assert "".join(pieces(tokenizer, ids)) == "a cat"


def test_every_stop_string_ends_the_text_before_it(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    ids = tokenizer.encode(TEXT)
    draw = random.Random(1)
    for _ in range(150):
        start = draw.randrange(len(TEXT))
        stop = TEXT[start : start + draw.randint(1, 6)]
        texts = pieces(tokenizer, ids, stop=["absent", stop])
        assert "".join(texts) == TEXT[: TEXT.find(stop)]
        assert len(texts) - 1 < len(ids) or TEXT.find(stop) + 6 >= len(TEXT)


def test_the_stop_string_that_is_complete_first_ends_the_text(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    ids = [i for letter in "xabcd" for i in tokenizer.encode(letter)]
    assert "".join(pieces(tokenizer, ids, stop=["abcd", "bc"])) == "xa"
    assert "".join(pieces(tokenizer, ids, stop=["bc", "abc"])) == "x"


def test_a_stop_string_that_only_begins_is_given_out(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    for stop in ("sat on", "done!", "done and dusted"):
        assert "".join(pieces(tokenizer, tokenizer.encode(TEXT), stop=[stop])) == TEXT
    texts = pieces(tokenizer, tokenizer.encode("aaab"), stop=["aab"])
    assert "".join(texts) == "a"


def test_nothing_follows_a_stop_string(tokenizers_by_name):
    tokenizer = tokenizers_by_name["ours"]
    stream = TextStream(tokenizer, stop=[","])
    assert "".join(stream.push(i) for i in tokenizer.encode("a cat, and more")) + stream.flush() == "a cat"


def test_an_empty_stop_string_is_refused(tokenizers_by_name):
    with pytest.raises(UserError, match="empty"):
        TextStream(tokenizers_by_name["ours"], stop=["a", ""])
