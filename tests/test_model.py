"""The model: decoding, packing and batching change nothing; gradients, losses, counts."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.config import AttentionConfig, GDN2Config, ModelConfig, model_names
from lit_gpt.generation import cache_bytes
from lit_gpt.model import GPT, count_parameters
from lit_gpt.ops import cross_entropy

VOCABULARY, WINDOW = 53, 40
PATTERNS = [("gdn2",), ("gdn2", "swa"), ("gdn2", "full")]
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}


def tiny(*pattern: str, **options) -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=4,
        n_embd=32,
        intermediate_size=40,
        block_pattern=list(pattern),
        vocab_size=VOCABULARY,
        gdn2=GDN2Config(num_heads=2, head_dim=8, decay_rank=8, output_gate_rank=8),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=WINDOW),
        **options,
    )
    model = GPT(config).double()
    with torch.no_grad():  # a larger scale, so that mixing weighs in the logits
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else None
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=PATTERNS, ids="-".join)
def model(request) -> GPT:
    return tiny(*request.param)


# the cache


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 65, 128])
def test_prefill_and_steps_equal_one_forward(model, prefill):
    ids = tokens(2, prefill + 6)
    expected = model(ids)
    cache = model.new_cache(2, max_length=ids.shape[1])
    torch.testing.assert_close(model(ids[:, :prefill], cache=cache), expected[:, :prefill], **TOLERANCE)
    for t in range(prefill, ids.shape[1]):
        torch.testing.assert_close(model(ids[:, t : t + 1], cache=cache), expected[:, t : t + 1], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64, 64, 7), (1, 2, 70, 1, 61), (WINDOW, WINDOW, WINDOW + 1), (3, 130)])
def test_prefill_in_segments_equals_one_forward(model, sizes):
    ids = tokens(2, sum(sizes))
    cache = model.new_cache(2, max_length=ids.shape[1])
    logits = [model(segment, cache=cache) for segment in ids.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), **TOLERANCE)


@torch.no_grad()
def test_steps_beyond_the_window_equal_one_forward_at_constant_memory():
    model, ids = tiny("gdn2", "swa"), tokens(1, 3 * WINDOW)
    cache = model.new_cache(1)
    size = cache_bytes(cache)
    logits = [model(token, cache=cache) for token in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), **TOLERANCE)
    assert cache_bytes(cache) == size


@torch.no_grad()
def test_last_only_is_the_last_position(model):
    ids = tokens(2, 70)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], **TOLERANCE)


def test_full_attention_needs_to_know_how_long():
    with pytest.raises(ValueError, match="max_length"):
        tiny("gdn2", "full").new_cache(1)


# documents and batches


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(64, 64, 12), (1, 90, 0, 2, 47), (63, 65, 12), (WINDOW, WINDOW + 1, 59)])
def test_packed_documents_equal_each_alone(model, lengths):
    ids = tokens(2, sum(lengths) // 2)  # packed over both rows, so that a document may go on in the next one
    offsets = torch.tensor((0, *lengths)).cumsum(0)
    alone = [model(document[None])[0] for document in ids.flatten().split(lengths) if len(document)]
    packed = model(ids, cu_seqlens=offsets)
    assert packed.shape == (*ids.shape, VOCABULARY)
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), **TOLERANCE)
    losses = model(ids, ids.roll(-1), cu_seqlens=offsets)
    torch.testing.assert_close(losses, F.cross_entropy(packed.mT, ids.roll(-1), reduction="none"), **TOLERANCE)


def test_no_gradient_passes_between_documents(model):
    ids, cut = tokens(1, 100), 37
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    hook = model.transformer.wte.register_forward_hook(lambda *_: embedded)
    try:
        model(ids, cu_seqlens=torch.tensor([0, cut, 100]))[0, cut:].sum().backward()
    finally:
        hook.remove()
    assert embedded.grad[0, :cut].abs().max() == 0
    assert embedded.grad[0, cut:].abs().amax(-1).min() > 0


@torch.no_grad()
def test_rows_apart_are_rows_of_documents(model):
    """A batch of rows side by side equals its documents alone, also where the offsets leave out the rows' starts."""
    ids, targets = tokens(3, 100), tokens(3, 100).roll(7)
    inside = [(1, 64), (WINDOW,), ()]
    offsets = torch.tensor(sorted(100 * row + start for row in range(3) for start in inside[row]) + [300] * 4)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), offsets])
    found = model(ids, targets, cu_seqlens=offsets.int(), rows_apart=True)
    assert found.shape == (3, 100)
    for row in range(3):
        lengths = torch.tensor([0, *inside[row], 100]).diff().tolist()
        pieces = zip(ids[row].split(lengths), targets[row].split(lengths))
        alone = torch.cat([model(piece[None], target[None])[0] for piece, target in pieces])
        torch.testing.assert_close(found[row], alone, **TOLERANCE)


