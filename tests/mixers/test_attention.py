"""The attention layer: against plain softmax, and its ring of keys and values."""

import pytest
import torch

from lit_gpt.config import AttentionConfig
from lit_gpt.documents import Documents
from lit_gpt.errors import UserError
from lit_gpt.mixers.attention import CausalSelfAttention

D, WINDOW = 20, 16


def build(window=None, num_heads: int = 4, num_kv_heads=None, **options) -> CausalSelfAttention:
    torch.manual_seed(0)
    config = AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=6, window=WINDOW, **options)
    return CausalSelfAttention(D, config, window).double()


def inputs(T: int, B: int = 2) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(T))


def reference(layer: CausalSelfAttention, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Token by token, head by head; `starts` [T] is where the document of each token begins."""
    c, T = layer.config, x.shape[1]
    G, d = c.kv_heads, c.head_dim
    wq, wk, wv = layer.qkv.weight.split([c.num_heads * d, G * d, G * d])
    q, k, v = ((x @ w.mT).unflatten(-1, (-1, d)) for w in (wq, wk, wv))
    angle = torch.arange(T)[:, None] * c.rope_base ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(s[..., : d // 2], s[..., d // 2 :]) * turn for s in (q, k))
    heads = []
    for h in range(c.num_heads):
        g = h // (c.num_heads // G)
        rows = []
        for t in range(T):
            first = max(int(starts[t]), 0 if layer.window is None else t - layer.window + 1)
            scores = (q[:, t : t + 1, h] * k[:, first : t + 1, g].conj()).real.sum(-1) / d**0.5
            rows.append((scores.softmax(-1)[..., None] * v[:, first : t + 1, g]).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.mT


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("T", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1])
def test_equals_plain_softmax(T, window, num_kv_heads):
    layer, x = build(window, num_kv_heads=num_kv_heads, rope_base=50.0), inputs(T)
    torch.testing.assert_close(layer(x), reference(layer, x, torch.zeros(T)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("lengths", [(50,), (WINDOW, 34), (1, WINDOW + 1, 30 - WINDOW, 18)])
def test_documents_stay_apart(lengths, window):
    layer, x = build(window, num_kv_heads=2), inputs(50, B=1)
    offsets = torch.tensor((0, *lengths)).cumsum(0)
    starts = torch.repeat_interleave(offsets[:-1], torch.tensor(lengths))
    found = layer(x, Documents(offsets, (1, 50), x.device))
    torch.testing.assert_close(found, reference(layer, x, starts), atol=1e-6, rtol=1e-5)
    alone = torch.cat([layer(document) for document in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)  # rotary scores depend on distance alone


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(
    "sizes", [(1,) * 60, (WINDOW - 1, 1, 1, 43), (60,), (30, 1, 29), (5, WINDOW, 1, 2, 36), (WINDOW, 44)]
)
def test_cache_continues(sizes, window, num_kv_heads):
    layer, x = build(window, num_kv_heads=num_kv_heads), inputs(60)
    cache = layer.new_cache(2, 60, x.device, x.dtype)
    pieces = [layer(piece, cache=cache) for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), atol=1e-9, rtol=1e-9)
    assert cache.position == 60


@torch.no_grad()
def test_a_window_keeps_a_ring_of_its_size():
    layer, x = build(WINDOW, num_kv_heads=2), inputs(50)
    cache = layer.new_cache(2, 10_000, x.device, x.dtype)
    keys = cache.k
    assert keys.shape == cache.v.shape == (2, WINDOW, 2, 6)
    for piece in x.split([20, 1, 29], dim=1):
        layer(piece, cache=cache)
    assert cache.k is keys
    whole = layer.new_cache(2, 0, x.device, x.dtype)
    layer(x, cache=whole)
    torch.testing.assert_close(cache.k, whole.k)  # the last tokens, each at its position modulo the window
    torch.testing.assert_close(cache.v, whole.v)


@torch.no_grad()
def test_full_attention_fills_its_room_and_says_so():
    layer, x = build(), inputs(12)
    cache = layer.new_cache(2, 10, x.device, x.dtype)
    assert cache.k.shape[1] == 10
    layer(x[:, :10], cache=cache)
    with pytest.raises(UserError, match="10 tokens"):
        layer(x[:, 10:11], cache=cache)
    assert cache.position == 10
