"""What a block costs where there are very many: ``python -m benchmarks.many_blocks``.

The model is a row of perceptrons beside each other, cut by neuron. More blocks are wider
perceptrons: the graph behind one product stays the same, so that the seconds of a block tell what
our own work beside its products costs. They are to stay the same from one number of blocks to the
next. (More perceptrons would not do: autograd walks through the graph of all of them for each
product.)
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor, nn

import blockspec
from benchmarks.record import clock, write
from blockspec.engine.estimate import plan_spectra
from blockspec.figures import plots
from blockspec.numerics import memory
from blockspec.runs.tables import heterogeneity_of

T = TypeVar("T")
WIDTH, PERCEPTRONS = 8, 20  # inputs of each, and how many there are
NAMES = {"mlp_in": ["up"], "mlp_out": ["down"]}


class Perceptron(nn.Module):
    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, neurons), nn.Linear(neurons, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(inputs)))  # (B, 1)


class Row(nn.Module):
    """Perceptrons beside each other; what they give is added."""

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Perceptron(neurons) for _ in range(PERCEPTRONS))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([layer(inputs) for layer in self.layers]).sum(0)  # (B, 1)


class Stopwatch:
    """Milliseconds a block of each piece of work."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        start = clock()
        result = work()
        self.milliseconds[name] = 1e3 * (clock() - start)
        print(f"{name}: {self.milliseconds[name] / 1e3:.1f} s", flush=True)
        return result


def quietly(work: Callable[[], T]) -> T:
    """Without the warning that says that a sample of the blocks is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return work()


def measured(neurons: int, steps: int, budget: str | None) -> dict[str, float]:
    """Each piece of work with perceptrons of so many neurons, from the partition to the figure."""
    torch.manual_seed(0)
    model = Row(neurons)
    batch = (torch.randn(1, WIDTH), torch.randn(1, 1))
    objective = blockspec.Objective(model, [batch], blockspec.losses.regression)
    watch = Stopwatch()
    with memory.watched(torch.device("cpu")) as peak, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spectra.parquet"
        blocks = watch("partition", lambda: blockspec.partition(model, "neuron", names=NAMES))
        watch("plan", lambda: plan_spectra(objective, blocks, 1, steps, memory=budget))
        spectra = watch(
            "estimate",
            lambda: blockspec.estimate_spectra(
                objective, blocks, 1, steps, memory=budget, progress=False
            ),
        )
        watch("save", lambda: spectra.save(path))
        loaded = watch("load", lambda: blockspec.load_spectra(path))
        watch("summary", loaded.summary)
        watch("distances of groups", lambda: heterogeneity_of(loaded, step=0))
        watch("js0", lambda: quietly(lambda: blockspec.js0(loaded)))
        watch("figure", lambda: plots.tails_by_block(loaded))
        size = path.stat().st_size
    costs = {name: spent / len(blocks) for name, spent in watch.milliseconds.items()}
    held = {"peak (KiB)": peak.growth / 2**10 / len(blocks), "file (bytes)": size / len(blocks)}
    seconds = sum(watch.milliseconds.values()) / 1e3
    whole = {"in all (s)": seconds, "peak (MiB)": peak.growth / 2**20}
    return {"blocks": len(blocks)} | costs | held | whole


def main(
    neurons: tuple[int, ...] = (50, 500, 5000), steps: int = 2, budget: str | None = None
) -> None:
    """Measures and writes the table; the largest number takes some minutes.

    Args:
        neurons: Of a perceptron; each of them is a block, and there are 20 perceptrons.
        steps: Lanczos steps of a block's one probe.
        budget: Memory that an estimate may take; if left out, all blocks go through one sweep.
    """
    torch.set_num_threads(1)
    rows = [measured(number, steps, budget) for number in neurons]
    write("many_blocks", {"Milliseconds a block": pd.DataFrame(rows).set_index("blocks")})


if __name__ == "__main__":
    CLI(main)
