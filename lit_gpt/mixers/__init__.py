"""Token mixers, one file each, by the names that a block pattern uses.

The contract: `mixer(x, documents, cache) -> y`, x and y [B, T, D]; `documents` confines mixing to one document each;
`cache`, made by `mixer.new_cache(...)`, holds the past and is updated in place; `mixer.flops_per_token(T)` counts what
parameters do not show.
"""

from torch import nn

from lit_gpt.config import ModelConfig
from lit_gpt.mixers.attention import CausalSelfAttention
from lit_gpt.mixers.gdn2 import GatedDeltaNet2


def build_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The token mixer of block `layer`."""
    name = config.mixer(layer)
    if name == "gdn2":
        return GatedDeltaNet2(config.n_embd, config.gdn2, config.norm_eps)
    return CausalSelfAttention(
        config.n_embd, config.attention, window=config.attention.window if name == "swa" else None
    )
