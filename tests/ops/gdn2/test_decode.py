"""The decode kernel against the recurrence in float64; on a GPU, or under Triton's interpreter."""

import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.ops.gdn2 import fused_recurrent_gdn2, naive_recurrent_gdn2, recurrent
from lit_gpt.ops.gdn2.inputs import activate_gate, l2_normalize
from tests.ops.triton_kernels import AGAIN, DEVICE, GPU, INTERPRETED, compile_for, run_interpreted, runs_kernels

pytest.importorskip("triton", reason="the kernel needs Triton")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.skipif(not AGAIN, reason="the kernel runs directly")
def test_under_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def kernel_on_every_device(monkeypatch):
    if not AGAIN:
        monkeypatch.setattr(recurrent, "runs_fused", lambda *tensors: True)


def draw(B=2, T=1, H=2, HV=2, K=16, V=8, N=None, dtype=torch.float32):
    """q, k, v, raw g, raw b, raw w of the operator, and first states."""
    rng = torch.Generator().manual_seed(T)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    tokens = [normal(B, T, H, K), normal(B, T, H, K)]
    tokens += [normal(B, T, HV, D) for D in (V, K, K, V)]
    return [x.to(DEVICE, dtype) for x in tokens], normal(N or B, HV, K, V).to(DEVICE)


def reference(tokens, S0, ranges=(1.0, 1.0), A_log=None, dt_bias=None, lower_bound=None, **options):
    """The definition in float64, with L2 norm, sigmoids and gate written out."""
    q, k, v, g, b, w = (x.double() for x in tokens)
    gates = [None if x is None else x.double() for x in (A_log, dt_bias)]
    g = activate_gate(g, *gates, lower_bound)
    b, w = (limit * torch.sigmoid(x) for limit, x in zip(ranges, (b, w)))
    S0 = None if S0 is None else S0.double()
    return naive_recurrent_gdn2(
        l2_normalize(q), l2_normalize(k), v, g, b, w, initial_state=S0, output_final_state=True, **options
    )


def options_of(HV, K, ranges=(1.0, 1.0), lower_bound=None):
    """Everything inside the kernel."""
    A_log, dt_bias = torch.linspace(0.1, 1.0, HV, device=DEVICE), torch.linspace(-1, 1, HV * K, device=DEVICE)
    gate = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    return {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "sigmoid_ranges": ranges, **gate}, gate


def assert_close(found, expected, tolerance):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


@runs_kernels
@pytest.mark.parametrize(
    "dtype, shape",
    [
        (torch.float32, dict()),
        (torch.float32, dict(H=1, HV=3, K=20, V=24)),
        (torch.bfloat16, dict(B=1, T=5, H=1, HV=1, K=64, V=36)),
        (torch.float16, dict(B=1, T=2, H=1)),
    ],
)
def test_equals_the_definition(dtype, shape):
    tokens, S0 = draw(**shape, dtype=dtype)
    HV, K = tokens[3].shape[2:]
    options, gate = options_of(HV, K, ranges=(2.0, 0.5))
    found = fused_recurrent_gdn2(*tokens, initial_state=S0, output_final_state=True, **options)
    expected = reference(tokens, S0, ranges=(2.0, 0.5), **gate)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_close(found[0], expected[0], TOLERANCE[dtype])
    assert_close(found[1], expected[1], 1e-6)


@runs_kernels
def test_lower_bound():
    tokens, S0 = draw(T=4)
    options, gate = options_of(2, 16, lower_bound=-5.0)
    found = fused_recurrent_gdn2(*tokens, initial_state=S0, output_final_state=True, **options)
    for x, y in zip(found, reference(tokens, S0, **gate)):
        assert_close(x, y, 1e-6)