def test_the_gradient_of_a_packed_batch_is_that_of_its_documents(model):
    ids, targets, bounds = tokens(2, 80), tokens(2, 80).roll(3), [0, 30, 31, 80, 144, 160]
    parameters = list(model.parameters())
    loss = model(ids, targets, cu_seqlens=torch.tensor(bounds), rows_apart=True).mean()
    pieces = [(ids.flatten()[None, a:b], targets.flatten()[None, a:b]) for a, b in pairwise(bounds)]
    mean = sum(model(*piece).sum() for piece in pieces) / 160
    torch.testing.assert_close(loss, mean, **TOLERANCE)
    for found, expected in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(mean, parameters)):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_cache_and_documents_together_are_refused(model):
    with pytest.raises(ValueError, match="one of them"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]), cache=model.new_cache(1, 4))


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(model):
    ids = tokens(3, 100)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, **TOLERANCE)


@torch.no_grad()
def test_the_future_is_not_seen(model):
    ids = tokens(1, 140)
    changed = ids.clone()
    changed[:, 90:] = (ids[:, 90:] + 1) % VOCABULARY
    torch.testing.assert_close(model(ids)[:, :90], model(changed)[:, :90], **TOLERANCE)
    assert (model(ids)[:, 90:] - model(changed)[:, 90:]).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_windows_bound_what_attention_sees():
    model, ids = tiny("swa"), tokens(1, 4 * WINDOW + 20)
    reach = 4 * (WINDOW - 1)  # four layers
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % VOCABULARY
    moved = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert moved[reach + 1 :].max() == 0 and moved[reach] > 0


# training


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter(model, tied):
    model = tiny(*model.config.block_pattern, tie_embeddings=tied)
    ids = tokens(2, 80)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)


@pytest.mark.parametrize("kept", [2**26, 20 * VOCABULARY, VOCABULARY, 1])
def test_losses_are_the_cross_entropy_of_the_logits(model, monkeypatch, kept):
    monkeypatch.setattr(cross_entropy, "LOGITS_KEPT", kept)
    ids, targets = tokens(2, 35), tokens(2, 36)[:, 1:]
    losses = model(ids, targets)
    torch.testing.assert_close(losses, F.cross_entropy(model(ids).mT, targets, reduction="none"), **TOLERANCE)


def test_a_few_steps_learn_a_sequence():
    model, ids = tiny("gdn2", "swa").float(), tokens(1, 66)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(25):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(ids[:, :-1], ids[:, 1:]).mean() < 0.5


