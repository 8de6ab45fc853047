"""How tests run Triton kernels: on the GPU if there is one, else under Triton's interpreter.

Triton chooses the interpreter when it is imported, so a test file runs itself once more in a process of its own:

    @pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
    def test_under_the_interpreter():
        run_interpreted(__file__)

    @runs_kernels
    def test_something(): ...

The interpreter computes dots of bf16 wrongly; kernels without dots are right in every dtype.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not GPU
AGAIN = not (GPU or INTERPRETED)
DEVICE = "cuda" if GPU else "cpu"
runs_kernels = pytest.mark.skipif(AGAIN, reason="no GPU; runs inside test_under_the_interpreter")


def run_interpreted(path: str, *options: str, timeout: int = 300) -> None:
    """Run the tests of a file under the interpreter, by pytest's options; fail with their output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", path, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-1000:]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def compile_for(kernel, arch: int, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """The PTX of a kernel for sm_<arch>, compiled down to machine code without a GPU; so much of Triton's language that
    the interpreter takes does not compile. Arguments that neither `types` nor `constants` names are i32.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]
