"""The GDN-2 layer against layers written plainly, step by step: its own, Kimi Delta Attention, Gated DeltaNet."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.config import GDN2Config
from lit_gpt.documents import Documents
from lit_gpt.errors import UserError
from lit_gpt.mixers.gdn2 import GatedDeltaNet2

D, EPS = 24, 1e-5
SMALL = {"num_heads": 2, "head_dim": 8, "decay_rank": 6, "output_gate_rank": 5}
KDA = {"erase": "scalar", "write": "tied", "output_gate": "sigmoid"}
GDN = {"decay": "scalar", "erase": "scalar", "write": "tied", "output_gate_rank": 0}


def build(**options) -> GatedDeltaNet2:
    """A layer whose gates and norm are all off their initial values."""
    torch.manual_seed(0)
    config = GDN2Config(**{**SMALL, **options})
    config.validate()
    layer = GatedDeltaNet2(D, config, EPS).double()
    layer.reset_parameters()
    layer.conv.reset_parameters()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name not in ("A_log", "dt_bias", "conv.weight"):
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 2 else 1))
        layer.dt_bias.add_(torch.randn_like(layer.dt_bias))
    return layer


def inputs(T: int, B: int = 2) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(T))


# Layers as their papers write them. Each takes the rows of in_proj as the separate projections that the papers have.


def projections(layer: GatedDeltaNet2, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    assert sum(sizes.values()) == layer.in_proj.weight.shape[0]
    return dict(zip(sizes, layer.in_proj.weight.split(list(sizes.values()))))


def queries_keys_values(layer, x, W, heads, value_heads):
    """Projected, convolved channel by channel, SiLU; q, k normalised and shared by groups of value heads."""
    streams, start = [], 0
    for name in "qkv":
        stream = x @ W[name].mT
        taps = layer.conv.weight[start : start + stream.shape[-1]]
        start += stream.shape[-1]
        length = stream.shape[1]
        padded = F.pad(stream.mT, (taps.shape[1] - 1, 0))
        streams.append(F.silu(F.conv1d(padded, taps[:, None], groups=len(taps)).mT[:, :length]))
    q, k = (s.unflatten(-1, (heads, -1)) for s in streams[:2])
    q, k = (s / (s.square().sum(-1, keepdim=True) + 1e-6).sqrt() for s in (q, k))
    q, k = (s.repeat_interleave(value_heads // heads, dim=2) for s in (q, k))
    return q, k, streams[2].unflatten(-1, (value_heads, -1))


def normalised(layer, o):
    return o / (o.square().mean(-1, keepdim=True) + EPS).sqrt() * layer.o_norm.weight


def kda_layer(layer, x, beta_range=1.0):
    """Kimi Delta Attention (arXiv 2510.26692): S = (I - beta k k^T) Diag(alpha) S + beta k v^T; sigmoid gate."""
    H, K = 2, 8
    W = projections(layer, {"q": 16, "k": 16, "v": 16, "f": 6, "beta": H, "gate": 5})
    q, k, v = queries_keys_values(layer, x, W, H, H)
    raw = (x @ W["f"].mT @ layer.decay_up.weight.mT + layer.dt_bias).unflatten(-1, (H, K))
    alpha = torch.exp(-layer.A_log.exp()[:, None] * torch.log1p(raw.exp()))
    beta = beta_range / (1 + torch.exp(-(x @ W["beta"].mT)))
    gate = torch.sigmoid(x @ W["gate"].mT @ layer.gate_up.weight.mT + layer.gate_up.bias).unflatten(-1, (H, K))
    S, outputs = x.new_zeros(len(x), H, K, K), []
    for t in range(x.shape[1]):
        S = alpha[:, t, :, :, None] * S
        predicted = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - predicted)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / K**0.5)
    o = normalised(layer, torch.stack(outputs, dim=1)) * gate
    return o.flatten(2) @ layer.o_proj.weight.mT


def gated_deltanet_layer(layer, x):
    """Gated DeltaNet (arXiv 2412.06464): S = alpha (I - beta k k^T) S + beta k v^T, alpha scalar; SiLU gate."""
    H, K = 2, 8
    W = projections(layer, {"q": 16, "k": 16, "v": 16, "a": H, "beta": H, "gate": 16})
    q, k, v = queries_keys_values(layer, x, W, H, H)
    alpha = torch.exp(-layer.A_log.exp() * torch.log1p(torch.exp(x @ W["a"].mT + layer.dt_bias)))
    beta = torch.sigmoid(x @ W["beta"].mT)
    eye, S, outputs = torch.eye(K, dtype=x.dtype), x.new_zeros(len(x), H, K, K), []
    for t in range(x.shape[1]):
        kk = torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        beta_t, alpha_t = beta[:, t, :, None, None], alpha[:, t, :, None, None]
        S = alpha_t * ((eye - beta_t * kk) @ S) + beta_t * kv
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / K**0.5)
    o = normalised(layer, torch.stack(outputs, dim=1)) * F.silu(x @ W["gate"].mT).unflatten(-1, (H, K))
    return o.flatten(2) @ layer.o_proj.weight.mT


def gdn2_layer(layer, x):
    """Gated DeltaNet-2 (arXiv 2605.22791, eq. 10), with every option but tied gates."""
    c = layer.config
    H, HV, K, V = c.num_heads, c.value_heads, c.head_dim, c.value_dim
    widths = {
        "q": H * K,
        "k": H * K,
        "v": HV * V,
        "f": c.decay_rank if c.decay == "channel" else HV,
        "b": HV * K if c.erase == "channel" else HV,
        "w": HV * V if c.write == "channel" else HV,
        "gate": c.output_gate_rank or HV * V,
    }
    W = projections(layer, widths)
    q, k, v = queries_keys_values(layer, x, W, H, HV)
    raw = x @ W["f"].mT
    if c.decay == "channel":
        raw = raw @ layer.decay_up.weight.mT
    rate = layer.A_log.exp().repeat_interleave(K if c.decay == "channel" else 1)
    alpha = torch.exp(-rate * F.softplus(raw + layer.dt_bias)).unflatten(-1, (HV, -1)).expand(*x.shape[:2], HV, K)
    b = c.erase_range * torch.sigmoid(x @ W["b"].mT).unflatten(-1, (HV, -1)).expand(*x.shape[:2], HV, K)
    w = torch.sigmoid(x @ W["w"].mT).unflatten(-1, (HV, -1)).expand(*x.shape[:2], HV, V)
    gate = x @ W["gate"].mT
    if c.output_gate_rank:
        gate = gate @ layer.gate_up.weight.mT + layer.gate_up.bias
    gate = (gate * torch.sigmoid(gate) if c.output_gate == "silu" else torch.sigmoid(gate)).unflatten(-1, (HV, V))
    eye, S, outputs = torch.eye(K, dtype=x.dtype), x.new_zeros(len(x), HV, K, V), []
    for t in range(x.shape[1]):
        erase = torch.einsum("bhi,bhj->bhij", k[:, t], b[:, t] * k[:, t])
        write = torch.einsum("bhk,bhv->bhkv", k[:, t], w[:, t] * v[:, t])
        S = (eye - erase) @ (alpha[:, t, :, :, None] * S) + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / K**0.5)
    return (normalised(layer, torch.stack(outputs, dim=1)) * gate).flatten(2) @ layer.o_proj.weight.mT


def assert_same(layer: GatedDeltaNet2, reference, T: int = 70) -> None:
    """Outputs, and gradients for every parameter."""
    x = inputs(T)
    found, expected = layer(x), reference(layer, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    names, parameters = zip(*layer.named_parameters())
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), parameters) for y in (found, expected))
    for name, a, b in zip(names, ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert b.abs().max() > 1e-4, name


def test_kda_is_a_setting():
    assert_same(build(**KDA), kda_layer)


def test_kda_with_negative_eigenvalues_is_a_setting():
    assert_same(build(**KDA, erase_range=2.0), lambda layer, x: kda_layer(layer, x, beta_range=2.0))


def test_gated_deltanet_is_a_setting():
    assert_same(build(**GDN), gated_deltanet_layer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expand_v": 2.0},
        {"expand_v": 0.5},
        {"num_value_heads": 4},
        {"num_value_heads": 6, "expand_v": 1.5},
        {"conv_size": 1},
        {"conv_size": 2},
        {"conv_size": 3},
        {"erase_range": 2.0},
        {"decay": "scalar"},
        {"erase": "scalar"},
        {"write": "scalar"},
        {"decay": "scalar", "erase": "scalar", "write": "scalar", "num_value_heads": 4},
        {"output_gate": "sigmoid"},
        {"output_gate_rank": 0, "num_value_heads": 4},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_every_option_equals_the_plain_layer(options):
    assert_same(build(**options), gdn2_layer)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, KDA, GDN, {"num_value_heads": 4, "expand_v": 2.0}, {"conv_size": 1}, {"conv_size": 2}]
)
def test_every_option_decodes(options):
    layer, x = build(**options), inputs(80)
    cache = layer.new_cache(2, 0, x.device, x.dtype)
    pieces = [layer(piece, cache=cache) for piece in x.split([70, 1, 2, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, GDN, {"conv_size": 1}])
def test_documents_stay_apart(options):
    layer, x = build(**options), inputs(90, B=1)
    lengths = (1, 64, 2, 23)
    documents = Documents(torch.tensor((0, *lengths)).cumsum(0), (1, 90), x.device)
    alone = torch.cat([layer(document) for document in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(layer(x, documents), alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "options, erase, write",
    [
        ({}, 16, 16),
        ({"erase": "scalar"}, 2, 16),  # the paper's "w only"
        ({"write": "scalar"}, 16, 2),  # and "b only"
        ({"erase": "scalar", "write": "tied"}, 2, 0),
        ({"num_value_heads": 4, "expand_v": 2.0}, 32, 64),
        ({"num_value_heads": 4, "expand_v": 2.0, "erase": "scalar", "write": "scalar"}, 4, 4),
    ],
)
def test_widths_of_the_gates(options, erase, write):
    layer = build(**options)
    assert layer.branches[2:4] == [erase, write]
    assert layer.in_proj.weight.shape[0] == sum(layer.branches)


@torch.no_grad()
@pytest.mark.parametrize("erase_range", [1.0, 2.0])
def test_erase_gate_fills_its_range_and_write_gate_stays_below_one(erase_range):
    layer = build(erase_range=erase_range)
    wide = 20 * torch.randn(1, 50, 16, dtype=torch.float64)
    g, b, w = layer._gates(wide, wide, wide)
    assert b.min() < 0.01 and 0.99 * erase_range < b.max() <= erase_range
    assert w.max() <= 1
    assert g.max() <= 0 and g.shape == b.shape == (1, 50, 2, 8)


def test_tied_gates_need_a_scalar_erase_gate():
    with pytest.raises(UserError, match="scalar erase"):
        GDN2Config(write="tied").validate()


@torch.no_grad()
def test_cache_keeps_its_size_and_its_state_in_32_bits():
    layer = build().bfloat16()
    cache = layer.new_cache(3, 0, torch.device("cpu"), torch.bfloat16)
    state, history = cache.state, cache.inputs
    for T in (70, 1, 1):
        layer(inputs(T, B=3).bfloat16(), cache=cache)
    assert cache.state is state and cache.inputs is history  # updated in place
    assert (state.shape, state.dtype) == ((3, 2, 8, 8), torch.float32)
    assert (history.shape, history.dtype) == ((3, 3, 48), torch.bfloat16)


@torch.no_grad()
def test_16_bits_stay_close():
    layer, x = build(), inputs(100)
    found = layer.bfloat16()(x.bfloat16()).double()
    expected = build()(x)
    assert (found - expected).norm() < 0.05 * expected.norm()
