"""Figures of trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockspec.figures.style import RUN_MARKERS, RUNS, save, styled


def draw(trials: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> Path:
    """Writes ``optimizers.png`` and ``optimizers.pdf``: see ``plot_optimizers``."""
    figure = plot_optimizers(trials, curves)
    path = save(figure, folder, "optimizers")
    plt.close(figure)
    return path


@styled
def plot_optimizers(trials: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Left: final loss by learning rate, infinite ones hollow at the top.

    Right: loss by step, mean and range.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.0, 2.6), layout="constrained", width_ratios=(1, 1.4), sharey=True
    )
    names = list(trials["optimizer"].unique())
    draw_rates(left, trials, names)
    draw_curves(right, curves, names, x="step")
    right.set_xlabel("training step")
    return figure


def draw_rates(axes: Axes, trials: pd.DataFrame, names: Sequence[str]) -> None:
    """Held-out loss at the end by learning rate: mean and range over the seeds that chose it;
    hollow at the top: one diverged.
    """
    tuning = trials[trials["tuning"]]
    at_top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    for name, colour, marker in zip(names, RUNS, RUN_MARKERS, strict=False):
        losses = (
            tuning[tuning["optimizer"] == name]
            .groupby("lr")["final_loss"]
            .agg(["mean", "min", "max"])
        )
        kept = losses[np.isfinite(losses["mean"])]
        lost = losses.index.difference(kept.index)
        axes.plot(kept.index, kept["mean"], color=colour, marker=marker, label=name)
        axes.fill_between(
            kept.index, kept["min"], kept["max"], color=colour, alpha=0.2, linewidth=0
        )
        if len(lost):  # an empty line that is not clipped would take room in a constrained layout
            axes.plot(lost, [1.0] * len(lost), marker, color=colour, fillstyle="none", **at_top)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
    seeds = tuning["seed"].nunique()
    axes.legend(title=f"mean and range of {seeds} seeds" if seeds > 1 else "one seed")


def draw_curves(axes: Axes, curves: pd.DataFrame, names: Sequence[str], *, x: str) -> None:
    """Held-out loss of the compared runs by column ``x``: mean and range over seeds; in the colours
    of ``draw_rates``.
    """
    measured = curves.dropna(subset="held_out_loss")
    for name, colour in zip(names, RUNS, strict=False):
        losses = (
            measured[measured["optimizer"] == name]
            .groupby(x)["held_out_loss"]
            .agg(["mean", "min", "max"])
        )
        if len(losses):
            axes.plot(losses.index, losses["mean"], color=colour, label=name)
            axes.fill_between(
                losses.index, losses["min"], losses["max"], color=colour, alpha=0.2, linewidth=0
            )
    axes.set(xlabel=x, ylabel="held-out loss")
    axes.legend(title=f"mean and range of {curves['seed'].nunique()} other seeds")