@torch.no_grad()
def test_initialisation():
    config = ModelConfig(n_layer=8, n_embd=128, intermediate_size=256, block_pattern=["gdn2", "swa"])
    torch.manual_seed(0)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):
            assert parameter.std() == pytest.approx(0.02 / 16**0.5, rel=0.05), name
        elif "norm" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias") and not name.endswith("dt_bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("conv.weight"):
            assert parameter.abs().max() <= 0.5 and parameter.std() == pytest.approx(0.5 / 3**0.5, rel=0.05), name
        elif name.endswith("A_log"):
            assert parameter.min() >= 0 and parameter.exp().max() <= 16.001, name
        elif name.endswith("dt_bias"):
            dt = F.softplus(parameter.double())
            assert dt.min() >= 0.99e-3 and dt.max() <= 0.101, name
            assert dt.log().mean() == pytest.approx((torch.tensor([1e-3, 0.1]).log().mean()).item(), abs=0.15), name
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.05), name
    torch.manual_seed(0)
    again = GPT(config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


# counts

BLOCKS = {  # parameters in the blocks; with embedding, head and final norm there are 147,458,304 more
    "gdn2_1.3B": 1_302_638_112,
    "swa_gdn2_1.3B": 1_300_314_384,
    "kda_1.3B": 1_300_647_456,
    "swa_kda_1.3B": 1_303_300_368,
    "gdn_1.3B": 1_302_417_216,
    "swa_gdn_1.3B": 1_304_185_248,
    "transformer_1.3B": 1_297_990_656,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_of_the_models_of_the_paper(name):
    assert count_parameters(ModelConfig.from_name(name)) == (BLOCKS[name], BLOCKS[name] + 147_458_304)


def test_parameters_in_all_as_published():
    assert count_parameters(ModelConfig.from_name("gdn2_1.3B"))[1] == 1_450_096_416
    assert count_parameters(ModelConfig.from_name("swa_gdn2_1.3B"))[1] == 1_447_772_688


@pytest.mark.parametrize(
    "name, layer, count",
    [
        ("gdn2_1.3B", 0, 29_454_480),
        ("swa_gdn2_1.3B", 1, 21_233_664),
        ("kda_1.3B", 0, 20_054_160),
        ("gdn_1.3B", 0, 23_691_424),
    ],
)
def test_parameters_of_a_mixer(name, layer, count):
    with torch.device("meta"):
        model = GPT.from_name(name)
    assert sum(p.numel() for p in model.transformer.h[layer].mixer.parameters()) == count


@pytest.mark.parametrize("name", model_names())
def test_every_named_model_builds_at_the_size_of_its_name(name):
    config = ModelConfig.from_name(name)
    blocks, total = count_parameters(config)
    if "w2048" in name:
        assert config.n_embd == 2048 and abs(blocks / 1_302_638_112 - 1) < 0.003
    elif "1.3B" in name:
        assert abs(blocks / 1_302_638_112 - 1) < 0.004
    else:
        said = float(name.rpartition("_")[2].rstrip("M")) * 1e6
        assert min(abs(n / said - 1) for n in (blocks, total)) < 0.25
    assert name.startswith("swa_") == ("swa" in config.block_pattern)


def test_tied_embeddings_count_once():
    config = ModelConfig.from_name("swa_gdn2_3M")
    blocks, total = count_parameters(config)
    assert total - blocks == config.vocab_size * config.n_embd + config.n_embd


def test_flops_of_attention_are_those_of_its_matrix_products():
    T = 48
    config = ModelConfig(
        n_layer=3,
        n_embd=32,
        intermediate_size=40,
        block_pattern=["full"],
        vocab_size=VOCABULARY,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = GPT(config)
        model(torch.zeros(1, T, dtype=torch.long)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operator, n in counts.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    # An input that needs no gradient would save a product; here the embedding's output needs one.
    attention = (
        3 * config.n_layer * 4 * 4 * 8 * (T * (T + 1) / 2)
    )  # scores and values over the pairs that the mask leaves
    assert model.flops_per_token(T) * T == pytest.approx(products + attention, rel=1e-12)


def test_flops_of_a_window_count_the_pairs_that_it_leaves():
    config = AttentionConfig(num_heads=2, head_dim=8, window=10)
    model = lambda pattern: GPT(ModelConfig(1, 16, 16, [pattern], vocab_size=8, attention=config))
    swa, full = (model(pattern).flops_per_token for pattern in ("swa", "full"))
    T = 64
    pairs = sum(min(t + 1, 10) for t in range(T))
    matrices = 6 * sum(m.weight.numel() for m in model("swa").modules() if isinstance(m, torch.nn.Linear))
    assert swa(T) == pytest.approx(matrices + 3 * 4 * 2 * 8 * pairs / T)
    assert swa(10) == full(10) and swa(11) < full(11)


def test_flops_of_gdn2_do_not_depend_on_the_length():
    model = tiny("gdn2")
    assert model.flops_per_token(64) == model.flops_per_token(100_000)
    H, K, V, C = 2, 8, 8, 64
    state = 3 * 2 * K * V  # read for e and q, and the update
    scores = 2 * 2 * K * C / 2  # k against q and e, below the diagonal
    values = 2 * 2 * V * C / 2  # the inverse and the scores against values
    inverse = C * C / 3
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert model.flops_per_token(64) == pytest.approx(6 * matrices + 3 * 4 * H * (state + scores + values + inverse))
