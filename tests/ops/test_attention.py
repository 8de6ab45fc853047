"""Causal attention against the softmax that defines it, and rotary positions."""

import importlib.util

import pytest
import torch

from lit_gpt.ops import attention
from lit_gpt.ops.attention import RotaryEmbedding, causal_attention, document_masks


def reference(q, k, v, window=None, document_ids=None):
    """Softmax over the visible keys, with a [T, S] mask."""
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
    visible = (distance >= 0) & (distance < (window or S))
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def inputs(T: int, S: int, B: int = 2, heads: int = 4, kv_heads: int = 4, D: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(T + 1000 * S)
    shapes = (B, T, heads, D), (B, S, kv_heads, D), (B, S, kv_heads, D)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(q, k, v, window=None, document_ids=None):
    """Values and gradients."""
    masks = None if document_ids is None else document_masks(document_ids, window, q.dtype)
    found, expected = causal_attention(q, k, v, window, masks), reference(q, k, v, window, document_ids)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 70])
@pytest.mark.parametrize("window", [None, 16])
def test_equals_masked_softmax(T, window, kv_heads):
    assert_same(*inputs(T, T, kv_heads=kv_heads), window)


@pytest.mark.parametrize("window", [1, 2, 50, 51, 1000])
def test_any_window(window):
    assert_same(*inputs(50, 50), window)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 40), (5, 40), (16, 17), (39, 40)])
@pytest.mark.parametrize("window", [None, 16, 40])
def test_fewer_queries_than_keys_are_the_last_ones(T, S, window):
    assert_same(*inputs(T, S, kv_heads=2), window)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 16, 100])
@pytest.mark.parametrize("lengths", [(70,), (16, 16, 38), (15, 1, 17, 37), (1, 1, 68), (50, 20)])
def test_documents(lengths, window, kv_heads):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    other = torch.arange(70) // 30
    assert_same(*inputs(70, 70, B=2, kv_heads=kv_heads), window, torch.stack([ids, other]))


def test_a_window_makes_no_mask_of_all_pairs(monkeypatch):
    sizes = []
    original = attention._visible
    monkeypatch.setattr(attention, "_visible", lambda T, S, *rest: sizes.append(T * S) or original(T, S, *rest))
    causal_attention(*inputs(500, 500), window=16)
    masks = document_masks(torch.zeros(2, 500, dtype=torch.long), 16, torch.float64)
    assert max(sizes) <= 16 * 32
    assert sum(mask.numel() for mask in masks) <= 2 * 512 * 32


def test_backend_is_named(monkeypatch):
    installed = importlib.util.find_spec("flash_attn") is not None
    assert attention.backend(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert attention.backend(torch.device("cuda"), torch.float32) == "sdpa"
    assert attention.backend(torch.device("cuda"), torch.bfloat16) == ("flash-attn" if installed else "sdpa")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert attention.backend(torch.device("cuda"), torch.float16) == "flash-attn"
    assert attention.backend(torch.device("cuda"), torch.float16, documents=True) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("T, S, window", [(70, 70, None), (70, 70, 16), (1, 40, 16), (5, 40, None)])
def test_flash_attention_sees_the_same(T, S, window):
    q, k, v = (x.detach() for x in inputs(T, S, kv_heads=2, D=64))
    found = causal_attention(*(x.to("cuda", torch.bfloat16) for x in (q, k, v)), window)
    torch.testing.assert_close(found.cpu().double(), reference(q, k, v, window), atol=0.02, rtol=0.02)


def test_rotary_turns_pairs_by_position():
    D, base = 8, 100.0
    rotary, (q, k, _) = RotaryEmbedding(D, base), inputs(9, 9)
    turned = rotary(q, k, start=5)
    for x, y in zip((q, k), turned):
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
        angle = torch.arange(5, 14, dtype=torch.float64)[:, None] * base ** (-torch.arange(D // 2) * 2 / D)
        expected = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(y, torch.cat([expected.real, expected.imag], -1), atol=1e-5, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    rotary, (q, k, _) = RotaryEmbedding(8, 10000.0), inputs(12, 12)
    scores = [torch.einsum("bthd,bshd->bhts", *rotary(q, k, start)) for start in (0, 1000)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


def test_rotary_in_16_bits_turns_in_32():
    q, k, _ = (x.bfloat16() for x in inputs(5, 5))
    rotary = RotaryEmbedding(8, 10000.0)
    found, wide = rotary(q, k, 4000)[0], rotary(q.float(), k.float(), 4000)[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
