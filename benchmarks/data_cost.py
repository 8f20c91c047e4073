"""What errors of the data cost: ``python -m benchmarks.data_cost``

Spectra, traces and squared norms of six weight matrices of the tiny GPT-2 with 32 sequences of 64
tokens as units, with ``data_errors`` and without, in turns in one process. Seconds are medians of
CPU time. Bytes are those of tensors at their peak, counted as they are made and freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from torch.utils._python_dispatch import TorchDispatchMode

import blockspec
from benchmarks.record import in_turns, write
from language_models.fresh import fresh

SEQUENCES = 32


class Bytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while this is open, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(function: Callable[[], object]) -> int:
    """Bytes."""
    with Bytes() as counted:
        function()
    return counted.peak


def measured(steps: int, probes: int, rounds: int) -> pd.DataFrame:
    """A row a kind of estimate."""
    model, batches, loss = fresh(num_batches=4, batch_size=SEQUENCES // 4)
    objective = blockspec.Objective(model, batches, loss, micro_batch=1)
    blocks = blockspec.partition(model, include="*h.0*weight*", exclude="*ln*")
    own: dict[str, Any] = {"check": False, "progress": False}

    def spectra(wanted: bool) -> object:
        settings = own | {"num_probes": 1, "num_steps": steps, "data_errors": wanted}
        return blockspec.estimate_spectra(objective, blocks, **settings)

    def trace(wanted: bool) -> object:
        return blockspec.trace(objective, blocks, num_probes=probes, data_errors=wanted, **own)

    def norms(wanted: bool) -> object:
        settings = own | {"num_probes": 2, "data_errors": wanted}
        return blockspec.squared_norms(objective, blocks, **settings)

    rows = {}
    for measure in (spectra, trace, norms):
        both = {"with": partial(measure, True), "without": partial(measure, False)}
        seconds = in_turns(both, rounds=rounds)
        most = {name: peak_of(function) for name, function in both.items()}
        rows[measure.__name__] = {
            "seconds with": seconds["with"],
            "seconds without": seconds["without"],
            "times": seconds["with"] / seconds["without"],
            "MiB with": most["with"] / 2**20,
            "MiB without": most["without"] / 2**20,
            "times the bytes": most["with"] / most["without"],
        }
    return pd.DataFrame(rows).T.rename_axis("what").reset_index()


def main(steps: int = 12, probes: int = 8, rounds: int = 7) -> None:
    """Measures and writes the table.

    Args:
        steps: Of the probe of each block.
        probes: Of the traces.
        rounds: Turns of each.
    """
    notes = f"{SEQUENCES} units; {steps} steps, {probes} probes; medians of {rounds} rounds."
    write("data_cost", {"cost": measured(steps, probes, rounds)}, notes=notes)


if __name__ == "__main__":
    CLI(main, as_positional=False)
