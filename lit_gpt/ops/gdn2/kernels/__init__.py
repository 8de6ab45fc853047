"""Fused Triton kernels for GDN-2 (Hopper first): decay (exact decay factors), prepare, scan, gradients, launch (the
op)."""

from .op import chunk_gdn2_fused

__all__ = ["chunk_gdn2_fused"]
