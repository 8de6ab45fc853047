"""What every GDN-2 entry does with its inputs before the recurrence: checks, gate activation, L2 norm, shared heads."""

from typing import Optional, Union

import torch
import torch.nn.functional as F

from lit_gpt.errors import UserError


def check_inputs(q, k, v, g, b, w, initial_state, offsets: Union[list[int], torch.Tensor, None]) -> None:
    """Raise UserError with the first thing that does not fit the layout of the operator.

    offsets: those of packed sequences; of a tensor only the shape is checked, as its values may be on a device.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("b", b), ("w", w)):
        if x.ndim != 4 or not x.is_floating_point():
            raise UserError(f"{name} must be a floating-point tensor [B, T, H, D], got {x.dtype} {list(x.shape)}.")
        if x.device != q.device:
            raise UserError(f"{name} is on {x.device} but q is on {q.device}; move them to one device.")
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    if 0 in (*q.shape, *v.shape):
        raise UserError(f"every size of q and v must be at least 1, got q {list(q.shape)} and v {list(v.shape)}.")
    if HV % H:
        raise UserError(f"v has {HV} heads, which is not a multiple of the {H} heads of q and k.")
    shapes = {"k": (k, (B, T, H, K)), "v": (v, (B, T, HV, V)), "w": (w, (B, T, HV, V))}
    shapes |= {"g": (g, (B, T, HV, K)), "b": (b, (B, T, HV, K))}
    sequences = B
    if offsets is not None:
        if B != 1:
            raise UserError(f"cu_seqlens needs the sequences packed into batch size 1, got {B}; flatten them first.")
        if isinstance(offsets, torch.Tensor):
            if offsets.ndim != 1 or offsets.is_floating_point() or len(offsets) < 2:
                raise UserError(f"cu_seqlens must be integers [N+1], got {offsets.dtype} {list(offsets.shape)}.")
            if offsets.device != q.device:
                raise UserError(f"cu_seqlens is on {offsets.device} but q is on {q.device}; move them to one device.")
        elif len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != T or offsets != sorted(offsets):
            raise UserError(f"cu_seqlens must rise from 0 to T = {T}, got {offsets}.")
        sequences = len(offsets) - 1
    if initial_state is not None:
        shapes["initial_state"] = (initial_state, (sequences, HV, K, V))
        if initial_state.dtype not in (torch.float32, torch.float64):
            raise UserError(f"initial_state must be float32 (or float64), got {initial_state.dtype}.")
        if initial_state.device != q.device:
            raise UserError(f"initial_state is on {initial_state.device} but q is on {q.device}.")
    for name, (x, shape) in shapes.items():
        if tuple(x.shape) != shape:
            raise UserError(
                f"{name} must be {list(shape)} beside q {list(q.shape)}, v {list(v.shape)}; got {list(x.shape)}."
            )


def sequence_offsets(
    cu_seqlens: Optional[torch.Tensor], cu_seqlens_cpu: Optional[torch.Tensor] = None
) -> Optional[list[int]]:
    """The offsets of packed sequences; `cu_seqlens_cpu`, a copy in host memory, spares the wait for the device."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise UserError("cu_seqlens_cpu is the host copy of cu_seqlens and needs it; pass both.")
        return None
    offsets = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    if offsets.ndim != 1 or offsets.is_floating_point():
        raise UserError(f"cu_seqlens must be a vector of integers [N+1], got {offsets.dtype} {list(offsets.shape)}.")
    return offsets.tolist()


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, in float32 (float64 for float64)."""
    x = x.to(accumulation_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def check_gate(use_gate_in_kernel: bool, safe_gate: bool, lower_bound, A_log, dt_bias, g: torch.Tensor) -> None:
    """Raise UserError for gate options that contradict each other or do not fit g [B, T, HV, K]."""
    HV, K = g.shape[-2:]
    if not use_gate_in_kernel:
        if A_log is not None or dt_bias is not None:
            raise UserError("A_log and dt_bias belong to the gate activation; pass use_gate_in_kernel=True with them.")
        if lower_bound is not None and not safe_gate:
            raise UserError("lower_bound belongs to the gate activation; pass use_gate_in_kernel=True with it.")
        return
    if A_log is None and lower_bound is None:
        raise UserError("use_gate_in_kernel=True needs A_log [HV], or lower_bound, or both.")
    if safe_gate and lower_bound is None:
        raise UserError("safe_gate=True with use_gate_in_kernel=True needs lower_bound, a negative number such as -5.")
    if lower_bound is not None and not lower_bound < 0:
        raise UserError(f"lower_bound is the lowest log-decay of a token and must be negative, got {lower_bound}.")
    if A_log is not None and A_log.numel() != HV:
        raise UserError(f"A_log must have one element per value head ({HV}), got {list(A_log.shape)}.")
    if dt_bias is not None and dt_bias.numel() != HV * K:
        raise UserError(f"dt_bias must have HV x K = {HV} x {K} elements, got {list(dt_bias.shape)}.")


def activate_gate(
    g: torch.Tensor, A_log: Optional[torch.Tensor], dt_bias: Optional[torch.Tensor], lower_bound: Optional[float]
) -> torch.Tensor:
    """Log-decay from raw g [B, T, HV, K], in float32 (float64 for float64).

        -exp(A_log) softplus(g + dt_bias),   or with lower_bound   lower_bound sigmoid(exp(A_log) (g + dt_bias))

    A_log [HV] (None: exp(A_log) = 1, only with lower_bound), dt_bias [HV * K].
    """
    HV, K = g.shape[-2:]
    dtype = accumulation_dtype(g)
    g = g.to(dtype)
    if dt_bias is not None:
        g = g + dt_bias.to(dtype).view(HV, K)
    rate = 1.0 if A_log is None else A_log.to(dtype).view(HV, 1).exp()
    return -rate * F.softplus(g) if lower_bound is None else lower_bound * torch.sigmoid(rate * g)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Grouped value heads: [B, T, H, K] -> [B, T, HV, K], value head i reading query/key head i // (HV / H)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
