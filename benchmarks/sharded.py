"""A model under ``fully_shard`` on two processes beside one: ``python -m benchmarks.sharded``.

What each process holds: bytes of weights, bytes of Krylov vectors between two sweeps (all tensors
that are alive, each storage once), and the peak of its resident set during the estimate over what
it was before the model was made. A GPT-2 with random weights, all its matrices, with errors of the
data.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from jsonargparse import CLI
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import blockspec
from benchmarks.record import write
from benchmarks.sweep import Size, matrices, model_of
from blockspec.numerics import memory

UNITS = 8  # batches of one sequence: as few as errors of the data take


def spread(model: nn.Module) -> nn.Module:
    """One call a layer, as everybody does it."""
    for layer in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(layer)  # type: ignore[arg-type]
    fully_shard(model)
    return model


def alive() -> int:
    """Bytes of all tensors, each storage once."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in found]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def measured(size: Size, steps: int, rank: int, processes: int) -> dict[str, Any]:
    """The estimate on this process."""
    memory.trim()
    before, bare = memory.resident(), alive()
    model = model_of(size)
    model = spread(model) if processes > 1 else model
    weights = alive() - bare
    tokens = torch.randint(size.vocabulary, (UNITS, 1, size.tokens))
    own = [{"input_ids": ids} for ids in tokens[rank::processes]]
    objective = blockspec.Objective(model, own, blockspec.losses.next_token, sharded=processes > 1)
    blocks = matrices(objective)
    vectors: list[int] = []
    start = time.process_time()
    with memory.watched(torch.device("cpu")) as peak:
        spectra = blockspec.estimate_spectra(
            objective,
            blocks,
            1,
            steps,
            products="layerwise",
            progress=lambda done, of: vectors.append(alive() - bare - weights),
        )
    return {
        "weights": weights,
        "Krylov vectors": max(vectors),
        "peak over start": peak.peak - before,
        "process time (s)": time.process_time() - start,
        "largest": max(s.largest.value for s in spectra.values()),
    }


def child(size: tuple[int, ...], steps: int, rank: int, processes: int, meeting: str) -> None:
    """Measures in this process, and prints."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
        )
    torch.manual_seed(0)
    print(json.dumps(measured(Size(*size), steps, rank, processes)), flush=True)
    if processes > 1:
        dist.destroy_process_group()


def on(processes: int, size: Size, steps: int) -> pd.DataFrame:
    """A row a process."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            given = (tuple(vars(size).values()), steps, rank, processes, f"{folder}/meeting")
            call = f"from benchmarks.sharded import child; child(*{given!r})"
            started.append(
                subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True)
            )
        told = [process.communicate()[0].splitlines()[-1] for process in started]
    return pd.DataFrame(
        map(json.loads, told), index=[f"{n} of {processes}" for n in range(1, processes + 1)]
    )


def main(
    layers: int = 6, width: int = 256, vocabulary: int = 8192, tokens: int = 64, steps: int = 16
) -> None:
    """Measures and writes the table.

    Args:
        layers: Number of layers.
        width: D.
        vocabulary: V.
        tokens: T.
        steps: Lanczos steps of the one probe of each block.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    size = Size(layers, width, 4, vocabulary, 1, tokens)
    table = pd.concat([on(1, size, steps), on(2, size, steps)])
    shares = table.iloc[1:].max() / table.iloc[0]
    for name in ("weights", "Krylov vectors", "peak over start"):
        table[name] = table[name].map(memory.readable)
    table.loc["largest of 2 / 1"] = shares.round(3)
    title = (
        f"GPT-2, {layers} layers, D={width}, V={vocabulary}, {UNITS} x T={tokens}, {steps} steps"
    )
    write("sharded", {title: table.rename_axis("process")})


if __name__ == "__main__":
    CLI(main, as_positional=False)
