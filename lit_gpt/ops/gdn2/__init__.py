"""The Gated Delta Rule-2 operator: chunked for training and prefill, token by token for decoding, its definition."""

from lit_gpt.ops.gdn2.chunk import chunk_gdn2
from lit_gpt.ops.gdn2.recurrent import fused_recurrent_gdn2, naive_recurrent_gdn2

__all__ = ["chunk_gdn2", "fused_recurrent_gdn2", "naive_recurrent_gdn2"]
