"""Softmax attention with rotary positions: the sliding-window layers of the hybrid, and full attention."""

from typing import Optional

import torch
from torch import Tensor, nn

from lit_gpt.config import AttentionConfig
from lit_gpt.documents import Documents
from lit_gpt.errors import UserError
from lit_gpt.ops.attention import RotaryEmbedding, causal_attention


class KeyValueCache:
    """The last `size` keys and values in a ring, at fixed memory, and how many tokens have passed."""

    def __init__(self, batch_size: int, size: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.k = torch.zeros(batch_size, size, heads, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.position = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, T, G, D] at the next T positions; return what the T queries may need.

        For one token that is the ring as it lies, since attention does not ask for the order of its keys; for more, the
        kept past in order of time and then the new ones.
        """
        size, T = self.k.shape[1], k.shape[1]
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)
        if T > 1:
            past = torch.arange(max(0, self.position - size), self.position, device=k.device) % size
            seen_k, seen_v = torch.cat([self.k[:, past], k], dim=1), torch.cat([self.v[:, past], v], dim=1)
        kept = min(T, size)
        slots = torch.arange(self.position + T - kept, self.position + T, device=k.device) % size
        self.k[:, slots], self.v[:, slots] = k[:, T - kept :], v[:, T - kept :]
        self.position += T
        if T > 1:
            return seen_k, seen_v
        return self.k[:, : self.position], self.v[:, : self.position]


class CausalSelfAttention(nn.Module):
    """Multi-head (or grouped-query) attention, x [B, T, D] -> y [B, T, D]; `window` None attends to all past tokens."""

    def __init__(self, n_embd: int, config: AttentionConfig, window: Optional[int]):
        super().__init__()
        self.config, self.window = config, window
        self.heads = [config.num_heads, config.kv_heads, config.kv_heads]
        self.qkv = nn.Linear(n_embd, sum(self.heads) * config.head_dim, bias=False)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_base)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, n_embd, bias=False)

    def forward(
        self, x: Tensor, documents: Optional[Documents] = None, cache: Optional[KeyValueCache] = None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.config.head_dim)).split(self.heads, dim=2)
        q, k = self.rotary(q, k, start=0 if cache is None else cache.position)
        if cache is not None:
            if self.window is None and cache.position + x.shape[1] > cache.k.shape[1]:
                raise UserError(f"full attention was given room for {cache.k.shape[1]} tokens, and they are used up.")
            k, v = cache.append(k, v)
        masks = None if documents is None else documents.attention_masks(self.window, q.dtype)
        y = causal_attention(q, k, v, self.window, masks)
        return self.o_proj(y.flatten(2))

    def new_cache(self, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache: `window` tokens of keys and values, or max_length of them for full attention."""
        size = max_length if self.window is None else self.window
        return KeyValueCache(batch_size, size, self.config.kv_heads, self.config.head_dim, device, dtype)

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs of the scores and their values, averaged over a sequence, masked pairs left out."""
        T, W = sequence_length, min(self.window or sequence_length, sequence_length)
        pairs = W * (W + 1) / 2 + (T - W) * W
        return 4 * self.config.num_heads * self.config.head_dim * pairs / T
