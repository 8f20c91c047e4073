"""Draws how the error of the data falls with the number of sequences or images, for docs/data.md:
``python docs/how_much_data.py``, about ten minutes on one core.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from matplotlib.figure import Figure

import blockspec
from blockspec.figures.style import canvas
from language_models.fresh import fresh
from vision_models.factories import digits

Made = tuple[torch.nn.Module, Any, Any]
AVAILABLE = 128  # sequences or images
SIZES = (8, 16, 32, 64)  # of subsets of them
MOST_SUBSETS = 8  # of one size
MODELS: dict[str, tuple[Callable[[], Made], str]] = {
    "GPT-2 (text)": (
        lambda: fresh(num_batches=AVAILABLE // 8, batch_size=8),
        "sequences of 64 tokens",
    ),
    "ViT (digits)": (
        lambda: digits(model="digits_vit", count=AVAILABLE, batch_size=8),
        "images",
    ),
    "ResNet (digits)": (
        lambda: digits(model="digits_resnet", count=AVAILABLE, batch_size=8),
        "images",
    ),
}
COLOURS = ("#004488", "#BB5566", "#DDAA33")


def trained(made: Made, steps: int) -> blockspec.Objective:
    """The objective of a model after some steps of Adam; every example is a unit."""
    model, batches, loss = made
    batches = list(batches)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        total, count = loss(model, batches[step % len(batches)])
        (total / count).backward()
        optimizer.step()
    return blockspec.Objective(model, batches, loss, micro_batch=1)


def errors(objective: blockspec.Objective, matrices: int) -> pd.DataFrame:
    """A row a number of units and block: the error of the data, and of the estimate, over the
    block's norm; means over subsets of the data.
    """
    blocks = [b for b in objective.partition("matrix") if b.kind not in ("bias", "norm")]
    chosen = blocks[:: max(1, len(blocks) // matrices)]
    order = torch.randperm(AVAILABLE, generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for units in SIZES:
        for start in range(0, min(AVAILABLE, MOST_SUBSETS * units), units):
            part = objective.of_units(order[start : start + units])
            found = blockspec.estimate_spectra(
                part, chosen, num_probes=1, num_steps=10, check=False, progress=False
            )
            for name, spectrum in found.items():
                norm = spectrum.norm
                rows.append((units, name, (spectrum.data_error or 0) / norm, spectrum.error / norm))
    table = pd.DataFrame(rows, columns=["units", "block", "data", "estimate"])
    return table.groupby(["units", "block"], sort=False).mean().reset_index()


def drawn(tables: dict[str, pd.DataFrame]) -> Figure:
    """The median over blocks, and the range of the blocks."""
    figure = canvas(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, table), colour in zip(tables.items(), COLOURS, strict=True):
        by_units = table.groupby("units")["data"]
        middle = by_units.median()
        label = f"{name}: {MODELS[name][1]}"
        axes.loglog(middle.index, middle, "o-", color=colour, label=label)
        axes.fill_between(
            middle.index, by_units.min(), by_units.max(), color=colour, alpha=0.15, lw=0
        )
    first = min(table["units"].min() for table in tables.values())
    units = sorted({n for table in tables.values() for n in table["units"]})
    top = max(table.groupby("units")["data"].median().iloc[0] for table in tables.values())
    guide = [1.5 * top * (first / n) ** 0.5 for n in units]
    axes.loglog(units, guide, "--", color="0.5", label="one over the root of the number")
    axes.set_xticks(units, [str(n) for n in units])
    axes.minorticks_off()
    axes.set_xlabel("sequences or images")
    axes.set_ylabel("error of the data / largest eigenvalue")
    axes.legend(frameon=False, fontsize=7)
    axes.set_title("Bands: from the best to the worst matrix", fontsize=9)
    return figure


def main(
    out: Path = Path(__file__).with_name("data.png"), steps: int = 60, matrices: int = 6
) -> None:
    """Measures and draws.

    Args:
        out: The picture; a table of the same name with the ending csv lies beside it.
        steps: Of training.
        matrices: How many weight matrices of each model.
    """
    warnings.simplefilter("ignore")
    tables = {}
    for name, (make, _) in MODELS.items():
        torch.manual_seed(0)
        tables[name] = errors(trained(make(), steps), matrices)
        print(name, tables[name].groupby("units")[["data", "estimate"]].median(), flush=True)
    pd.concat(tables, names=["model"]).reset_index("model").to_csv(
        out.with_suffix(".csv"), index=False
    )
    drawn(tables).savefig(out, dpi=150)


if __name__ == "__main__":
    CLI(main, as_positional=False)
