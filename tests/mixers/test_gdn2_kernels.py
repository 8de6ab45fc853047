"""The GDN-2 layer on its kernels against the same layer in plain float64; on a GPU, or under Triton's interpreter."""

import pytest
import torch

from lit_gpt.config import GDN2Config
from lit_gpt.documents import Documents
from lit_gpt.mixers.gdn2 import GatedDeltaNet2
from lit_gpt.ops import gated_norm, short_conv
from lit_gpt.ops.gdn2 import chunk, recurrent
from tests.ops.triton_kernels import AGAIN, DEVICE, INTERPRETED, relative_error, run_interpreted, runs_kernels

pytest.importorskip("triton", reason="the kernels need Triton")
OPTIONS = [
    {},
    {"num_value_heads": 2, "expand_v": 2.0, "output_gate": "sigmoid", "erase_range": 2.0},
    {"decay": "scalar", "erase": "scalar", "write": "tied", "output_gate_rank": 0, "erase_range": 2.0},
]
TOLERANCE = 1e-4 if INTERPRETED else 1e-2  # A_log: one sum over all tokens; on a GPU dots are in tf32


@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_under_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch):
    if INTERPRETED:
        for module in (chunk, recurrent, gated_norm, short_conv):
            monkeypatch.setattr(module, "runs_fused", lambda *xs: all(x.dtype != torch.float64 for x in xs))


def layers(**options) -> tuple[GatedDeltaNet2, GatedDeltaNet2]:
    """The same layer in float32, for the kernels, and in float64."""
    torch.manual_seed(0)
    config = GDN2Config(**{"num_heads": 1, "head_dim": 16, "decay_rank": 4, "output_gate_rank": 4, **options})
    layer = GatedDeltaNet2(24, config, 1e-5)
    layer.reset_parameters()
    layer.conv.reset_parameters()
    exact = GatedDeltaNet2(24, config, 1e-5).double()
    exact.load_state_dict(layer.state_dict())
    return layer.to(DEVICE), exact.to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients(options):
    fused, exact = layers(**options)
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    documents = Documents(torch.tensor([0, 3, 40, 41, 80]), (2, 40), x.device) if not options else None
    dy = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    results = []
    for layer, dtype in ((fused, torch.float32), (exact, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf, documents)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(dtype))])
    for name, found, expected in zip(["y", "x", *dict(fused.named_parameters())], *results):
        assert relative_error(found, expected) < TOLERANCE, name


@runs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("options", OPTIONS)
def test_decoding_goes_on_from_prefill(options):
    """Chunks, then the recurrence for few tokens and for one; the state and the last inputs stay where they are."""
    fused, exact = layers(**options)
    x = torch.randn(2, 28, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cache = fused.new_cache(2, 0, x.device, x.dtype)
    held = cache.state, cache.inputs
    y = torch.cat([fused(piece, cache=cache) for piece in x.split([20, 1, 5, 1, 1], dim=1)], dim=1)
    assert relative_error(y, exact(x.double())) < TOLERANCE
    assert held[0] is cache.state and held[1] is cache.inputs
