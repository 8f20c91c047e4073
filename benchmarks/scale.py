"""Many processes, saved states, and memory: ``python -m benchmarks.scale``.

- two processes of one thread against one, over blocks and over batches;
- what saving a state every second costs, and a run that is stopped half way and resumed against an
unbroken one; - with ``--gpt2_too true``: GPT-2 124M, T = 1024, every matrix, within 20 GiB: the
plan's peak against the measured one (minutes).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from benchmarks.record import write
from benchmarks.sweep import Size, matrices, model_of
from blockspec.engine.estimate import plan_spectra
from blockspec.numerics import memory

SIZE = Size(6, 128, 4, 2048, 4, 64)
STEPS = 10


def problem() -> tuple[blockspec.Objective, list[blockspec.Block]]:
    """A GPT-2 of 6 layers, two batches, every matrix."""
    model = model_of(SIZE)
    batches = [
        {"input_ids": torch.randint(SIZE.vocabulary, (SIZE.batch, SIZE.tokens))} for _ in range(2)
    ]
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    return objective, matrices(objective)


def seconds(**settings: Any) -> float:
    """One estimate's own time."""
    objective, blocks = problem()
    start = time.perf_counter()
    blockspec.estimate_spectra(objective, blocks, 1, STEPS, **settings)
    return time.perf_counter() - start


def worker(columns: int) -> None:
    """What each launched process runs."""
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    took = [seconds(columns=columns) for _ in range(3)]
    if state.is_main_process:
        print(json.dumps(sorted(took)[1]), flush=True)
    state.destroy_process_group()


def launched(processes: int, columns: int) -> float:
    """Median seconds of the estimate on that many processes of one thread."""
    command = [sys.executable, "-m", "benchmarks.scale", f"--columns={columns}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    started = []
    for rank in range(processes):  # what a launcher sets
        own = (
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            if processes > 1
            else {}
        )
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment | own,
            )
        )
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return json.loads(outputs[0].strip().splitlines()[-1])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def processes() -> pd.DataFrame:
    one = launched(1, 1)
    rows = [{"way": "one process", "seconds": one}]
    rows += [
        {"way": f"two, split by {axis}", "seconds": launched(2, columns)}
        for axis, columns in (("blocks", 2), ("batches", 1))
    ]
    table = pd.DataFrame(rows).set_index("way")
    table["speed-up"] = one / table["seconds"]
    return table


class Stop(Exception):
    pass


def states() -> pd.DataFrame:
    """The same estimate unbroken, with a state saved every second, and stopped half way and
    resumed.
    """
    seconds()
    unbroken = seconds()
    with tempfile.TemporaryDirectory() as folder:
        saving = seconds(state=folder, state_every=1.0)

        def stop(done: int, total: int) -> None:
            if 2 * done >= total:
                raise Stop

        start = time.perf_counter()
        try:
            seconds(state=folder, state_every=0.0, progress=stop)
        except Stop:
            resumed = time.perf_counter() - start + seconds(state=folder)
    table = pd.DataFrame(
        {
            "seconds": {
                "unbroken": unbroken,
                "saving every second": saving,
                "stopped and resumed": resumed,
            }
        }
    )
    table["ratio"] = table["seconds"] / unbroken
    return table.rename_axis("way")


def gpt2(limit: str, steps: int) -> pd.DataFrame:
    """GPT-2 124M with random weights, one window of 1,024 tokens, every matrix, one probe."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    objective = blockspec.Objective(
        model, [{"input_ids": torch.randint(50257, (1, 1024))}], blockspec.losses.next_token
    )
    blocks = matrices(objective)
    cost = plan_spectra(objective, blocks, 1, steps, memory=limit)
    start = time.perf_counter()
    with memory.watched(objective.device) as peak:
        blockspec.estimate_spectra(objective, blocks, 1, steps, memory=limit)
    took = time.perf_counter() - start
    rows = {
        "peak memory": (
            memory.readable(cost.peak),
            memory.readable(peak.peak),
            cost.peak / peak.peak,
        ),
        "seconds": (f"{cost.seconds:.0f}", f"{took:.0f}", cost.seconds / took),
    }
    return pd.DataFrame(rows, index=["planned", "measured", "planned / measured"]).T.rename_axis(
        "what"
    )


def main(
    gpt2_too: bool = False, columns: int | None = None, limit: str = "20GiB", steps: int = 2
) -> None:
    """Measures and writes the tables.

    Args:
        gpt2_too: Also GPT-2 124M.
        columns: For the processes that this launches itself.
        limit: Memory for GPT-2.
        steps: Lanczos steps for GPT-2.
    """
    if columns is not None:
        worker(columns)
        return
    tables = {"Processes": processes(), "States": states()}
    if gpt2_too:
        tables["GPT-2 124M, T = 1024, every matrix"] = gpt2(limit, steps)
    write("scale", tables)


if __name__ == "__main__":
    CLI(main)
