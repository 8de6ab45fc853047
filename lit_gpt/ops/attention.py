"""Causal softmax attention, over all past tokens or over a sliding window, exact and without a [T, T] mask for windows.

flash-attn where it is installed and applies (CUDA, 16-bit, no documents); PyTorch's scaled_dot_product_attention
everywhere else, where a window of W tokens runs as blocks of W queries against the 2W keys that they can see.
"""

import importlib.util
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def backend(device: torch.device, dtype: torch.dtype, documents: bool = False) -> str:
    """The attention that tensors of this device and dtype get: `flash-attn`, or `sdpa`, which documents take always."""
    if documents or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    return "flash-attn" if importlib.util.find_spec("flash_attn") is not None else "sdpa"


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: Optional[int] = None, masks: Optional[list[Tensor]] = None
) -> Tensor:
    """Each query sees itself and the past; the queries are the last T of the S keys' positions.

    Args:
        q: queries [B, T, H, D].
        k, v: keys and values [B, S, G, D], S >= T, G a divisor of H.
        window: tokens seen, the query's own included; None: all.
        masks: of document_masks, which confine attention to one document; needs S == T.

    Returns:
        [B, T, H, D].
    """
    T, S = q.shape[1], k.shape[1]
    window = S if window is None else min(window, S)
    if backend(q.device, q.dtype, documents=masks is not None) == "flash-attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
    if T == S and window < T:
        return _windowed(q, k, v, window, masks)
    if masks is not None:
        return _sdpa(q, k, v, mask=masks[0])
    if T == S:
        return _sdpa(q, k, v, causal=True)
    return _sdpa(q, k, v, mask=_visible(T, S, window, q.device))


def document_masks(ids: Tensor, window: Optional[int], dtype: torch.dtype) -> list[Tensor]:
    """What causal_attention adds to its scores: 0 where a key is in reach and of the query's document, else -inf.

    Make them once for all layers of a window: SDPA keeps a mask of q's dtype as it is, and copies any other.

    Args:
        ids: document of each token [B, T].
        dtype: of the queries.

    Returns:
        [B, 1, T, T]; where the window is shorter than T, [B, 1, W, W] of the first block of W queries, and
        [B * blocks, 1, W, 2W] of the others.
    """
    T = ids.shape[1]
    window = T if window is None else min(window, T)

    def additive(queries: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        seen = visible & (queries[..., :, None] == keys[..., None, :])
        return torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(~seen, -torch.inf).unsqueeze(-3)

    head = ids[:, :window]
    masks = [additive(head, head, _visible(window, window, window, ids.device))]
    if window < T:
        # Padding is a document of its own, so that its queries have something to see.
        pairs = F.pad(ids, (0, -T % window), value=-1).unfold(1, 2 * window, window).flatten(0, 1)
        masks.append(additive(pairs[:, window:], pairs, _visible(window, 2 * window, window, ids.device)))
    return masks


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, masks: Optional[list[Tensor]]) -> Tensor:
    """Blocks of `window` queries against the same block of keys and the one before."""
    B, T, H, D = q.shape
    first = causal_attention(q[:, :window], k[:, :window], v[:, :window], masks=masks and masks[:1])
    padding = -T % window
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    blocks = (T + padding) // window - 1
    queries = q[:, window:].reshape(B * blocks, window, H, D)
    keys, values = (
        x.unfold(1, 2 * window, window).movedim(-1, 2).reshape(B * blocks, 2 * window, *x.shape[2:]) for x in (k, v)
    )
    mask = masks[1] if masks else _visible(window, 2 * window, window, q.device)
    rest = _sdpa(queries, keys, values, mask=mask).reshape(B, blocks * window, H, D)
    return torch.cat([first, rest[:, : T - window]], dim=1)


def _visible(T: int, S: int, window: int, device: torch.device) -> Tensor:
    """Which of S keys the last T positions may see, [T, S]."""
    i = torch.arange(S - T, S, device=device)[:, None]
    j = torch.arange(S, device=device)[None]
    return (j <= i) & (j > i - window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor] = None, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


class RotaryEmbedding(torch.nn.Module):
    """Rotary positions (arXiv 2104.09864) on all channels, turning channel i with channel i + D/2."""

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def forward(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, D] at positions start, start + 1, ... -> the same, turned; angles in fp32 at least."""
        wide = torch.promote_types(q.dtype, torch.float32)
        channel = torch.arange(0, self.head_dim, 2, device=q.device, dtype=wide)
        position = torch.arange(start, start + q.shape[1], device=q.device, dtype=wide)
        angle = torch.outer(position, self.base ** (-channel / self.head_dim))[:, None]
        cos, sin = angle.cos(), angle.sin()
        return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
