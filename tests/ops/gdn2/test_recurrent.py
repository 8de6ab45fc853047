"""naive_recurrent_gdn2 against the matrices of the paper, fused_recurrent_gdn2 against naive_recurrent_gdn2."""

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.errors import UserError
from lit_gpt.ops.gdn2 import chunk_gdn2, fused_recurrent_gdn2, naive_recurrent_gdn2


def draw(B, T, H, HV, K, V, N=None, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    tokens = [normal(B, T, H, K), F.normalize(normal(B, T, H, K), dim=-1), normal(B, T, HV, V)]
    tokens += [-normal(B, T, HV, K).exp(), normal(B, T, HV, K).sigmoid(), normal(B, T, HV, V).sigmoid()]
    return [x.to(dtype) for x in tokens], normal(N or B, HV, K, V)


def test_naive_is_the_equation():
    """S_t = (I - k (b*k)^T) Diag(exp g) S + k (w*v)^T, written with its matrices, for each sequence and head."""
    (q, k, v, g, b, w), S0 = draw(2, 7, 1, 2, 5, 4)
    o, final = naive_recurrent_gdn2(q, k, v, g, b, w, 0.7, S0, True)
    for n in range(2):
        for h in range(2):
            S = S0[n, h]
            for t in range(7):
                K, at = k[n, t, 0], (n, t, h)
                S = (torch.eye(5) - torch.outer(K, b[at] * K)) @ torch.diag(g[at].exp()) @ S
                S = S + torch.outer(K, w[at] * v[at])
                torch.testing.assert_close(o[at], 0.7 * S.T @ q[n, t, 0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(final[n, h], S, rtol=1e-12, atol=1e-12)


def test_naive_gradient_of_a_full_reset_is_zero():
    tokens, S0 = draw(1, 6, 1, 1, 4, 3)
    tokens[3][:, 2] = -torch.inf
    leaves = [x.requires_grad_() for x in (*tokens, S0)]
    naive_recurrent_gdn2(*leaves[:6], initial_state=leaves[6])[0].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert (leaves[3].grad[:, 2] == 0).all() and leaves[3].grad.any()


def test_naive_dtypes_and_default_scale():
    tokens, _ = draw(1, 6, 1, 1, 4, 3, dtype=torch.bfloat16)
    o, S = naive_recurrent_gdn2(*tokens, output_final_state=True)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert torch.equal(o, naive_recurrent_gdn2(*tokens, scale=0.5)[0])
    assert naive_recurrent_gdn2(*tokens)[1] is None


@pytest.mark.parametrize("offsets", [None, [0, 1, 1, 9, 40]])
def test_fused_equals_naive(offsets):
    packed = offsets is not None
    tokens, S0 = draw(1 if packed else 3, 40, 2, 4, 16, 24, N=len(offsets) - 1 if packed else None)
    options = {"initial_state": S0, "output_final_state": True, "cu_seqlens": torch.tensor(offsets) if packed else None}
    kept = S0.clone()
    for got, want in zip(fused_recurrent_gdn2(*tokens, **options), naive_recurrent_gdn2(*tokens, **options)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(S0, kept)


def test_fused_continues_from_chunk_token_by_token():
    tokens, _ = draw(2, 80, 1, 1, 16, 16)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    want, want_state = chunk_gdn2(*tokens, **options)
    o, S = chunk_gdn2(*(x[:, :70] for x in tokens), **options)
    for t in range(70, 80):
        o, S = fused_recurrent_gdn2(*(x[:, t : t + 1] for x in tokens), initial_state=S, **options)
        torch.testing.assert_close(o[:, 0], want[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(S, want_state, rtol=1e-11, atol=1e-11)


def test_fused_options_equal_those_of_chunk():
    tokens, S0 = draw(1, 20, 2, 2, 16, 24)
    A_log, dt_bias = torch.tensor([0.1, 1.0]), torch.linspace(-1, 1, 32)
    options = {"use_gate_in_kernel": True, "lower_bound": -5.0, "use_qk_l2norm_in_kernel": True, "state_v_first": True}
    options |= {"A_log": A_log, "dt_bias": dt_bias, "initial_state": S0.mT, "output_final_state": True, "scale": 0.3}
    for got, want in zip(fused_recurrent_gdn2(*tokens, **options), chunk_gdn2(*tokens, **options)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_fused_in_bfloat16_and_autocast():
    tokens, S0 = draw(1, 20, 2, 2, 16, 24, dtype=torch.bfloat16)
    want, state = naive_recurrent_gdn2(*tokens, initial_state=S0.float(), output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, S = fused_recurrent_gdn2(*tokens, initial_state=S0.float(), output_final_state=True)
    assert got.dtype == torch.bfloat16 and S.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(S, state, rtol=1e-5, atol=1e-5)


def test_fused_refuses_to_train():
    tokens, _ = draw(1, 4, 1, 1, 4, 4)
    tokens[1].requires_grad_()
    with pytest.raises(UserError, match="has no backward"):
        fused_recurrent_gdn2(*tokens)
    with torch.no_grad():
        fused_recurrent_gdn2(*tokens)


@pytest.mark.parametrize("op", [naive_recurrent_gdn2, fused_recurrent_gdn2])
def test_clear_errors(op):
    tokens, S0 = draw(2, 4, 1, 1, 4, 3)
    with pytest.raises(UserError, match="w must be"):
        op(*tokens[:5], tokens[5][:, :2])
    with pytest.raises(UserError, match="initial_state must be"):
        op(*tokens, initial_state=S0[:1])
    with pytest.raises(UserError, match="batch size 1, got 2"):
        op(*tokens, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(TypeError):
        op(*tokens, use_beta_sigmoid_in_kernel=True)
    with pytest.raises(UserError, match="use_gate_in_kernel=True needs A_log"):
        fused_recurrent_gdn2(*tokens, use_gate_in_kernel=True)
