"""The two serial scans over a sequence's chunks. One program per (tile of V, sequence, value head); the state [K, BV]
stays in registers, in fp32.

Forward, with z = w * v and the chunk's tensors of prepare.py:

    R = A (z - Eg S)      o = Qg S + Aqk R      S' = decay * S + Kt^T R

Backward, from the last chunk to the first, dS' the gradient of the state after the chunk:

    dR = Aqk^T do + Kt dS'      dz = A^T dR      dS = decay * dS' + Qg^T do - Eg^T dz      dv = w * dz      dw = v * dz
"""

import triton
import triton.language as tl

from .decay import gate, gate_backward


@triton.jit
def forward_scan_kernel(
    Qg, Eg, Kt, A, Aqk, decays, v, w, initial_state, seqlens, first_chunk,
    o, final_state, S_out, R_out,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, WANT_FINAL: tl.constexpr, SAVE: tl.constexpr, W_RANGE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Reads Qg, Eg, Kt, A, Aqk, decays, v, w, initial_state. Writes o [T, HV, V], final_state [N, HV, K, V]; with SAVE
    also, for the backward pass, the state before each chunk S_out [chunks, HV, KP, VP] and R_out [chunks, HV, C,
    VP]."""
    seq, hv = (tl.program_id(1) // HV).to(tl.int64), tl.program_id(1) % HV
    i, d, c = tl.arange(0, C), tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    begin, end = tl.load(seqlens + seq).to(tl.int64), tl.load(seqlens + seq + 1).to(tl.int64)
    chunk0 = tl.load(first_chunk + seq).to(tl.int64)
    at_state = (seq * HV + hv) * K * V + d[:, None] * V + c[None, :]
    in_state = (d < K)[:, None] & (c < V)[None, :]

    S = tl.zeros([KP, BV], tl.float32)
    if HAS_INITIAL:
        S += tl.load(initial_state + at_state, in_state, 0.0)
    at = ((begin + i) * HV + hv)[:, None] * V + c[None, :]
    live = (begin + i < end)[:, None] & (c < V)[None, :]
    z = tl.load(v + at, live, 0.0).to(tl.float32) * gate(tl.load(w + at, live, 0.0), W_RANGE).to(tl.float32)
    for m in range(0, tl.cdiv(end - begin, C)):
        base = (chunk0 + m) * HV + hv
        token = begin + m * C + i
        at = (token * HV + hv)[:, None] * V + c[None, :]
        rows_k = base * C * KP + i[:, None] * KP + d[None, :]
        rows_c = base * C * C + i[:, None] * C + i[None, :]
        eg, qg = tl.load(Eg + rows_k), tl.load(Qg + rows_k)
        kt = tl.load(Kt + base * C * KP + i[None, :] * KP + d[:, None])
        a, aqk = tl.load(A + rows_c), tl.load(Aqk + rows_c)
        decay = tl.load(decays + (base * (C // 16 + 1) + C // 16) * KP + d)

        s = S.to(DOT)
        if SAVE:
            tl.store(S_out + base * KP * VP + d[:, None] * VP + c[None, :], s)
        x = (z - tl.dot(eg, s, input_precision=PRECISION)).to(DOT)
        # The next chunk's v and w wait in registers, where z was: the shared memory holds three stages of the dots'
        # operands, which leaves no room for them.
        live = (token + C < end)[:, None] & (c < V)[None, :]
        v_next, w_next = tl.load(v + at + C * HV * V, live, 0.0), tl.load(w + at + C * HV * V, live, 0.0)
        r = tl.dot(a, x, input_precision=PRECISION).to(DOT)
        out = tl.dot(aqk, r, tl.dot(qg, s, input_precision=PRECISION), input_precision=PRECISION)
        S = tl.dot(kt, r, S * decay[:, None], input_precision=PRECISION)
        z = v_next.to(tl.float32) * gate(w_next, W_RANGE).to(tl.float32)
        tl.store(o + at, out.to(o.dtype.element_ty), (token < end)[:, None] & (c < V)[None, :])
        if SAVE:
            tl.store(R_out + base * C * VP + i[:, None] * VP + c[None, :], r)
    if WANT_FINAL:
        tl.store(final_state + at_state, S, in_state)


@triton.jit
def backward_scan_kernel(
    Qg, Eg, Kt, A, Aqk, decays, v, w, do, dfinal_state, seqlens, first_chunk,
    dv, dw, dinitial_state, dS_out, dZ_out,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr,
    HAS_FINAL: tl.constexpr, WANT_INITIAL: tl.constexpr, W_RANGE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads Qg, Eg, Kt, A, Aqk, decays, v, w, do, dfinal_state. Writes the final dv, dw [T, HV, V] and dinitial_state,
    and for the gradients' second half dS_out [chunks, HV, KP, VP], the gradient of the state after each chunk, and
    dZ_out [chunks, HV, C, VP]."""
    seq, hv = (tl.program_id(1) // HV).to(tl.int64), tl.program_id(1) % HV
    i, d, c = tl.arange(0, C), tl.arange(0, KP), tl.program_id(0) * BV + tl.arange(0, BV)
    begin, end = tl.load(seqlens + seq).to(tl.int64), tl.load(seqlens + seq + 1).to(tl.int64)
    chunk0 = tl.load(first_chunk + seq).to(tl.int64)
    at_state = (seq * HV + hv) * K * V + d[:, None] * V + c[None, :]
    in_state = (d < K)[:, None] & (c < V)[None, :]

    chunks = tl.cdiv(end - begin, C)
    dS = tl.zeros([KP, BV], tl.float32)
    if HAS_FINAL:
        dS += tl.load(dfinal_state + at_state, in_state, 0.0)
    for back in tl.range(0, chunks, num_stages=STAGES):
        m = chunks - 1 - back
        base = (chunk0 + m) * HV + hv
        token = begin + m * C + i
        kt = tl.load(Kt + base * C * KP + i[:, None] * KP + d[None, :])
        columns_k = base * C * KP + i[None, :] * KP + d[:, None]
        columns_c = base * C * C + i[None, :] * C + i[:, None]
        qg, eg = tl.load(Qg + columns_k), tl.load(Eg + columns_k)
        a, aqk = tl.load(A + columns_c), tl.load(Aqk + columns_c)
        decay = tl.load(decays + (base * (C // 16 + 1) + C // 16) * KP + d)
        at = (token * HV + hv)[:, None] * V + c[None, :]
        live = (token < end)[:, None] & (c < V)[None, :]
        dout = tl.load(do + at, live, 0.0).to(DOT)
        vs = tl.load(v + at, live, 0.0).to(tl.float32)
        ws = gate(tl.load(w + at, live, 0.0), W_RANGE).to(tl.float32)

        ds = dS.to(DOT)
        tl.store(dS_out + base * KP * VP + d[:, None] * VP + c[None, :], ds)
        dr = tl.dot(kt, ds, tl.dot(aqk, dout, input_precision=PRECISION), input_precision=PRECISION)
        dz = tl.dot(a, dr.to(DOT), input_precision=PRECISION)
        dS = tl.dot(qg, dout, dS * decay[:, None], input_precision=PRECISION)
        dS = tl.dot(eg, (-dz).to(DOT), dS, input_precision=PRECISION)
        tl.store(dZ_out + base * C * VP + i[:, None] * VP + c[None, :], dz.to(DOT))
        tl.store(dv + at, (dz * ws).to(dv.dtype.element_ty), live)
        tl.store(dw + at, gate_backward(ws, dz * vs, W_RANGE).to(dw.dtype.element_ty), live)
    if WANT_INITIAL:
        tl.store(dinitial_state + at_state, dS, in_state)
