"""Gated DeltaNet-2 language models: `GPT.from_name("swa_gdn2_1.3B")`."""

from lit_gpt.config import ModelConfig
from lit_gpt.model import GPT

__all__ = ["GPT", "ModelConfig"]
