"""Gated DeltaNet-2 language models: `GPT.from_name("swa_gdn2_1.3B")`."""

from typing import Any

__all__ = ["GPT", "ModelConfig"]


def __getattr__(name: str) -> Any:
    """Import the models when they are asked for: what only handles text and tokens starts without torch."""
    if name == "GPT":
        from lit_gpt.model import GPT

        return GPT
    if name == "ModelConfig":
        from lit_gpt.config import ModelConfig

        return ModelConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
