"""What chunk_gdn2 launches, forward and backward, over an index of the chunks.

Three launches forward (block scores, chunk scores, forward scan), four backward (backward scan, score, state and input
gradients).
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from .config import TILE, Config, Launch
from .decay import span_table, span_table_transposed
from .gradients import input_gradients_kernel, score_gradients_kernel, state_gradients_kernel
from .prepare import block_scores_kernel, chunk_scores_kernel
from .scan import backward_scan_kernel, forward_scan_kernel

RECOMPUTE = ("none", "scores", "all")
"""From fastest to smallest: keep everything, recompute the scores, or keep only inputs and output."""


def padded(size: int) -> int:
    """The power of two, at least one tile, that holds a head size."""
    return max(TILE, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie: no chunk crosses a sequence. Built on the device without a host sync, so spare chunks, of
    0 rows, may follow the last."""

    seqlens: torch.Tensor
    """[N + 1] first token of each sequence."""
    first: torch.Tensor
    """[N + 1] first chunk of each sequence."""
    start: torch.Tensor
    """[chunks] first token of each chunk."""
    rows: torch.Tensor
    """[chunks] tokens in each chunk."""


def index_chunks(seqlens: torch.Tensor, chunks: int, C: int) -> Chunks:
    """The chunks of C rows of packed sequences, sequence n being tokens seqlens[n] : seqlens[n + 1]; `chunks` is at
    least their number."""
    seqlens = seqlens.to(torch.int64)
    first = torch.nn.functional.pad(((seqlens.diff() + C - 1) // C).cumsum(0), (1, 0))
    chunk = torch.arange(chunks, device=seqlens.device)
    sequence = (torch.searchsorted(first, chunk, right=True) - 1).clamp(max=seqlens.numel() - 2)
    start = seqlens[sequence] + (chunk - first[sequence]) * C
    rows = (seqlens[sequence + 1] - start).clamp(0, C)
    return Chunks(seqlens.int(), first.int(), start.int(), rows.int())


@functools.lru_cache(maxsize=64)
def index_equal_chunks(B: int, T: int, C: int, device: torch.device) -> Chunks:
    """The chunks of B sequences of T tokens each."""
    return index_chunks(torch.arange(B + 1, device=device) * T, number_of_chunks(B * T, B, None, C), C)


def number_of_chunks(tokens: int, B: int, cu_seqlens: Optional[torch.Tensor], C: int) -> int:
    """Chunks of C rows in B sequences of equal length, or in packed ones with the spare chunks."""
    if cu_seqlens is None:
        return B * -(-(tokens // B) // C)
    return -(-tokens // C) + cu_seqlens.numel() - 2


_packed_chunks = WeakTensorKeyDictionary()
"""Of offsets in use, what they were when their chunks were found, and these: a dozen small operations, which the layers
of a model, forward and backward, share."""


def chunks_of(tokens: int, B: int, cu_seqlens: Optional[torch.Tensor], C: int, device: torch.device) -> Chunks:
    """These chunks."""
    if cu_seqlens is None:
        return index_equal_chunks(B, tokens // B, C, device)
    chunks = number_of_chunks(tokens, B, cu_seqlens, C)
    # Not kept: what is only computed when a graph is replayed, and of tensors that do not tell of changes in place.
    if cu_seqlens.is_inference() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return index_chunks(cu_seqlens, chunks, C)
    state = (cu_seqlens._version, chunks, C)
    found = _packed_chunks.get(cu_seqlens)
    if found is None or found[0] != state:
        found = _packed_chunks[cu_seqlens] = state, index_chunks(cu_seqlens, chunks, C)
    return found[1]


@dataclass(frozen=True)
class Options:
    """What carries no gradient."""

    scale: float
    output_final_state: bool
    l2norm: bool
    gate: int
    """0: g is the log-decay. 1: g becomes -exp(A_log) softplus(g + dt_bias). 2: g becomes lower_bound
    sigmoid(exp(A_log) (g + dt_bias))."""
    lower_bound: float
    b_range: float
    """0: b is the erase gate. Otherwise b becomes b_range sigmoid(b)."""
    w_range: float
    """The same of the write gate w."""
    chunks: Chunks
    config: Config
    dot: torch.dtype
    """Type of the dots' operands; they accumulate in fp32."""

    recompute: str
    """What the backward pass computes again instead of keeping: see RECOMPUTE."""

    def constants(self, q: torch.Tensor, v: torch.Tensor) -> dict:
        """What the kernels know at compile time."""
        K, V = q.shape[-1], v.shape[-1]
        return {
            "H": q.shape[-2],
            "HV": v.shape[-2],
            "K": K,
            "KP": padded(K),
            "V": V,
            "VP": padded(V),
            "BV": TILE,
            "C": self.config.chunk,
            "L2NORM": self.l2norm,
            "GATE": self.gate,
            "B_RANGE": self.b_range,
            "W_RANGE": self.w_range,
            "DOT": tl.bfloat16 if self.dot == torch.bfloat16 else tl.float32,
            "PRECISION": "tf32",
        }


_compiled: dict = {}
"""Kernels by what they were compiled for; see _launch."""


def _launch(kernel, grid: tuple, launch: Launch, constants: dict, *tensors, **more):
    """Launch with those of the constants that the kernel names.

    Triton binds and specialises the arguments anew at every launch, which takes the host longer than some of these
    kernels take the device. We do that once per kernel, constants, and the types and alignments of the tensors.
    """
    constants = {"BK": launch.tile, "STAGES": launch.stages, **constants, **more}
    types = [(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else type(x) for x in tensors]
    key = (kernel, tensors[0].device, launch, *constants.values(), *types)
    if key not in _compiled:
        named = {name: value for name, value in constants.items() if name in kernel.arg_names}
        compiled = kernel[grid](
            *tensors, **named, num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers
        )
        if compiled is not None:  # as under the interpreter
            _compiled[key] = compiled, [constants[name] for name in kernel.arg_names if name in named]
        return
    compiled, named = _compiled[key]
    compiled[(*grid, 1, 1)[:3]](*tensors, *named)


class Scores(NamedTuple):
    """What prepare.py makes of the chunks; shapes there."""

    across: torch.Tensor
    decays: torch.Tensor
    row_scales: torch.Tensor
    Qg: torch.Tensor
    Eg: torch.Tensor
    Kt: torch.Tensor
    A: torch.Tensor
    Aqk: torch.Tensor


def prepare(q, k, g, b, A_log, dt_bias, HV: int, const: dict, options: Options, keep: bool) -> Scores:
    """Everything of the chunks that does not need the state; `keep`: also what only the backward pass needs, `across`,
    which is left empty otherwise."""
    KP, C, at = const["KP"], const["C"], options.chunks
    chunks = len(at.start)
    new, exact = functools.partial(q.new_empty, dtype=options.dot), functools.partial(q.new_empty, dtype=torch.float32)
    Qb, Eb, Kb, Qg, Eg, Kt = (new((chunks, HV, C, KP)) for _ in range(6))
    A, Aqk = (new((chunks, HV, C, C)) for _ in range(2))
    across = new((chunks, HV, 3, C // 2, KP) if keep else 0)
    inverses = exact((chunks, HV, C, C // 2))
    L = min(options.config.block_scores.warps, C // 16)
    decays, row_scales = exact((chunks, HV, C // 16 + 1, KP)), exact((chunks, HV, 2, C))
    _launch(
        block_scores_kernel, (chunks * (C // 16 // L), HV), options.config.block_scores, const,
        q, k, b, g, A_log, dt_bias, at.start, at.rows, Qb, Eb, Kb, decays, Aqk, inverses, row_scales,
        options.scale, options.lower_bound, L=L,
    )  # fmt: skip
    _launch(
        chunk_scores_kernel, (chunks, HV), options.config.chunk_scores, const,
        Qb, Eb, Kb, decays, inverses, row_scales, at.rows, Qg, Eg, Kt, A, Aqk, across, KEEP=keep,
    )  # fmt: skip
    return Scores(across, decays, row_scales, Qg, Eg, Kt, A, Aqk)


def scan_forward(scores: Scores, v, w, initial_state, const: dict, options: Options, save: bool):
    """o [T, HV, V], the final state if asked for, and if saved the state before each chunk S and R; shapes in
    scan.py."""
    HV, K, KP, V, VP, C = (const[name] for name in ("HV", "K", "KP", "V", "VP", "C"))
    at = options.chunks
    chunks, sequences = len(at.start), len(at.seqlens) - 1
    o = torch.empty_like(v)
    final_state = v.new_empty((sequences, HV, K, V), dtype=torch.float32) if options.output_final_state else None
    S = v.new_empty((chunks, HV, KP, VP), dtype=options.dot) if save else None
    R = v.new_empty((chunks, HV, C, VP), dtype=options.dot) if save else None
    decays, (Qg, Eg, Kt, A, Aqk) = scores.decays, scores[3:]
    _launch(
        forward_scan_kernel, (VP // TILE, sequences * HV), options.config.forward_scan, const,
        Qg, Eg, Kt, A, Aqk, decays, v, w, initial_state, at.seqlens, at.first, o, final_state, S, R,
        HAS_INITIAL=initial_state is not None, WANT_FINAL=final_state is not None, SAVE=save,
    )  # fmt: skip
    return o, final_state, S, R


def backward(q, k, v, g, b, w, A_log, dt_bias, initial_state, o, scores, S, R, do, dfinal_state, const, options):
    """The gradients of q, k, v, g, b, w, A_log, dt_bias and initial_state, None where there is none."""
    H, HV, K, KP, VP, C = (const[name] for name in ("H", "HV", "K", "KP", "VP", "C"))
    at = options.chunks
    chunks, sequences = len(at.start), len(at.seqlens) - 1
    new, exact = functools.partial(q.new_empty, dtype=options.dot), functools.partial(q.new_empty, dtype=torch.float32)
    across, decays, row_scales, Qg, Eg, Kt, A, Aqk = scores

    dv, dw = torch.empty_like(v), torch.empty_like(w)
    dinitial_state = torch.empty_like(initial_state) if initial_state is not None else None
    dS, dZ = new((chunks, HV, KP, VP)), new((chunks, HV, C, VP))
    _launch(
        backward_scan_kernel, (VP // TILE, sequences * HV), options.config.backward_scan, const,
        Qg, Eg, Kt, A, Aqk, decays, v, w, do, dfinal_state, at.seqlens, at.first, dv, dw, dinitial_state, dS, dZ,
        HAS_FINAL=dfinal_state is not None, WANT_INITIAL=initial_state is not None,
    )  # fmt: skip

    Wq, Wt = (new((chunks, HV, C, C)) for _ in range(2))
    row_sums = exact((chunks, HV, 3, C))
    _launch(
        score_gradients_kernel, (chunks, HV), options.config.score_gradients, const,
        o, do, v, w, dZ, R, at.start, at.rows, Wq, Wt, row_sums,
    )  # fmt: skip

    dQg, dEg, dKt = (new((chunks, HV, C, KP)) for _ in range(3))
    dg_halves = exact((chunks, HV, 2, KP))
    _launch(
        state_gradients_kernel, (KP // TILE, chunks, HV), options.config.state_gradients, const,
        do, dZ, R, S, dS, Qg, Eg, Kt, decays, at.start, at.rows, dQg, dEg, dKt, dg_halves, BK=TILE,
    )  # fmt: skip
    del dZ, dS

    # Heads that share a query and key add their gradients in fp32.
    dq, dk = (b.new_empty(b.shape, dtype=x.dtype if HV == H else torch.float32) for x in (q, k))
    db, dg = torch.empty_like(b), torch.empty_like(g)
    dA_log = dbias = None
    tiles = KP // options.config.input_gradients.tile
    if options.gate:  # one sum per program; programs without rows leave theirs at zero
        dA_log = q.new_zeros((chunks, HV, 2, tiles), dtype=torch.float32)
        dbias = q.new_zeros((chunks, HV, 2, KP), dtype=torch.float32)
    _launch(
        input_gradients_kernel, (2 * tiles, chunks, HV), options.config.input_gradients, const,
        q, k, b, g, A_log, dt_bias, across, decays, dQg, dEg, dKt, dg_halves, Wq, Wt, row_sums, row_scales,
        span_table(C // 2, torch.float16, q.device), span_table_transposed(C // 2, options.dot, q.device),
        at.start, at.rows,
        dq, dk, db, dg, dA_log, dbias, options.scale, options.lower_bound,
    )  # fmt: skip
    if HV != H:
        dq, dk = (d.view(-1, H, HV // H, K).sum(2).to(x.dtype) for d, x in ((dq, q), (dk, k)))
    if options.gate:
        dA_log = dA_log.sum((0, 2, 3)).to(A_log.dtype)
        dbias = dbias.sum((0, 2))[:, :K].to(dt_bias.dtype)
    return dq, dk, dv, dg, db, dw, dA_log, dbias, dinitial_state
