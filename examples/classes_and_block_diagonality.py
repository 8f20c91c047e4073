"""More classes, more block diagonal (after arXiv 2505.02809): ``python
examples/classes_and_block_diagonality.py``, a minute.

A network with one hidden layer of 8 neurons classifies Gaussian data into C classes, with random
weights and random labels. A block is what leads into one hidden neuron, or to one class. How large
are the blocks off the diagonal beside those on it? For the output layer with a softmax the answer
is short: ``H_bc = E[(p_b [b = c] - p_b p_c) h h']`` with p about 1 / C, so blocks on the diagonal
fall like 1 / C and those off it like 1 / C^2: the ratio of their norms like 1 / C. The hidden layer
is measured.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from matplotlib.figure import Figure
from torch import nn

import blockspec
from blockspec.figures.toolbox import save
from blockspec.model.blocks import Block, Piece

INPUTS, WIDTH = 32, 8


def objective_of(classes: int, seed: int, examples: int) -> blockspec.Objective:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, classes, bias=False)
    ).double()
    x = torch.randn(examples, INPUTS, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (examples,), generator=generator)
    return blockspec.Objective(model, [(x, y)], blockspec.losses.classification)


def rows(name: str, count: int, width: int) -> list[Block]:
    """A block for each row of a weight."""
    return [
        Block(f"{name}/{i}", "other", None, width, (Piece(name, 0, slice(i, i + 1)),))
        for i in range(count)
    ]


def ratio(found: blockspec.Coupling) -> tuple[float, float]:
    """Norm of the mean block off the diagonal over that of the mean one on it, and the share of the
    squared norm off it.
    """
    squared = found.squared_norms.to_numpy()
    n = len(squared)
    off = (squared.sum() - np.trace(squared)) / (n * (n - 1))
    return float(np.sqrt(off / (np.trace(squared) / n))), found.off_diagonal_share.value


def measure(classes: int, seed: int, examples: int, num_probes: int) -> list[dict[str, object]]:
    objective = objective_of(classes, seed, examples)
    layers = {"hidden": rows("0.weight", WIDTH, INPUTS), "output": rows("2.weight", classes, WIDTH)}
    table = []
    for layer, blocks in layers.items():
        relative, share = ratio(blockspec.coupling(objective, blocks, num_probes, seed=seed))
        table.append(
            {
                "layer": layer,
                "classes": classes,
                "seed": seed,
                "ratio": relative,
                "off_diagonal_share": share,
            }
        )
    return table


def slopes(table: pd.DataFrame) -> dict[str, float]:
    """Exponent of C in the ratio, a straight line in logarithms over the upper half of the numbers
    of classes.
    """
    mean = table.groupby(["layer", "classes"])["ratio"].mean().unstack("layer")
    upper = mean.iloc[len(mean) // 2 :]
    return {
        str(layer): float(np.polyfit(np.log(upper.index), np.log(upper[layer]), 1)[0])
        for layer in upper
    }


def draw(table: pd.DataFrame, exponents: dict[str, float]) -> Figure:
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for layer, colour, marker in (("hidden", "#332288", "o"), ("output", "#CC6677", "s")):
        some = table[table["layer"] == layer].groupby("classes")["ratio"]
        label = f"{layer} layer, slope {exponents[layer]:.2f}"
        axes.errorbar(
            some.mean().index,
            some.mean(),
            some.std(),
            color=colour,
            marker=marker,
            markersize=4,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("number of classes")
    axes.set_ylabel("off-diagonal norm / diagonal norm")
    axes.legend(frameon=False)
    return figure


def main(
    classes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128),
    seeds: int = 3,
    examples: int = 500,
    out: str = "runs/classes",
) -> None:
    """Ratio of off-diagonal to diagonal blocks by number of classes.

    Args:
        classes: Numbers of classes.
        seeds: Repetitions.
        examples: Gaussian inputs.
        out: Folder of table and figure.
    """
    torch.set_num_threads(1)
    results = [
        row
        for c in classes
        for seed in range(seeds)
        for row in measure(c, seed, examples, num_probes=4)
    ]
    table = pd.DataFrame(results)
    exponents = slopes(table)
    print(
        table.groupby(["layer", "classes"])[["ratio", "off_diagonal_share"]]
        .mean()
        .round(4)
        .to_string()
    )
    print({layer: round(value, 2) for layer, value in exponents.items()})
    print(save(draw(table, exponents), Path(out), "classes"))
    table.to_csv(Path(out) / "classes.csv", index=False)


if __name__ == "__main__":
    CLI(main)
