"""The kernels as registered operators: torch's own check, and a block that compiles as one graph, forward and backward,
under autocast, activation checkpointing and DDP; on a GPU, or under Triton's interpreter."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lit_gpt.config import ModelConfig
from lit_gpt.documents import Documents
from lit_gpt.model import Block
from lit_gpt.ops import gated_norm, short_conv
from lit_gpt.ops.gdn2 import chunk, recurrent
from tests.ops.triton_kernels import AGAIN, DEVICE, GPU, INTERPRETED, relative_error, run_interpreted, runs_kernels

pytest.importorskip("triton", reason="the kernels need Triton")


@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_under_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def kernels_on_every_device(monkeypatch):
    if INTERPRETED:
        for module in (chunk, recurrent, gated_norm, short_conv):
            monkeypatch.setattr(module, "runs_fused", lambda *xs: all(x.dtype != torch.float64 for x in xs))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not AGAIN, reason="the kernels run directly")
def test_the_slow_ones_under_the_interpreter():
    run_interpreted(__file__, "-m", "slow")


@runs_kernels
@pytest.mark.parametrize(
    "packed, recompute",
    [(True, "none"), (False, "all"), pytest.param(False, "scores", marks=pytest.mark.slow)],
)
def test_operator(packed, recompute):
    """Schema, fake tensors, autograd registration, ahead-of-time dispatch."""
    from lit_gpt.ops.gdn2.kernels.op import chunk_gdn2_forward

    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=rng).to(DEVICE).requires_grad_()
    T, K, V, HV = 20, 32, 16, 2
    leaves = [normal(T, 1, K), normal(T, 1, K), normal(T, HV, V), normal(T, HV, K), normal(T, HV, K), normal(T, HV, V)]
    if packed:
        leaves[3] = (-normal(T, HV, K).detach().exp()).requires_grad_()
        others = [None, None, None, torch.tensor([0, 3, T], device=DEVICE), 1]
    else:
        others = [normal(HV), normal(HV, K), normal(2, HV, K, V), None, 2]
    gate = 0 if packed else 1
    torch.library.opcheck(
        chunk_gdn2_forward, (*leaves, *others, 0.2, not packed, True, gate, 0.0, 0.0, 2.0, recompute, None, True)
    )


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_configuration_as_integers():
    from lit_gpt.ops.gdn2.kernels.config import Config, config_for

    for dot in (torch.bfloat16, torch.float32):
        config = config_for(dot, 128, (9, 0))
        assert Config.from_flat(config.flat()) == config


def block_and_input(**options):
    torch.manual_seed(0)
    gdn2 = {"num_heads": 1, "head_dim": 16, "decay_rank": 4, "output_gate_rank": 4, **options}
    config = ModelConfig.from_dict(
        {"n_layer": 1, "n_embd": 16, "intermediate_size": 16, "vocab_size": 32, "gdn2": gdn2}
    )
    block = Block(config, 0)
    block.mixer.reset_parameters()
    block.mixer.conv.reset_parameters()
    return block.to(DEVICE), torch.randn(1, 20, 16, device=DEVICE)


def step(run, block, x, documents):
    """The output and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    y = run(x, documents)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])
    return [y.detach(), *grads]


@runs_kernels
@pytest.mark.parametrize(
    "wrapped", ["documents", *(pytest.param(name, marks=pytest.mark.slow) for name in ("autocast", "checkpoint"))]
)
def test_block_compiles_whole(wrapped):
    """fullgraph=True: any graph break raises. The same numbers as eager, twice with the same result."""
    block, x = block_and_input()
    documents = Documents(torch.tensor([0, 5, 13, 20]), (1, 20), x.device) if wrapped == "documents" else None
    autocast = torch.autocast(DEVICE, torch.bfloat16) if wrapped == "autocast" else contextlib.nullcontext()

    def run(x, documents):
        with autocast:
            if wrapped == "checkpoint":
                return checkpoint(block, x, documents, use_reentrant=False)
            return block(x, documents)

    eager = step(run, block, x, documents)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, again = step(compiled, block, x, documents), step(compiled, block, x, documents)
    for a, b, c in zip(found, eager, again):
        assert torch.equal(a, c)
        assert relative_error(a, b) < (2e-2 if wrapped == "autocast" else 1e-5)


@pytest.mark.slow
@runs_kernels
def test_block_trains_under_ddp(tmp_path):
    """Compiled inside DDP, on one rank: the gradients are those of the block alone."""
    block, x = block_and_input()
    expected = step(block, block, x, None)[2:]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(DistributedDataParallel(block), backend="aot_eager")
        wrapped(x).float().square().sum().backward()
    finally:
        dist.destroy_process_group()
    for parameter, grad in zip(block.parameters(), expected):
        assert relative_error(parameter.grad, grad) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_block_at_full_size_waits_for_nothing():
    """bf16, 16 heads of 128, inductor: forward and backward launch without a host sync, twice with the same result."""
    block, _ = block_and_input(num_heads=16, head_dim=128, decay_rank=128, output_gate_rank=128)
    x = torch.randn(2, 1000, 16, device=DEVICE)
    documents = Documents(torch.tensor([0, 300, 1000, 1001, 2000], device=DEVICE), (2, 1000), x.device)

    def run(x, documents):
        with torch.autocast(DEVICE, torch.bfloat16):
            return block(x, documents)

    compiled = torch.compile(run, fullgraph=True)
    for op in (run, compiled):
        step(op, block, x, documents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager, found, again = (step(op, block, x, documents) for op in (run, compiled, compiled))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b, c in zip(found, eager, again):
        assert torch.equal(a, c)
        assert relative_error(a, b) < 3e-2
