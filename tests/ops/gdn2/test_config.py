"""Every row of the table of launches compiles for its GPU and fits its shared memory; what does not fit is refused."""

import pytest
import torch

from lit_gpt.errors import UserError
from tests.ops.triton_kernels import INTERPRETED

pytest.importorskip("triton", reason="the kernels need Triton")
ROWS = [
    (torch.bfloat16, 128, (8, 0)),
    (torch.bfloat16, 128, (8, 6)),
    (torch.bfloat16, 128, (9, 0)),
    (torch.bfloat16, 256, (8, 0)),
    (torch.bfloat16, 256, (9, 0)),
    (torch.float32, 128, (8, 0)),
    (torch.float32, 128, (8, 6)),
    (torch.float32, 128, (9, 0)),
    (torch.float32, 256, (9, 0)),
]


@pytest.mark.parametrize(
    "dot, capability, room",
    [(torch.bfloat16, (8, 6), 99), (torch.bfloat16, (12, 0), 99), (torch.float32, (8, 0), 163)],
)
def test_what_does_not_fit_is_refused(dot, capability, room):
    from lit_gpt.ops.gdn2.kernels.config import config_for

    with pytest.raises(UserError, match=f"this GPU has {room}. Use "):
        config_for(dot, 256, capability)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dot, K, capability", ROWS, ids=str)
def test_fits(dot, K, capability, monkeypatch):
    """Every kernel of a training step, compiled without a GPU for the launch that the table gives it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_gpt.ops.gdn2.kernels import launch, op
    from lit_gpt.ops.gdn2.kernels.config import config_for, shared_memory

    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    arch, fitted = 10 * capability[0] + capability[1], []

    def compile_instead(kernel, grid, how, constants, *tensors, **more):
        constants = {"BK": how.tile, "STAGES": how.stages, **constants, **more}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        arguments = dict(zip((name for name in kernel.arg_names if name not in constants), tensors, strict=True))
        constants |= {name: None for name, x in arguments.items() if x is None}
        signature, values, aligned = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            x = arguments.get(name)
            if name in constants:
                signature[name], values[(i,)] = "constexpr", constants[name]
            elif isinstance(x, torch.Tensor):
                signature[name], aligned[(i,)] = pointers[x.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        options = {"num_warps": how.warps, "num_stages": how.stages, "maxnreg": how.registers}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert compiled.metadata.shared <= 1024 * shared_memory(capability), kernel.__name__
        fitted.append(kernel.__name__)

    monkeypatch.setattr(launch, "_launch", compile_instead)
    monkeypatch.setattr(op, "_check", lambda *_: None)  # which asks for a GPU
    monkeypatch.setattr(op, "_configuration", lambda *_: (config_for(dot, K, capability), dot))
    dtypes = [dot, dot, dot, torch.float32, dot, dot]
    leaves = [torch.zeros(1, 64, 1, K, dtype=dtype).requires_grad_() for dtype in dtypes]
    gate = {"use_gate_in_kernel": True, "A_log": torch.zeros(1), "dt_bias": torch.zeros(K)}
    o, state = op.chunk_gdn2_fused(*leaves, output_final_state=True, use_qk_l2norm_in_kernel=True, **gate)
    torch.autograd.backward([o, state], [torch.zeros_like(o), torch.zeros_like(state)])
    assert {"forward_scan_kernel", "backward_scan_kernel", "input_gradients_kernel"} < set(fitted)
