"""Which tensors go to the Triton kernels."""

import torch
from torch import Tensor


def runs_fused(*tensors: Tensor) -> bool:
    """Whether an operator runs its Triton kernels: on CUDA, but for float64, which only the plain code takes."""
    return tensors[0].is_cuda and all(x.dtype != torch.float64 for x in tensors)
