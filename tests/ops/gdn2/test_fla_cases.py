"""chunk_gdn2 and fused_recurrent_gdn2 on the cases of fla-core's own tests, against float64.

At their size on a GPU (`benchmarks/gdn2_cases.py` runs the same list there in parallel); in small under Triton's
interpreter.
"""

import pytest
import torch

from lit_gpt.config import GDN2Config
from lit_gpt.errors import UserError
from lit_gpt.mixers.gdn2 import GatedDeltaNet2
from lit_gpt.ops.gdn2 import chunk, chunk_gdn2, fused_recurrent_gdn2, naive_recurrent_gdn2, recurrent
from lit_gpt.ops.gdn2.inputs import activate_gate, l2_normalize
from tests.ops.gdn2.fla_cases import CASES, SMALL, draw, error, errors, results
from tests.ops.triton_kernels import AGAIN, DEVICE, GPU, INTERPRETED, run_interpreted, runs_kernels

pytest.importorskip("triton", reason="the kernels need Triton")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device: at the size of fla's cases")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="small cases, for Triton's interpreter")


@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_under_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch):
    """But for float64, in which the references are."""
    if INTERPRETED:
        for module in (chunk, recurrent):
            monkeypatch.setattr(module, "runs_fused", lambda *xs: all(x.dtype != torch.float64 for x in xs))


def definition(q, k, v, g, b, w, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, **options):
    """The recurrence in float64, with norm and gate before it."""
    gate = [options.pop(name, None) for name in ("A_log", "dt_bias", "lower_bound")]
    if use_gate_in_kernel:
        g = activate_gate(g, *gate)
    if use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    return naive_recurrent_gdn2(q, k, v, g, b, w, **options)


def assert_within(found: dict[str, float], tolerances: dict[str, float]) -> None:
    wrong = {name: f"{e:.1e} > {tolerances[name]:.0e}" for name, e in found.items() if not e < tolerances[name]}
    assert not wrong, wrong


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case):
    """In float32, where the interpreter is exact to rounding."""
    assert_within(errors(chunk_gdn2, definition, case, DEVICE), dict.fromkeys(case.tolerances, 1e-4))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_size(case):
    """The reference is chunk_gdn2's plain path in float64, which test_chunk.py holds to the recurrence."""
    assert_within(errors(chunk_gdn2, chunk_gdn2, case, DEVICE), case.tolerances)


SIZES = {"B": 2, "T": 130, "H": 2, "HV": 4, "D": 64} if GPU else {"B": 1, "T": 20, "H": 1, "HV": 2, "D": 32}


@runs_kernels
@torch.no_grad()
def test_state_with_values_first():
    case = CASES[2].small() if INTERPRETED else CASES[2]
    q, k, v, g, b, w, h0 = draw(case, DEVICE).values()
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    o, S = chunk_gdn2(q, k, v, g, b, w, initial_state=h0, **options)
    o_first, S_first = chunk_gdn2(q, k, v, g, b, w, initial_state=h0.mT.contiguous(), state_v_first=True, **options)
    assert error(o_first, o.double()) < 1e-4 and error(S_first.mT, S.double()) < 1e-4


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_and_chunk_and_definition(packed, gate):
    """V other than K, grouped heads, a first state."""
    rng = torch.Generator().manual_seed(0)
    B, T, H, HV, K = SIZES.values()
    B, V = 1 if packed else B, K // 2
    normal = lambda *shape: torch.randn(shape, generator=rng).to(DEVICE)
    q, k, v, g = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V), normal(B, T, HV, K)
    b, w = normal(B, T, HV, K).sigmoid(), normal(B, T, HV, V).sigmoid()
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if gate:
        options |= {"use_gate_in_kernel": True, "A_log": normal(HV), "dt_bias": normal(HV * K)}
    else:
        g = -g.exp()
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 3, T - 9, T], device=DEVICE)
    options["initial_state"] = normal(3 if packed else B, HV, K, V)
    double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    expected = definition(*map(double, (q, k, v, g, b, w)), **{name: double(x) for name, x in options.items()})
    for op, tolerance in ((fused_recurrent_gdn2, 5e-3), (chunk_gdn2, 6e-3)):
        for x, y in zip(op(q, k, v, g, b, w, **options), expected):
            assert error(x, y) < tolerance


@runs_kernels
def test_nothing_is_read_beyond_the_end():
    """1e30 lies after the last token of every input, in a chunk that the sequence fills only in part."""
    case = CASES[2].small() if INTERPRETED else CASES[2]
    leaves = draw(case, DEVICE)
    expected = results(chunk_gdn2, case, leaves)
    poisoned = {}
    for name, x in leaves.items():
        buffer = torch.full((x.numel() + 64 * x[0, 0].numel(),), 1e30 if x.dtype == torch.float32 else 6e4).to(x)
        poisoned[name] = buffer[: x.numel()].copy_(x.flatten()).view(x.shape)
    for name, x in results(chunk_gdn2, case, poisoned).items():
        assert torch.equal(x, expected[name]), name


@runs_kernels
def test_decay_bias_shared_by_channels():
    """One value per head, expanded, as the layer with scalar decay has it."""
    case = CASES[3].small() if INTERPRETED else CASES[3]
    leaves = draw(case, DEVICE)
    HV, K = leaves["g"].shape[2:]
    shared = leaves["dt_bias"][:HV, None].expand(HV, K)
    expected = results(chunk_gdn2, case, {**leaves, "dt_bias": shared.contiguous()})
    for name, x in results(chunk_gdn2, case, {**leaves, "dt_bias": shared}).items():
        assert torch.equal(x, expected[name]), name


@runs_kernels
def test_refusals():
    q, k, v, g, b, w, _ = draw(CASES[2].small(), DEVICE).values()
    with pytest.raises(UserError, match="chunk_size must be 64"):
        chunk_gdn2(q, k, v, g, b, w, chunk_size=48)
    with pytest.raises(UserError, match="returns no states in between"):
        chunk_gdn2(q, k, v, g, b, w, return_intermediate_states=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num_value_heads", [2, 4])
def test_layer_has_finite_gradients(num_value_heads):
    torch.manual_seed(0)
    config = GDN2Config(num_heads=2, num_value_heads=num_value_heads, head_dim=64, decay_rank=32, output_gate_rank=32)
    layer = GatedDeltaNet2(128, config, 1e-5)
    layer.reset_parameters()
    layer.conv.reset_parameters()
    layer = layer.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(torch.randn(2, 130, 128, device=DEVICE))
    y.float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
