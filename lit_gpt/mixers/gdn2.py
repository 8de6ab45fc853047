"""The Gated DeltaNet-2 layer."""

import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import GDN2Config
from lit_gpt.documents import Documents
from lit_gpt.ops.gated_norm import gated_rms_norm
from lit_gpt.ops.gdn2 import chunk_gdn2, fused_recurrent_gdn2
from lit_gpt.ops.rms_norm import RMSNorm
from lit_gpt.ops.short_conv import short_conv

SHORT = 16
"""Tokens after a cache that go through the recurrence one by one; more go by chunks of 64."""


class ShortConvolution(nn.Module):
    """Taps of a causal depthwise convolution, weight [C, W]."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


@dataclass
class RecurrentCache:
    """All that GDN-2 keeps of the past; both are updated in place."""

    state: Tensor
    """[B, HV, K, V] in fp32."""
    inputs: Tensor
    """The last W-1 inputs of the convolution [B, W-1, C]."""


class GatedDeltaNet2(nn.Module):
    """Gated Delta Rule-2 token mixer (arXiv 2605.22791, eq. 10 and fig. 1), x [B, T, D] -> y [B, T, D].

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = S_t^T q_t / sqrt(K)

    q, k, v: linear, causal convolution, SiLU (q, k then L2-normed). g = -exp(A_log) softplus(f + dt_bias), b and w
    sigmoids, each from a linear branch. The output is RMS-normed per head, times a gate, and projected. One matrix
    makes all branches of x.
    """

    def __init__(self, n_embd: int, config: GDN2Config, norm_eps: float):
        super().__init__()
        self.config = config
        H, HV, K, V = config.num_heads, config.value_heads, config.head_dim, config.value_dim
        decay_size = HV * K if config.decay == "channel" else HV
        decay_low = config.decay_rank if config.decay == "channel" else HV
        erase_size = HV * K if config.erase == "channel" else HV
        write_size = {"channel": HV * V, "scalar": HV, "tied": 0}[config.write]
        self.branches = [2 * H * K + HV * V, decay_low, erase_size, write_size, config.output_gate_rank or HV * V]

        self.in_proj = nn.Linear(n_embd, sum(self.branches), bias=False)
        self.conv = ShortConvolution(self.branches[0], config.conv_size)
        self.decay_up = nn.Linear(decay_low, decay_size, bias=False) if config.decay == "channel" else nn.Identity()
        self.gate_up = nn.Linear(config.output_gate_rank, HV * V) if config.output_gate_rank else nn.Identity()
        self.A_log = nn.Parameter(torch.empty(HV))
        self.dt_bias = nn.Parameter(torch.empty(decay_size))
        self.o_norm = RMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(HV * V, n_embd, bias=False)

    def reset_parameters(self) -> None:
        """A uniform in [1, 16]; softplus(dt_bias) log-uniform in [0.001, 0.1], without which recall is slow to be
        learned.
        """
        nn.init.uniform_(self.A_log, 1, 16)
        with torch.no_grad():
            self.A_log.log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(
        self, x: Tensor, documents: Optional[Documents] = None, cache: Optional[RecurrentCache] = None
    ) -> Tensor:
        qkv, decay, erase, write, gate = self.in_proj(x).split(self.branches, dim=-1)
        q, k, v = self._convolve(qkv, documents, cache)
        decay = self.decay_up(decay)
        if cache is not None and x.shape[1] <= SHORT:
            o = self._decode(q, k, v, decay, erase, write, cache.state)
        else:
            g, b, w = self._gates(decay, erase, write)
            if documents is not None:  # a decay of exp(-inf) = 0 forgets all there was; the operator is exact there
                g = g.masked_fill(documents.starts[:, :, None, None], -torch.inf)
            state = None if cache is None else cache.state
            o, last = chunk_gdn2(q, k, v, g, b, w, None, state, state is not None, use_qk_l2norm_in_kernel=True)
            if state is not None:
                state.copy_(last)
        o = gated_rms_norm(o, self.o_norm.weight, self.gate_up(gate), self.o_norm.eps, self.config.output_gate)
        return self.o_proj(o.flatten(2))

    def _convolve(self, qkv: Tensor, documents: Optional[Documents], cache: Optional[RecurrentCache]) -> list[Tensor]:
        """Inputs [B, T, C] -> q, k [B, T, H, K], v [B, T, HV, V]."""
        c = self.config
        sizes = [c.num_heads * c.head_dim, c.num_heads * c.head_dim, c.value_heads * c.value_dim]
        positions, history = documents and documents.positions, cache and cache.inputs
        pieces = short_conv(qkv, self.conv.weight, sizes, positions, history)
        return [x.unflatten(-1, (heads, -1)) for x, heads in zip(pieces, (c.num_heads, c.num_heads, c.value_heads))]

    def _gates(self, decay: Tensor, erase: Tensor, write: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Branches [B, T, .] -> g, b [B, T, HV, K], w [B, T, HV, V]; the decay in fp32 at least."""
        c, heads = self.config, (self.config.value_heads, -1)
        shape = (*decay.shape[:2], c.value_heads)
        wide = torch.promote_types(decay.dtype, torch.float32)
        g = -self.A_log.to(wide).exp()[:, None] * F.softplus(decay.to(wide) + self.dt_bias).unflatten(-1, heads)
        b = torch.sigmoid(erase).unflatten(-1, heads) * c.erase_range
        w = b if c.write == "tied" else torch.sigmoid(write).unflatten(-1, heads)
        return g.expand(*shape, c.head_dim), b.expand(*shape, c.head_dim), w.expand(*shape, c.value_dim)

    @torch.no_grad()
    def inspect(self, x: Tensor, documents: Optional[Documents] = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What forward makes of x [B, T, D], to be looked at: g, b [B, T, HV, K], w [B, T, HV, V], and the state
        [B, HV, K, V] after the last token.
        """
        qkv, decay, erase, write, _ = self.in_proj(x).split(self.branches, dim=-1)
        q, k, v = self._convolve(qkv, documents, None)
        g, b, w = self._gates(self.decay_up(decay), erase, write)
        reset = g if documents is None else g.masked_fill(documents.starts[:, :, None, None], -torch.inf)
        _, state = chunk_gdn2(q, k, v, reset, b, w, None, None, True, use_qk_l2norm_in_kernel=True)
        return g, b, w, state

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, state: Tensor
    ) -> Tensor:
        """A few tokens by the recurrence: o [B, T, HV, V]. Makes the gates of the branches; advances state in place."""
        c, heads = self.config, (self.config.value_heads, -1)
        shape = (*decay.shape[:2], c.value_heads)
        tied = c.write == "tied"
        g, b, w = (x.unflatten(-1, heads) for x in (decay, erase, erase if tied else write))
        g, b, w = g.expand(*shape, c.head_dim), b.expand(*shape, c.head_dim), w.expand(*shape, c.value_dim)
        o, _ = fused_recurrent_gdn2(
            q, k, v, g, b, w,
            A_log=self.A_log, dt_bias=self.dt_bias.view(heads).expand(c.value_heads, c.head_dim),
            initial_state=state, inplace_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            sigmoid_ranges=(c.erase_range, c.erase_range if tied else 1.0),
        )  # fmt: skip
        return o

    def new_cache(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> RecurrentCache:
        """The state before the first token; its size does not depend on max_length."""
        c = self.config
        state_dtype = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(batch_size, c.value_heads, c.head_dim, c.value_dim, device=device, dtype=state_dtype)
        inputs = torch.zeros(batch_size, c.conv_size - 1, self.branches[0], device=device, dtype=dtype)
        return RecurrentCache(state, inputs)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs of the chunkwise algorithm with C = 64, masked halves left out."""
        c, C = self.config, 64
        with_state = 6 * c.head_dim * c.value_dim
        within_chunk = 2 * C * c.head_dim + 2 * C * c.value_dim + C * C / 3
        return c.value_heads * (with_state + within_chunk)
