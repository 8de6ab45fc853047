"""What a run takes of each device's memory: weights, gradients and AdamW to the byte, the rest by a formula."""

import math
from dataclasses import dataclass

import torch

from lit_gpt.config import ModelConfig
from lit_gpt.model import GPT
from lit_gpt.ops.cross_entropy import LOGITS_KEPT
from lit_gpt.training.args import PretrainArgs
from lit_gpt.training.strategy import Layout, device_bytes

GIB = 2**30
USABLE = 0.9
"""Share of a device's memory that an estimate may fill: the rest goes to the CUDA context, NCCL and fragmentation."""
CHUNK = 64
"""Tokens between two states that GDN-2 keeps for its backward pass."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: int
    """fp32 master weights, this device's shard of them."""
    gradients: int
    """fp32 gradients, likewise."""
    adam: int
    """AdamW's two moments, likewise, and its step counts."""
    activations: int
    """What the backward pass keeps of one micro-batch."""
    working: int
    """What is worked with at the height of it: the loss, or a block that is computed again."""

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.adam

    @property
    def total(self) -> int:
        return self.states + self.activations + self.working


class TrainingMemory:
    """What a run takes of a device, by its micro-batch, and what there is."""

    def __init__(self, args: PretrainArgs, config: ModelConfig, layout: Layout, device: torch.device):
        self.args, self.config, self.layout, self.cuda = args, config, layout, device.type == "cuda"
        self.available = device_bytes(self.cuda)

    def of(self, micro_batch: int) -> Memory:
        length, recompute = self.args.sequence_length, self.args.activation_checkpointing
        documents = self.args.document_reset
        return estimate(self.config, self.layout, micro_batch * length, length, recompute, self.cuda, documents)

    def fits(self, micro_batch: int) -> bool:
        """Whether a device holds it with some to spare; CPUs, whose memory is not ours alone, are taken to."""
        return self.available is None or self.of(micro_batch).total <= USABLE * self.available

    def describe(self, micro_batch: int) -> str:
        """Each part in GiB, the sum, the device's size, and what to do where it is too small."""
        memory = self.of(micro_batch)
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "AdamW": memory.adam,
            "activations of a micro-batch": memory.activations,
            "working memory": memory.working,
        }
        text = " + ".join(f"{value / GIB:.2f} {name}" for name, value in parts.items())
        text += f" = {'' if self.cuda else 'at least '}{memory.total / GIB:.2f} GiB on each device"
        if self.available is not None:
            text += f" of {self.available / GIB:.1f} GiB"
        if self.fits(micro_batch):
            return text
        return f"{text}: too much. Use a smaller --micro_batch_size, --activation_checkpointing or --strategy fsdp2"


def estimate(
    config: ModelConfig, layout: Layout, tokens: int, sequence_length: int, recompute: str, cuda: bool, documents: bool
) -> Memory:
    """Memory of training with micro-batches of `tokens` tokens in sequences of `sequence_length`.

    Weights, gradients and AdamW are exact: 16 bytes for each parameter of the device's shard. `a` is 2 bytes on GPUs
    (bf16) and 4 elsewhere. Of each token a block keeps (D = width, I = MLP width; HV heads of K key and V value
    channels, P = all that in_proj makes, C = channels of the convolution), if it runs the fused kernels (plain code
    keeps more):

        norms and residual stream   2 (4 + a) D
        MLP                         4 a I
        attention                   7 a H d with as many key as query heads H; another 5 a H d beyond two windows
        GDN-2                       a (P + C); decay 12 HV K; gates a HV (2 K + V); output 2 a HV V;
                                    chunks of 64: a HV (4.5 K + 2 x 64 + K V / 64 + 2 V), decays HV K / 4

    With full checkpointing a block keeps 4 D; with selective 4 D and the results of its matrix products and of softmax
    attention. The model adds (8 + a) D, and the masks of documents, one set for all layers. Worked with is the larger
    of the loss with what matrix products read (bf16 copies of all matrices; when sharded, the embeddings and two
    blocks), and of a block that is computed again. Logits come in pieces of LOGITS_KEPT, 12 + 2 a bytes each with
    softmax and gradients.
    """
    a = 2 if cuda else 4
    with torch.device("meta"):
        model = GPT(config)
    tensors = [parameter.shape for parameter in model.parameters()]
    shard = 4 * sum(math.ceil(shape[0] / layout.shards) * math.prod(shape[1:]) for shape in tensors)

    mixers = [config.mixer(i) for i in range(config.n_layer)]
    kept = [_block_bytes(config, mixer, sequence_length, a) for mixer in mixers]
    if recompute == "none":
        per_token, again = sum(kept), 0
    else:
        products = sum(_product_bytes(config, mixer, a) for mixer in mixers) if recompute == "selective" else 0
        per_token, again = 4 * config.n_embd * config.n_layer + products, tokens * max(kept)
    per_token += (8 + a) * config.n_embd
    if documents:
        windows = {config.attention.window if m == "swa" else sequence_length for m in mixers if m != "gdn2"}
        per_token += sum(a * min(2 * window, sequence_length) for window in windows)

    if layout.strategy in ("fsdp2", "hsdp"):
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
        gathered = 2 * a * max(blocks) + (4 + a) * (model.num_parameters() - sum(blocks))
    else:
        gathered = 2 * model.num_parameters() if cuda else 0
    logits = min(tokens * config.vocab_size, max(LOGITS_KEPT, config.vocab_size))
    return Memory(
        weights=shard,
        gradients=shard,
        adam=2 * shard + 4 * len(tensors),
        activations=tokens * per_token,
        working=max(gathered + (12 + 2 * a) * logits, again),
    )


def _block_bytes(config: ModelConfig, mixer: str, sequence_length: int, a: int) -> int:
    """What a block keeps of a token for its backward pass; `a` bytes in an activation."""
    stream = 2 * (4 + a) * config.n_embd + 4 * a * config.intermediate_size
    if mixer != "gdn2":
        c = config.attention
        H, G = c.num_heads, c.kv_heads
        copied = H + 4 * G if mixer == "swa" and sequence_length > 2 * c.window else 0
        return stream + a * (4 * H + 3 * G + copied) * c.head_dim
    c = config.gdn2
    HV, K, V = c.value_heads, c.head_dim, c.value_dim
    channels = 2 * c.num_heads * K + HV * V
    projections = channels + HV * (2 * K + V) + c.decay_rank + c.output_gate_rank
    chunks = a * HV * (9 * K // 2 + 2 * CHUNK + K * V // CHUNK + 2 * V) + HV * K // 4
    gates = 12 * HV * K + a * HV * (2 * K + V)
    return stream + a * (projections + channels) + gates + chunks + 2 * a * HV * V


def _product_bytes(config: ModelConfig, mixer: str, a: int) -> int:
    """What selective checkpointing keeps of a token: results of matrix products and softmax attention."""
    linears = config.n_embd + 2 * config.intermediate_size
    if mixer != "gdn2":
        c = config.attention
        return a * (linears + 2 * (c.num_heads + c.kv_heads) * c.head_dim)
    c = config.gdn2
    HV, K, V = c.value_heads, c.head_dim, c.value_dim
    return a * (linears + 2 * c.num_heads * K + HV * (3 * K + 3 * V) + c.decay_rank + c.output_gate_rank)
