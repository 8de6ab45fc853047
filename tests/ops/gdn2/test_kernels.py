"""The Triton kernels of chunk_gdn2 against the recurrence in float64.

On a machine with a GPU they run there. Elsewhere the file runs itself once more under Triton's interpreter, in a
process of its own because Triton chooses the interpreter when it is imported."""

import os
import subprocess
import sys

import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.ops.gdn2 import chunk_gdn2, naive_recurrent_gdn2

pytest.importorskip("triton", reason="the fused kernels need Triton")

NAMES = ("q", "k", "v", "g", "b", "w", "S0")
GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not GPU
DEVICE = "cuda" if GPU else "cpu"
runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="no GPU; runs inside test_under_the_interpreter")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


@pytest.mark.skipif(GPU or INTERPRETED, reason="the kernels run directly")
def test_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def draw(T=100, H=1, HV=1, K=32, V=16, N=1, seed=0, decay=None, dtype=torch.float32):
    """q, k, v, g, b, w with B = 1, and a state for each of N sequences. Keys are not normalised: the operator does
    that."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    uniform = lambda *shape: torch.rand(shape, generator=rng)
    q, k, v, b, w = (
        normal(1, T, H, K),
        normal(1, T, H, K),
        normal(1, T, HV, V),
        uniform(1, T, HV, K),
        uniform(1, T, HV, V),
    )
    g = -0.3 * uniform(1, T, HV, K)
    if decay is not None:
        g = decay(g, uniform(*g.shape))
    return [x.to(dtype) for x in (q, k, v)] + [g] + [x.to(dtype) for x in (b, w)] + [normal(N, HV, K, V)]


def run(op, inputs, dtype=None, **options):
    """o, the final state and the gradient of every input, for fixed random gradients of both results."""
    *tokens, S0 = [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
    o, S = op(*tokens, initial_state=S0, output_final_state=True, **options)
    rng = torch.Generator().manual_seed(1)
    do, dS = (torch.randn(x.shape, generator=rng).to(x) for x in (o, S))
    torch.autograd.backward([o, S], [do, dS])
    return {"o": o.detach(), "S": S.detach()} | {f"d{name}": x.grad for name, x in zip(NAMES, [*tokens, S0])}


def normalised(op):
    def with_norm(q, k, *rest, **options):
        unit = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return op(unit(q), unit(k), *rest, **options)

    return with_norm


def errors(got, want):
    """Per tensor: relative error, and how far its scale is off (the slope against the reference, minus one)."""
    out = {}
    for name, reference in want.items():
        error, norm = got[name].double() - reference, reference.norm().clamp_min(1e-30)
        out[name] = (error.norm() / norm).item(), ((error * reference).sum() / norm**2).item()
    return out


def check(inputs, tolerance=None, bias=None, **options):
    """Compare with the recurrence in float64. Exact arithmetic would leave 1e-6 in the interpreter; on a GPU dots
    round to bf16 or tf32."""
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    half = inputs[2].dtype == torch.bfloat16
    tolerance = tolerance or (1e-5 if INTERPRETED else 1e-2 if half else 3e-3)
    got = run(chunk_gdn2_fused, inputs, use_qk_l2norm_in_kernel=True, **options)
    options.pop("config", None)
    want = run(normalised(naive_recurrent_gdn2), inputs, torch.float64, **options)
    for name, (error, slope) in errors(got, want).items():
        assert error < tolerance, f"{name}: relative error {error:.1e} above {tolerance:.0e}"
        assert abs(slope) < (bias or tolerance), f"{name}: biased by {slope:.1e}"


spikes = lambda value, share: lambda g, u: torch.where(u < share, value, 0.2 * g)
constant = lambda value: lambda g, u: torch.full_like(g, value)
DECAYS = {
    "none": lambda g, u: torch.zeros_like(g),
    "U(-5, 0)": lambda g, u: -5 * u,
    "-6.5": constant(-6.5),
    "-12": constant(-12.0),
    "-20": constant(-20.0),
    "isolated -1000": spikes(-1000.0, 0.02),
    "isolated -inf": spikes(-torch.inf, 0.02),
    "half -inf": spikes(-torch.inf, 0.5),
}


@runs_kernels
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
def test_decays(decay):
    check(draw(T=80, decay=decay))


@runs_kernels
@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
def test_lengths(T):
    check(draw(T=T, K=16, V=16))


@runs_kernels
@pytest.mark.parametrize("K, V", [(60, 20), (128, 32), (16, 100)])
def test_head_sizes(K, V):
    check(draw(T=40, K=K, V=V), scale=0.7)


@runs_kernels
def test_packed_sequences_with_states():
    inputs = draw(T=140, H=1, HV=2, N=5)
    check(inputs, cu_seqlens=torch.tensor([0, 1, 65, 65, 129, 140], device=DEVICE))


@runs_kernels
def test_correlated_keys_erased_whole():
    q, k, v, g, b, w, S0 = draw(T=70)
    check(
        [q, k[:, :1] + 0.1 * k, v, torch.zeros_like(g), torch.ones_like(b), w, S0],
        tolerance=1e-5 if INTERPRETED else 5e-2,
    )


@runs_kernels
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gate_in_the_kernel(lower_bound):
    """The gate inside gives the gate outside: outputs and the gradients of raw g, A_log and dt_bias."""
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    rng = torch.Generator().manual_seed(3)
    inputs = [x.to(DEVICE) for x in draw(T=70, HV=2)[:6]]
    raw = torch.randn(1, 70, 2, 32, generator=rng).to(DEVICE)
    A_log, dt_bias = torch.rand(2, generator=rng).to(DEVICE), torch.randn(64, generator=rng).to(DEVICE)
    do = torch.randn(1, 70, 2, 16, generator=rng).to(DEVICE)
    results = []
    for op, dtype in ((chunk_gdn2_fused, torch.float32), (chunk_gdn2, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (raw, A_log, dt_bias)]
        q, k, v, _, b, w = (x.to(dtype) for x in inputs)
        options = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, lower_bound=lower_bound)
        o, _ = op(q, k, v, leaves[0], b, w, A_log=leaves[1], dt_bias=leaves[2], **options)
        results.append(
            dict(zip(("o", "dg", "dA_log", "dt_bias"), (o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype)))))
        )
    for name, (error, _) in errors(*results).items():
        assert error < (1e-5 if INTERPRETED else 5e-3), f"{name}: relative error {error:.1e}"


@runs_kernels
def test_sigmoids_in_the_kernel():
    """Raw b and w inside give the gates outside, and the gradients of the raw."""
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    rng = torch.Generator().manual_seed(3)
    q, k, v, g, _, _, S0 = draw(T=70, HV=2)
    b, w = (4 * torch.randn(1, 70, 2, size, generator=rng) for size in (32, 16))
    inputs = [q, k, v, g, b, w, S0]
    got = run(chunk_gdn2_fused, inputs, use_qk_l2norm_in_kernel=True, sigmoid_ranges=(2.0, 1.0))
    outside = lambda *x, **options: naive_recurrent_gdn2(*x[:4], 2 * x[4].sigmoid(), x[5].sigmoid(), **options)
    want = run(normalised(outside), inputs, torch.float64)
    for name, (error, _) in errors(got, want).items():
        assert error < (1e-5 if INTERPRETED else 5e-3), f"{name}: relative error {error:.1e}"


@runs_kernels
@pytest.mark.parametrize("decay", ["none", "isolated -inf"])
def test_chunks_of_32_rows(decay):
    """What large heads and small GPUs take."""
    from lit_gpt.ops.gdn2.kernels.config import Config

    check(draw(T=80, HV=2, decay=DECAYS[decay]), config=Config(chunk=32))


@runs_kernels
def test_offsets_changed_in_place_count():
    """The chunks of packed sequences are kept with their offsets."""
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    inputs, offsets = [x.to(DEVICE) for x in draw(T=40)[:6]], torch.tensor([0, 10, 40], device=DEVICE)
    first = chunk_gdn2_fused(*inputs, cu_seqlens=offsets)[0]
    offsets[1] = 25
    second = chunk_gdn2_fused(*inputs, cu_seqlens=offsets)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, chunk_gdn2_fused(*inputs, cu_seqlens=offsets.clone())[0])


@runs_kernels
def test_what_is_recomputed_changes_nothing():
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    inputs = draw(T=70)
    kept, *recomputed = (run(chunk_gdn2_fused, inputs, recompute=policy) for policy in ("none", "scores", "all"))
    for results in recomputed:
        assert all(torch.equal(results[name], kept[name]) for name in kept)


@runs_kernels
def test_gradients_of_gradients_are_refused():
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    inputs = [x.to(DEVICE).requires_grad_() for x in draw(T=8)[:6]]
    grad = torch.autograd.grad(chunk_gdn2_fused(*inputs)[0].square().sum(), inputs, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@runs_kernels
def test_the_future_does_not_change_the_past():
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    inputs = [x.to(DEVICE) for x in draw(T=100)[:6]]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 77:] = x[:, 77:].flip(1) * 3
    outputs = [chunk_gdn2_fused(*x, use_qk_l2norm_in_kernel=True)[0][:, :77] for x in (inputs, changed)]
    assert torch.equal(*outputs)


@runs_kernels
def test_arguments_that_do_not_fit():
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    q, k, v, g, b, w, S0 = (x.to(DEVICE) for x in draw(T=8))
    with pytest.raises(UserError, match="w must be"):
        chunk_gdn2_fused(q, k, v, g, b, w[..., :8])
    with pytest.raises(UserError, match="head sizes from 16 to 256"):
        chunk_gdn2_fused(q[..., :8], k[..., :8], v, g[..., :8], b[..., :8], w)
    with pytest.raises(UserError, match="float64"):
        chunk_gdn2_fused(q.double(), k, v, g, b, w)
    with pytest.raises(UserError, match="one per sequence"):
        chunk_gdn2_fused(q, k, v, g, b, w, initial_state=S0[:, :, :16])
    with pytest.raises(UserError, match="A_log"):
        chunk_gdn2_fused(q, k, v, g, b, w, use_gate_in_kernel=True)


@pytest.mark.parametrize("decay", [None, *DECAYS.values()], ids=["mild", *DECAYS.keys()])
@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (256, 256), (16, 32)])
class TestOnGPU:
    pytestmark = on_gpu

    def test_bf16(self, decay, K, V):
        """Relative errors stay below 1%, and each gradient's scale within 0.5%: rounding, not a wrong term."""
        check(draw(T=200, H=2, HV=2, K=K, V=V, decay=decay, dtype=torch.bfloat16), bias=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K, V", [(128, 128), (256, 256), (60, 100)])
def test_other_types_on_gpu(dtype, K, V):
    check(draw(T=130, H=1, HV=2, K=K, V=V, dtype=dtype), tolerance=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_two_runs_are_equal_and_nothing_waits_for_the_host():
    from lit_gpt.ops.gdn2.kernels import chunk_gdn2_fused

    inputs = draw(T=4096, H=4, HV=4, K=128, V=128, N=4, dtype=torch.bfloat16)
    seqlens = torch.tensor([0, 1000, 1001, 3000, 4096], device=DEVICE)
    run(chunk_gdn2_fused, inputs, cu_seqlens=seqlens, use_qk_l2norm_in_kernel=True)
    *tokens, S0 = [x.to(DEVICE).requires_grad_() for x in inputs]
    do = torch.randn(tokens[2].shape, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = []
        for _ in range(2):
            o, _ = chunk_gdn2_fused(*tokens, initial_state=S0, cu_seqlens=seqlens, use_qk_l2norm_in_kernel=True)
            runs.append((o, *torch.autograd.grad(o, [*tokens, S0], do)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(*runs))
