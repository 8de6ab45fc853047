"""GPT: embedding, blocks of a token mixer and an MLP, norm, output head.

    model = GPT.from_name("swa_gdn2_1.3B")
    logits = model(idx)                              # [B, T] -> [B, T, V]
    losses = model(idx, targets)                     # [B, T], without ever holding all logits
    logits = model(idx, cu_seqlens=offsets)          # documents packed into the flattened batch stay apart
    logits = model(idx, cache=model.new_cache(B))    # goes on from where the cache is, and advances it

Initialisation: every matrix and the embedding normal with deviation 0.02; the projections that write to the residual
stream (of mixer and MLP alike) divided by sqrt(2 n_layer); norms 1, biases 0; convolutions and decay parameters as
their layers say.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import ModelConfig
from lit_gpt.documents import Documents
from lit_gpt.mixers import build_mixer
from lit_gpt.mixers.gdn2 import GatedDeltaNet2, ShortConvolution
from lit_gpt.ops.cross_entropy import linear_cross_entropy
from lit_gpt.ops.rms_norm import RMSNorm


class MLP(nn.Module):
    """SwiGLU: proj(silu(gate) * up), gate and up from one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.o_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.o_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.mixer = build_mixer(config, layer)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, documents: Optional[Documents] = None, cache: Optional[Any] = None) -> Tensor:
        x = x + self.mixer(self.norm_1(x), documents, cache)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    @classmethod
    def from_name(cls, name: str, **overrides) -> "GPT":
        """The model of a named config (see ModelConfig.from_name), freshly initialised."""
        return cls(ModelConfig.from_name(name, **overrides))

    def forward(
        self,
        idx: Tensor,
        targets: Optional[Tensor] = None,
        cu_seqlens: Optional[Tensor] = None,
        cache: Optional[list] = None,
        last_only: bool = False,
        rows_apart: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]; or, given targets [B, T], the cross entropy of each token in nats.

        Args:
            cu_seqlens: offsets of the documents in the flattened batch, [N + 1] from 0 to B * T. Nothing passes
                between documents.
            cache: from new_cache; the tokens follow those that it has seen. For inference: run it without gradients.
            last_only: logits of the last position only, [B, 1, V].
            rows_apart: documents end with their row, whatever cu_seqlens says, so that rows are computed side by side,
                as without documents. Otherwise a document may go on in the next row.
        """
        x = self.transformer.wte(idx)
        documents = None
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError("cu_seqlens packs whole documents; a cache continues one sequence: give one of them")
            x = x if rows_apart else x.flatten(0, 1)[None]
            documents = Documents(cu_seqlens, x.shape[:2], x.device)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, documents, None if cache is None else cache[layer])
        x = self.transformer.ln_f(x[:, -1:] if last_only else x)
        if documents is not None:
            x = x.view(*idx.shape, -1)
        if targets is not None:
            return linear_cross_entropy(x, self.lm_head.weight, targets)
        return self.lm_head(x)

    def new_cache(self, batch_size: int, max_length: Optional[int] = None, dtype: Optional[torch.dtype] = None) -> list:
        """An empty cache for each layer, on the model's device. max_length bounds the tokens to come; only full
        attention needs it.
        """
        weight = self.lm_head.weight
        if max_length is None:
            if "full" in self.config.block_pattern:
                raise ValueError("full attention keeps every token: say how many there may be with max_length")
            max_length = self.config.attention.window
        return [
            b.mixer.new_cache(batch_size, max_length, weight.device, dtype or weight.dtype) for b in self.transformer.h
        ]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew from torch's global generator, in the order of the modules."""
        for name, module in self.named_modules():
            self.init_module(name, module)

    def init_module(self, name: str, module: nn.Module) -> None:
        """Draw the parameters that are a module's own, not those of modules within it."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            writes_residual = name.endswith("o_proj")
            std = 0.02 / (2 * self.config.n_layer) ** 0.5 if writes_residual else 0.02
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, (ShortConvolution, GatedDeltaNet2)):
            module.reset_parameters()

    def tie_weights(self) -> None:
        """Make embedding and output head one parameter, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def num_parameters(self, blocks_only: bool = False) -> int:
        """Parameters in all, or in the blocks alone (without embedding, head and final norm, as the paper's tables
        count).
        """
        return sum(p.numel() for p in (self.transformer.h if blocks_only else self).parameters())

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of training on one token: 6 for each parameter of a matrix, and thrice the forward cost of each mixer.

        The embedding is a look-up and counts nothing; the output head counts, tied or not.
        """
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        matrices = sum(m.weight.numel() for m in linears)
        return 6 * matrices + 3 * sum(b.mixer.flops_per_token(sequence_length) for b in self.transformer.h)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters in the blocks and in all, counted on the model itself without allocating it."""
    with torch.device("meta"):
        model = GPT(config)
    return model.num_parameters(blocks_only=True), model.num_parameters()