@runs_kernels
def test_gates_and_norm_done_outside_and_any_decay():
    (q, k, v, g, b, w), S0 = draw(T=6)
    q, k, b, w = l2_normalize(q), l2_normalize(k), b.sigmoid(), w.sigmoid()
    g = torch.where(g > 0.5, -torch.inf, torch.where(g < -0.5, -1000.0, -20.0 * g.abs()))
    found = fused_recurrent_gdn2(q, k, v, g, b, w, scale=0.3, initial_state=S0, output_final_state=True)
    inputs = [x.double() for x in (q, k, v, g, b, w)]
    expected = naive_recurrent_gdn2(*inputs, scale=0.3, initial_state=S0.double(), output_final_state=True)
    for x, y in zip(found, expected):
        assert_close(x, y, 1e-6)


@runs_kernels
def test_packed_sequences_with_empty_ones():
    offsets = torch.tensor([0, 1, 1, 4, 11, 11], device=DEVICE)
    tokens, S0 = draw(B=1, T=11, N=5)
    options, gate = options_of(2, 16)
    found = fused_recurrent_gdn2(*tokens, initial_state=S0, output_final_state=True, cu_seqlens=offsets, **options)
    for x, y in zip(found, reference(tokens, S0, cu_seqlens=offsets, **gate)):
        assert_close(x, y, 1e-6)
    assert torch.equal(found[1][[1, 4]], S0[[1, 4]])


@runs_kernels
def test_state_in_place_output_given_and_values_first():
    tokens, S0 = draw(T=2, V=12)
    options, _ = options_of(2, 16)
    o, S = fused_recurrent_gdn2(*tokens, initial_state=S0, output_final_state=True, **options)
    held, out = S0.mT.contiguous(), torch.empty_like(tokens[2])
    results = fused_recurrent_gdn2(
        *tokens, initial_state=held, inplace_final_state=True, out=out, state_v_first=True, **options
    )
    assert results[0] is out and results[1] is held
    torch.testing.assert_close((out, held), (o, S.mT), rtol=1e-6, atol=1e-6)
    o, S = fused_recurrent_gdn2(*tokens, initial_state=S0.mT, output_final_state=True, state_v_first=True, **options)
    assert S.is_contiguous()
    torch.testing.assert_close((o, S), (out, held), rtol=1e-6, atol=1e-6)
    o, nothing = fused_recurrent_gdn2(*tokens, **options)
    assert nothing is None
    assert_close(o, reference(tokens, None, **options_of(2, 16)[1])[0], 1e-6)


@runs_kernels
def test_slices_of_a_projection_and_gates_shared_by_channels():
    """Inputs as the layer has them: columns of one matrix, a gate per head, a decay bias per head."""
    columns = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v, g, b, w = columns.split([32, 32, 24, 2, 2, 24, 84], dim=-1)[:6]
    q, k, v, w = (x.unflatten(-1, (2, -1)) for x in (q, k, v, w))
    g, b = (x[..., None].expand(2, 3, 2, 16) for x in (g, b))
    A_log, bias = torch.ones(2, device=DEVICE), torch.tensor([0.5, -0.5], device=DEVICE)
    gate = {"A_log": A_log, "dt_bias": bias[:, None].expand(2, 16)}
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "sigmoid_ranges": (1.0, 1.0)}
    found = fused_recurrent_gdn2(q, k, v, g, b, w, output_final_state=True, **options, **gate)
    for x, y in zip(found, reference([q, k, v, g, b, w], None, **gate)):
        assert_close(x, y, 1e-6)


