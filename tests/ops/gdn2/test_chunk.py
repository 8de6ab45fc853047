"""chunk_gdn2 against the recurrence, against itself, and against older operators it contains."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lit_gpt.errors import UserError
from lit_gpt.ops.gdn2 import chunk_gdn2, naive_recurrent_gdn2

NAMES = ("q", "k", "v", "g", "b", "w", "S0")


def draw(B=1, T=65, H=1, K=16, V=16, HV=None, N=None, seed=0, dtype=torch.float64, gates=(0.0, 1.0)):
    """Inputs as a layer makes them (unit keys, gates uniform between `gates`, log-decays around -1) and a state."""
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=rng, dtype=torch.float64) * (gates[1] - gates[0]) + gates[0]
    HV, N = HV or H, N or B
    q, k, v = normal(B, T, H, K), F.normalize(normal(B, T, H, K), dim=-1), normal(B, T, HV, V)
    g, b, w = -normal(B, T, HV, K).exp(), uniform(B, T, HV, K), uniform(B, T, HV, V)
    return [x.to(dtype) for x in (q, k, v, g, b, w)] + [normal(N, HV, K, V)]


def run(op, inputs, **options):
    """o, the final state and the gradient of every input, for fixed random gradients of both results."""
    *tokens, S0 = [x.detach().clone().requires_grad_() for x in inputs]
    o, S = op(*tokens, initial_state=S0, output_final_state=True, **options)
    rng = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o)
    dS = torch.randn(S.shape, generator=rng, dtype=torch.float64).to(S)
    torch.autograd.backward([o, S], [do, dS])
    return {"o": o.detach(), "S": S.detach()} | {f"d{name}": x.grad for name, x in zip(NAMES, [*tokens, S0])}


def assert_close(got, want, tolerance=1e-10):
    """Per tensor: ||got - want|| <= tolerance ||want||. Exactly zero where the reference is zero everywhere."""
    for name, reference in want.items():
        x = got[name].to(reference.dtype)
        assert torch.isfinite(x).all(), f"{name} is not finite"
        error, norm = (x - reference).norm().item(), reference.norm().item()
        assert error <= tolerance * norm, (
            f"{name}: relative error {error / max(norm, 1e-300):.1e} above {tolerance:.0e}"
        )


def check(inputs, **options):
    assert_close(run(chunk_gdn2, inputs, **options), run(naive_recurrent_gdn2, inputs, **options))


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 200])
def test_lengths(T):
    check(draw(B=2, T=T, H=2, K=16, V=24), scale=0.3)


@pytest.mark.parametrize("K, V", [(16, 256), (256, 16), (60, 60), (128, 128), (64, 32), (17, 1), (1, 9)])
def test_head_sizes(K, V):
    check(draw(T=70, K=K, V=V))


def spikes(value, share):
    def decay(g):
        hit = torch.rand(g.shape, generator=torch.Generator().manual_seed(2)) < share
        return torch.where(hit, torch.tensor(value, dtype=g.dtype), 0.3 * g)

    return decay


DECAYS = {
    "none": torch.zeros_like,
    "mild": lambda g: 0.01 * g,
    "-6.5": lambda g: torch.full_like(g, -6.5),
    "-12": lambda g: torch.full_like(g, -12.0),
    "-20": lambda g: torch.full_like(g, -20.0),
    "isolated -1000": spikes(-1000.0, 0.02),
    "isolated -inf": spikes(-torch.inf, 0.02),
    "half -inf": spikes(-torch.inf, 0.5),
    "all -inf": lambda g: torch.full_like(g, -torch.inf),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_any_decay_is_exact(decay):
    inputs = draw(T=140, K=24, V=20)
    inputs[3] = DECAYS[decay](inputs[3])
    check(inputs)


@pytest.mark.parametrize("decay", ["-6.5", "-12", "-20", "isolated -1000", "half -inf"])
def test_gradient_of_strong_decay_keeps_its_digits_in_float32(decay):
    """Every channel of dg by itself: forming it as a difference of larger numbers loses most digits here."""
    inputs = draw(T=140, K=24, V=20, dtype=torch.float32)
    inputs[3] = DECAYS[decay](inputs[3])
    got, want = run(chunk_gdn2, inputs)["dg"], run(naive_recurrent_gdn2, [x.double() for x in inputs])["dg"]
    error = (got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-300)
    assert error.max() < 5e-6
    assert (got[inputs[3] == -torch.inf] == 0).all()


@pytest.mark.parametrize("erase, write", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)])
def test_closed_and_open_gates(erase, write):
    inputs = draw(T=70)
    inputs[4], inputs[5] = torch.full_like(inputs[4], erase), torch.full_like(inputs[5], write)
    check(inputs)


def test_erase_gate_up_to_two():
    check(draw(T=130, gates=(0.0, 2.0)))


def test_correlated_keys_with_full_erase():
    inputs = draw(T=130)
    inputs[1] = F.normalize(inputs[1][:, :1] + 0.1 * inputs[1], dim=-1)
    inputs[3], inputs[4] = 0.001 * inputs[3], torch.ones_like(inputs[4])
    check(inputs)


OFFSETS = [[0, 1, 65, 129, 130, 200], [0, 64, 64, 200], [0, 3, 70, 200], [0, 200]]


@pytest.mark.parametrize("offsets", OFFSETS)
def test_packed_sequences_equal_each_run_alone(offsets):
    inputs = draw(T=200, H=1, HV=2, N=len(offsets) - 1)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    packed = run(chunk_gdn2, inputs, cu_seqlens=cu_seqlens)
    assert_close(packed, run(naive_recurrent_gdn2, inputs, cu_seqlens=cu_seqlens))
    with torch.no_grad():
        for n, (start, end) in enumerate(pairwise(offsets)):
            if start < end:
                alone = [x[:, start:end] for x in inputs[:6]]
                o, S = chunk_gdn2(*alone, initial_state=inputs[6][n : n + 1], output_final_state=True)
                assert_close({"o": packed["o"][:, start:end], "S": packed["S"][n : n + 1]}, {"o": o, "S": S}, 1e-14)
            else:
                assert torch.equal(packed["S"][n], inputs[6][n])
        o, _ = chunk_gdn2(
            *inputs[:6], initial_state=inputs[6], cu_seqlens=cu_seqlens.clone(), cu_seqlens_cpu=cu_seqlens
        )
        assert torch.equal(o, packed["o"])


def test_packed_sequences_do_not_leak():
    *tokens, S0 = draw(T=130, N=2)
    cu_seqlens = torch.tensor([0, 70, 130])
    before, _ = chunk_gdn2(*tokens, initial_state=S0, cu_seqlens=cu_seqlens)
    for x in tokens:
        x[:, :70] = x[:, :70].flip(1)
    after, _ = chunk_gdn2(*tokens, initial_state=S0, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, 70:], after[:, 70:])
    assert not torch.equal(before[:, :70], after[:, :70])


def test_grouped_value_heads_equal_repeated_queries_and_keys():
    inputs = draw(T=70, H=2, HV=6)
    got = run(chunk_gdn2, inputs)
    repeated = run(chunk_gdn2, [x.repeat_interleave(3, 2) for x in inputs[:2]] + inputs[2:])
    for name in ("dq", "dk"):
        repeated[name] = repeated[name].unflatten(2, (2, 3)).sum(3)
    assert_close(got, repeated, 1e-14)
    assert_close(got, run(naive_recurrent_gdn2, inputs))


def test_state_carries_over():
    *tokens, S0 = draw(T=150)
    o, S = chunk_gdn2(*tokens, initial_state=S0, output_final_state=True)
    o1, S1 = chunk_gdn2(*(x[:, :70] for x in tokens), initial_state=S0, output_final_state=True)
    o2, S2 = chunk_gdn2(*(x[:, 70:] for x in tokens), initial_state=S1, output_final_state=True)
    assert_close({"o": torch.cat([o1, o2], 1), "S": S2}, {"o": o, "S": S}, 1e-13)
    assert chunk_gdn2(*tokens)[1] is None


def test_state_v_first():
    inputs = draw(T=70, H=2, K=16, V=24)
    want = run(chunk_gdn2, inputs)
    o, S = chunk_gdn2(*inputs[:6], initial_state=inputs[6].mT.contiguous(), output_final_state=True, state_v_first=True)
    assert S.shape == (1, 2, 24, 16)
    assert torch.equal(o, want["o"]) and torch.equal(S.mT, want["S"])


def kda(q, k, v, g, beta):
    """Kimi Delta Attention, one head: S = (I - beta k k^T) Diag(exp g) S + beta k v^T."""
    S, out = q.new_zeros(q.shape[-1], v.shape[-1]), []
    for t in range(len(q)):
        I = torch.eye(len(S), dtype=q.dtype)
        S = (I - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(g[t].exp()) @ S + beta[t] * torch.outer(k[t], v[t])
        out.append(S.T @ q[t] / len(S) ** 0.5)
    return torch.stack(out)


def gated_deltanet(q, k, v, g, beta):
    """Gated DeltaNet, one head: S = exp(g) S (I - beta k k^T) + beta v k^T with one decay per token and S [V, K]."""
    S, out = q.new_zeros(v.shape[-1], q.shape[-1]), []
    for t in range(len(q)):
        S = g[t].exp() * (S - beta[t] * torch.outer(S @ k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        out.append(S @ q[t] / len(k[t]) ** 0.5)
    return torch.stack(out)


@pytest.mark.parametrize("operator, scalar_decay", [(kda, False), (gated_deltanet, True)])
def test_tied_gates_give_the_older_operators(operator, scalar_decay):
    q, k, v, g, *_ = draw(T=80, K=12, V=20)
    g = g[..., :1] if scalar_decay else g
    beta = torch.rand(1, 80, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]
    q_, k_, v_, g_, beta_ = leaves
    o, _ = chunk_gdn2(q_, k_, v_, g_.expand_as(q), beta_.expand_as(q), beta_.expand_as(v))
    weight = torch.randn_like(o)
    got = torch.autograd.grad((o * weight).sum(), leaves)
    want_o = operator(*(x[0, :, 0] if x is not beta_ else x[0, :, 0, 0] for x in leaves))
    want = torch.autograd.grad((want_o * weight[0, :, 0]).sum(), leaves)
    assert_close({"o": o[0, :, 0]}, {"o": want_o})
    assert_close(dict(enumerate(got)), dict(enumerate(want)))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("use_A_log, lower_bound", [(True, None), (True, -5.0), (True, -60.0), (False, -5.0)])
def test_norm_and_gate_inside_equal_outside(use_A_log, use_bias, lower_bound):
    H, K = 2, 16
    *tokens, S0 = draw(T=70, H=H, K=K)
    tokens[1] = 3 * tokens[1]
    tokens[3] = tokens[3] + 1
    A_log = torch.tensor([0.3, 1.5], dtype=torch.float64) if use_A_log else None
    dt_bias = torch.linspace(-1, 1, H * K, dtype=torch.float64) if use_bias else None

    def inside(leaves, A_log, dt_bias):
        options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "lower_bound": lower_bound}
        return chunk_gdn2(*leaves, initial_state=S0, A_log=A_log, dt_bias=dt_bias, **options)[0]

    def outside(leaves, A_log, dt_bias):
        q, k, v, g, b, w = leaves
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        x = g if dt_bias is None else g + dt_bias.view(H, K)
        rate = torch.ones(H, 1) if A_log is None else A_log.exp()[:, None]
        g = -rate * F.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)
        return naive_recurrent_gdn2(q, k, v, g, b, w, initial_state=S0)[0]

    results = []
    for function in (inside, outside):
        leaves = [x.clone().requires_grad_() for x in tokens]
        extra = [None if x is None else x.clone().requires_grad_() for x in (A_log, dt_bias)]
        o = function(leaves, *extra)
        wanted = leaves + [x for x in extra if x is not None]
        grads = torch.autograd.grad((o * o.detach().cos()).sum(), wanted)
        results.append({"o": o.detach()} | dict(enumerate(grads)))
    assert_close(*results)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_is_rounding_only(dtype, tolerance):
    """The inputs are rounded first, so what remains is the rounding of results: fp32 accumulation leaves no more."""
    inputs = draw(T=200, H=2, K=64, V=64, dtype=dtype)
    got = run(chunk_gdn2, [*inputs[:6], inputs[6].float()])
    assert got["o"].dtype == dtype and got["dq"].dtype == dtype and got["S"].dtype == torch.float32
    assert_close(got, run(naive_recurrent_gdn2, [x.double() for x in inputs]), tolerance)


def test_autocast_and_mixed_dtypes_change_nothing():
    q, k, v, g, b, w, S0 = draw(T=70, dtype=torch.bfloat16)
    inputs = [q, k, v, g.float() * 1.001, b, w, S0.float()]
    want = run(chunk_gdn2, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(chunk_gdn2, inputs)
    for name, x in want.items():
        assert torch.equal(got[name], x) and got[name].dtype == x.dtype
    assert want["o"].dtype == torch.bfloat16 and want["dg"].dtype == torch.float32 and want["S"].dtype == torch.float32
    exact = run(naive_recurrent_gdn2, [x.double() for x in inputs])
    assert_close(want, exact, 1e-2)


def test_norm_and_gate_of_bfloat16_inputs_are_computed_in_float32():
    q, k, v, g, b, w, _ = draw(T=70, dtype=torch.bfloat16)
    v, options = v.float(), {"use_gate_in_kernel": True, "lower_bound": -5.0, "use_qk_l2norm_in_kernel": True}
    got, _ = chunk_gdn2(q, k, v, g, b, w, **options)
    want, _ = chunk_gdn2(q.double(), k.double(), v.double(), g.double(), b.double(), w.double(), **options)
    assert_close({"o": got}, {"o": want}, 3e-6)


def test_activation_checkpointing_and_no_grad():
    inputs = draw(T=70)
    want = run(chunk_gdn2, inputs)
    got = run(lambda *a, **k: checkpoint(chunk_gdn2, *a, use_reentrant=False, **k), inputs)
    with torch.no_grad():
        o, _ = chunk_gdn2(*inputs[:6], initial_state=inputs[6])
    assert torch.equal(o, want["o"])
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_two_runs_are_bit_identical_and_inputs_stay_as_they_were():
    inputs = draw(B=2, T=200, H=2, dtype=torch.float32)
    copies = [x.clone() for x in inputs]
    first, second = run(chunk_gdn2, inputs), run(chunk_gdn2, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    *tokens, S0 = inputs
    chunk_gdn2(*tokens, initial_state=S0.float(), output_final_state=True)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))


@pytest.mark.parametrize("cut", [1, 40, 64, 100])
def test_the_future_does_not_touch_the_past(cut):
    *tokens, S0 = draw(T=150, H=2, dtype=torch.float32)
    before, _ = chunk_gdn2(*tokens, initial_state=S0.float())
    for x, y in zip(tokens, draw(T=150, H=2, dtype=torch.float32, seed=9)[:6]):
        x[:, cut:] = y[:, cut:]
    tokens[3][:, cut:] *= 50
    after, _ = chunk_gdn2(*tokens, initial_state=S0.float())
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_gradcheck():
    *tokens, S0 = draw(T=3, K=2, V=2, N=2)
    leaves = [x.requires_grad_() for x in (*tokens, S0)]
    function = lambda *x: chunk_gdn2(*x[:6], 0.7, x[6], True, cu_seqlens=torch.tensor([0, 1, 3]))
    assert torch.autograd.gradcheck(function, leaves)


def test_strided_inputs_and_outputs():
    """Heads sliced out of one projection, and a gradient that arrives expanded."""
    tokens = draw(B=2, T=70, H=2)[:6]
    joined = torch.cat(tokens, -1).requires_grad_()
    o, _ = chunk_gdn2(*joined.split(16, -1))
    o.sum().backward()
    leaves = [x.clone().requires_grad_() for x in tokens]
    naive_recurrent_gdn2(*leaves)[0].sum().backward()
    assert_close({"grad": joined.grad}, {"grad": torch.cat([x.grad for x in leaves], -1)})


def test_second_derivative_is_refused():
    q, *rest = draw(T=3)[:6]
    q.requires_grad_()
    (dq,) = torch.autograd.grad(chunk_gdn2(q, *rest)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


WRONG = {
    "one more key": (dict(k=torch.zeros(1, 9, 2, 16)), "k must be"),
    "gate without value heads": (dict(b=torch.zeros(1, 8, 1, 16)), "b must be"),
    "write gate as wide as keys": (dict(w=torch.zeros(1, 8, 2, 16)), "w must be"),
    "three dimensions": (dict(q=torch.zeros(1, 8, 16)), "q must be a floating-point tensor"),
    "integers": (dict(g=torch.zeros(1, 8, 2, 16, dtype=torch.long)), "g must be a floating-point tensor"),
    "heads that do not divide": (dict(v=torch.zeros(1, 8, 3, 24)), "multiple"),
    "no tokens": (dict(q=torch.zeros(1, 0, 2, 16)), "at least 1"),
    "transposed state": (dict(initial_state=torch.zeros(1, 2, 24, 16)), "initial_state must be"),
    "half-precision state": (dict(initial_state=torch.zeros(1, 2, 16, 24).bfloat16()), "initial_state must be float32"),
    "offsets that stop early": (dict(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must rise from 0 to T = 8"),
    "offsets that fall": (dict(cu_seqlens=torch.tensor([0, 6, 4, 8])), "cu_seqlens must rise"),
    "float offsets": (dict(cu_seqlens=torch.tensor([0.0, 8.0])), "vector of integers"),
    "states of other sequences": (
        dict(cu_seqlens=torch.tensor([0, 4, 8]), initial_state=torch.zeros(1, 2, 16, 24)),
        "initial_state must be",
    ),
    "host copy alone": (dict(cu_seqlens_cpu=torch.tensor([0, 8])), "needs it"),
    "context parallelism": (dict(cp_context=object()), "context parallelism"),
    "states in between": (dict(return_intermediate_states=True), "in between"),
    "other chunks": (dict(chunk_size=32), "chunk_size must be 64"),
    "gate without A_log": (dict(use_gate_in_kernel=True), "needs A_log"),
    "A_log without gate": (dict(A_log=torch.zeros(2)), "use_gate_in_kernel=True"),
    "bias without gate": (dict(dt_bias=torch.zeros(32)), "use_gate_in_kernel=True"),
    "bound without gate": (dict(lower_bound=-5.0), "use_gate_in_kernel=True"),
    "safe gate without bound": (
        dict(use_gate_in_kernel=True, safe_gate=True, A_log=torch.zeros(2)),
        "needs lower_bound",
    ),
    "positive bound": (dict(use_gate_in_kernel=True, lower_bound=5.0), "must be negative"),
    "A_log of other heads": (dict(use_gate_in_kernel=True, A_log=torch.zeros(3)), "A_log must have"),
    "bias of other channels": (
        dict(use_gate_in_kernel=True, A_log=torch.zeros(2), dt_bias=torch.zeros(16)),
        "dt_bias must have",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_clear_errors(case):
    names = ("q", "k", "v", "g", "b", "w")
    changes, message = WRONG[case]
    arguments = dict(zip(names, draw(T=8, H=2, K=16, V=24)[:6])) | changes
    with pytest.raises(UserError, match=message) as error:
        chunk_gdn2(**arguments)
    assert "\n" not in str(error.value)


def test_packed_batches_and_unknown_options_are_refused():
    tokens = draw(B=2, T=8)[:6]
    with pytest.raises(UserError, match="batch size 1, got 2"):
        chunk_gdn2(*tokens, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(TypeError, match="use_beta_sigmoid_in_kernel"):
        chunk_gdn2(*tokens, use_beta_sigmoid_in_kernel=True)


def test_hints_change_nothing():
    tokens = draw(T=70)[:6]
    want, _ = chunk_gdn2(*tokens)
    got, _ = chunk_gdn2(*tokens, safe_gate=True, lower_bound=-5.0, disable_recompute=True, chunk_size=64)
    assert torch.equal(got, want)
