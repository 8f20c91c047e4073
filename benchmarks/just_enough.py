"""How many products of one sequence the spectra of every matrix take, with just enough data, with
all of it, and by the schedule of the paper: ``python -m benchmarks.just_enough``.

A product of one vector with the matrix of one sequence is the unit, since time and energy go with
it. What ``data="auto"`` takes is counted. With all of the text, the schedule without errors of the
data is run on a few sequences, and its products are counted as if it ran on all: how many a block
needs hardly depends on the data. The paper takes 10 probes of 100 steps of each block (arXiv
2402.16788), on all the text too.
"""

from __future__ import annotations

import warnings

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.record import clock, write
from blockspec.model.blocks import Block
from language_models.fresh import fresh
from language_models.models import ModelSettings
from language_models.train import DataSettings, make_task

WINDOW = 64
PAPER = 10 * 100
"""Products with each block, probes times steps."""
AUTO = {"num_probes": "auto", "num_steps": "auto", "check": False}


def trained(steps: int, sequences: int) -> blockspec.Objective:
    """The embedded GPT-2 after so many updates; each sequence is a unit."""
    model, batches, loss = fresh(num_batches=sequences, batch_size=1, num_tokens=WINDOW)
    task = make_task(ModelSettings(), DataSettings(num_tokens=WINDOW), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        total, terms = task.loss(model, task.batch_at(step))
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
    return blockspec.Objective(model, batches, loss)


def matrices(objective: blockspec.Objective) -> list[Block]:
    """Every weight matrix."""
    return [b for b in objective.partition("matrix") if b.kind not in ("bias", "norm")]


def main(
    steps: int = 1000,
    sequences: int = 3047,
    tolerance: float = 5e-2,
    few: int = 32,
) -> None:
    """Counts, and writes the table.

    Args:
        steps: Updates of training.
        sequences: Windows of the embedded text: all that there are.
        tolerance: Of each block's norm, total error.
        few: Sequences on which the products of the schedule without errors of the data are counted.
    """
    objective = trained(steps, sequences)
    blocks = matrices(objective)
    start = clock()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = blockspec.estimate_spectra(
            objective, blocks, tolerance=tolerance, data="auto", **AUTO
        )
    seconds = clock() - start
    assert found.cost is not None
    part = objective.of_units(range(few))
    plain = blockspec.estimate_spectra(part, blocks, tolerance=tolerance, data_errors=False, **AUTO)
    assert plain.cost is not None
    counts = {
        'data="auto"': found.cost.products,
        "auto, all sequences": plain.cost.products // few * sequences,
        "the paper's schedule, all sequences": PAPER * len(blocks) * sequences,
    }
    rows = [
        {
            "what": name,
            "products of a sequence": count,
            "times as many": count / found.cost.products,
        }
        for name, count in counts.items()
    ]
    errors = [
        {
            "block": name,
            "units": spectrum.units,
            "error": spectrum.error / spectrum.norm,
            "error of the data": spectrum.data_error / spectrum.norm,
            "total": spectrum.total_error / spectrum.norm,
        }
        for name, spectrum in found.items()
    ]
    note = (
        f"{len(blocks)} matrices, {sequences} sequences of {WINDOW} tokens, {seconds:.0f} s of "
        f"processor time with just enough data. Warnings: {len(told)}."
    )
    tables = {"Products": pd.DataFrame(rows), "Errors over the norm": pd.DataFrame(errors)}
    write("just_enough", tables, notes=note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    CLI(main, as_positional=False)