@runs_kernels
def test_kernel_is_a_registered_operator():
    """By torch's own check: schema, mutation, fake tensors; and a decoding step compiles as one graph."""
    from lit_gpt.ops.gdn2.kernels.decode import recurrent_gdn2_fused

    tokens, S0 = draw()
    A_log, dt_bias = torch.ones(2, device=DEVICE), torch.zeros(32, device=DEVICE)
    o = torch.empty_like(tokens[2])
    for first, state, in_place in ((None, S0, True), (S0, torch.empty_like(S0), False), (S0, None, False)):
        arguments = (*tokens, A_log, dt_bias, first, None, o, state, 0.25, in_place, True, True, None, [1.0, 1.0])
        torch.library.opcheck(recurrent_gdn2_fused, arguments)

    def step(*tokens, state):
        return fused_recurrent_gdn2(*tokens, initial_state=state, inplace_final_state=True)[0] * 2

    eager, compiled = S0.clone(), S0.clone()
    with torch.no_grad():
        expected = step(*tokens, state=eager)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*tokens, state=compiled)
    assert torch.equal(found, expected) and torch.equal(compiled, eager)


@runs_kernels
def test_under_inference_mode():
    """As generate.py calls it: a cache made outside, then inside."""
    tokens, S0 = draw()
    with torch.inference_mode():
        o, _ = fused_recurrent_gdn2(*tokens, initial_state=S0, inplace_final_state=True)
        held = torch.zeros_like(S0)
        fused_recurrent_gdn2(*tokens, initial_state=held, inplace_final_state=True)
    assert o.isfinite().all() and held.any()


@runs_kernels
def test_clear_errors():
    tokens, S0 = draw()
    with pytest.raises(UserError, match="pass one"):
        fused_recurrent_gdn2(*tokens, inplace_final_state=True)
    with pytest.raises(UserError, match="out must be contiguous"):
        fused_recurrent_gdn2(*tokens, out=tokens[2][..., :4])
    with pytest.raises(UserError, match="cu_seqlens must be integers"):
        fused_recurrent_gdn2(*(x[:1] for x in tokens), cu_seqlens=torch.tensor([[0, 1]], device=DEVICE))
    with pytest.raises(UserError, match="initial_state must be"):
        fused_recurrent_gdn2(*tokens, initial_state=S0[:1])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("start, BV", [(0, 32), (1, 16), (2, 8)])
def test_kernel_compiles(start, BV, arch):
    from lit_gpt.ops.gdn2.kernels.decode import decode_kernel

    types = {**dict.fromkeys("qkvgbwo", "*bf16"), **dict.fromkeys(("A_log", "dt_bias", "state"), "*fp32")}
    types |= {**dict.fromkeys(("scale", "lower_bound", "b_range", "w_range"), "fp32"), "initial_state": "*fp32"}
    constants = {"H": 16, "HV": 16, "K": 128, "KP": 128, "V": 128, "BV": BV, "START": start, "WANT_STATE": True}
    constants |= {"PACKED": False, "L2NORM": True, "GATE": 1, "SIGMOID": True, "cu_seqlens": None}
    constants |= {"s_k": 128, "s_v": 1, "i_k": 128, "i_v": 1} | ({} if start == 1 else {"initial_state": None})
    assert "st.global" in compile_for(decode_kernel, arch, types, constants, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(1, 16), (8, 16), (64, 16)])
def test_at_full_size_in_a_cuda_graph(shape):
    """bf16, K = V = 128, tiles of 8, 16 and 32 columns: replayed eight times, a captured step does what eight steps do;
    nothing waits for the host."""
    B, HV = shape
    tokens, S0 = draw(B=B, T=8, H=HV, HV=HV, K=128, V=128, dtype=torch.bfloat16)
    options, gate = options_of(HV, 128)
    expected_o, expected_S = reference(tokens, S0, **gate)
    state, step, outputs = S0.clone(), [x[:, :1].clone() for x in tokens], []
    out = torch.empty_like(step[2])
    run = lambda: fused_recurrent_gdn2(*step, initial_state=state, inplace_final_state=True, out=out, **options)
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    state.copy_(S0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(8):
            for held, x in zip(step, tokens):
                held.copy_(x[:, t : t + 1])
            graph.replay()
            outputs.append(out.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(torch.cat(outputs, dim=1), expected_o, TOLERANCE[torch.bfloat16])
    assert_close(state, expected_S, 1e-5)
