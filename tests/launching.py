"""Processes for tests. Each pytest process keeps one server that has imported torch and
transformers: its forks start at once.

A fork of the test process itself would not do: autograd refuses to work in a fork of a process that
    has used it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.multiprocessing

HERE = Path(__file__).parent
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # one GPU does not serve two processes
PATHS = os.pathsep.join(str(path) for path in (HERE.parent, HERE.parent / "examples", HERE))
multiprocessing.set_forkserver_preload(["preloaded"])


forks = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="where there is a GPU, autograd refuses to work in a fork of a process that has used it",
)
"""Marks tests that fork themselves."""


def accelerate(processes: int) -> tuple[str, ...]:
    """Arguments of Python for ``accelerate launch`` on a CPU; the program's own follow."""
    gloo = (
        "--multi_gpu",
        f"--num_processes={processes}",
        "--num_machines=1",
        "--main_process_port=0",
    )
    return (
        "-m",
        "accelerate.commands.launch",
        *gloo,
        "--mixed_precision=no",
        "--dynamo_backend=no",
    )


def together(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """``function(rank, *arguments)`` on several processes; raises what one of them raised."""
    with mock.patch.dict(os.environ, WITHOUT_GPU | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=processes, start_method="forkserver"
    )


def run_script(path: Path, *arguments: str, processes: int = 2) -> None:
    """A script on several processes that find each other as under a launcher; raises what one of
    them raised.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together(_script, str(path), arguments, processes, port, processes=processes)


def _script(rank: int, path: str, arguments: tuple[str, ...], processes: int, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    names |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    sys.path[:0] = PATHS.split(os.pathsep)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def printed_alone(script: str) -> Any:
    """What a script prints last, as JSON, in a process whose memory goes back to the system as soon
    as it is free; its argument is the folder of the tests.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
