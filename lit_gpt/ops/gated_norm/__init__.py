"""RMS norm of each head times an activated gate: what stands between the recurrence of GDN-2 and its output projection.

    y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

CUDA tensors run one Triton kernel each way (kernels.py), other tensors the plain code here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.ops.dispatch import runs_fused
from lit_gpt.ops.rms_norm import rms_norm

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, eps: float, activation: str) -> Tensor:
    """y [..., H, V] in x's dtype.

    Args:
        x: [..., H, V], normed over V.
        weight: [V].
        gate: [..., H * V] or of the shape of x; any strides: a slice of a wider projection is read where it is.
        activation: of the gate: silu or sigmoid.
    """
    if gate.ndim < x.ndim:
        gate = gate.unflatten(-1, x.shape[-2:])
    if not runs_fused(x, weight, gate):
        return (rms_norm(x, weight, eps) * ACTIVATIONS[activation](gate)).to(x.dtype)

    from lit_gpt.ops.gated_norm import kernels  # imports Triton, which CPU builds of PyTorch lack

    return kernels.gated_rms_norm(x, weight, gate, eps, activation)
