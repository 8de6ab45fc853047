"""Several ranks whose processes a test prepares before they train."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start_ranks(world_size: int, preparation: str, argv: list[str]) -> list[subprocess.Popen]:
    """Processes as torchrun would start them: each runs `preparation`, which knows its `rank`, then
    `pretrain.setup(argv)`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = f"import os, sys, pretrain\nrank = int(os.environ['RANK'])\n{preparation}\npretrain.setup(sys.argv[1:])\n"
    world = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_WORLD_SIZE": "1"}
    world |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    world |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *argv],
            cwd=ROOT,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, preparation: str, argv: list[str], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each rank, which are killed after `timeout` seconds."""
    processes = start_ranks(world_size, preparation, argv)
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts)]
