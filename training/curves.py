"""Figures of trainings."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockspec.style import RUN_MARKERS, RUNS, save, styled


def draw(trials: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> Path:
    """Writes ``optimizers.png`` and ``optimizers.pdf``: see ``plot_optimizers``."""
    figure = plot_optimizers(trials, curves)
    path = save(figure, folder, "optimizers")
    plt.close(figure)
    return path


@styled
def plot_optimizers(trials: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Left: final loss by learning rate, infinite ones hollow at the top. Right: loss by step, mean and range."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), layout="constrained", width_ratios=(1, 1.4), sharey=True)
    names = list(trials["optimizer"].unique())
    looks = {"hue_order": names, "palette": list(RUNS[: len(names)])}
    _draw_rates(left, trials[trials["tuning"]], names)
    measured = curves.dropna(subset="held_out_loss")
    sns.lineplot(measured, x="step", y="held_out_loss", hue="optimizer", errorbar=("pi", 100), ax=right, **looks)
    right.set(xlabel="training step")
    right.get_legend().set_title(f"mean and range of {curves['seed'].nunique()} other seeds")
    return figure


def _draw_rates(axes: Axes, tuning: pd.DataFrame, names: list[str]) -> None:
    at_top = {"transform": axes.get_xaxis_transform(), "clip_on": False}  # rates with a run that diverged: on the frame
    for name, colour, marker in zip(names, RUNS, RUN_MARKERS, strict=False):
        losses = tuning[tuning["optimizer"] == name].groupby("lr")["final_loss"].agg(["mean", "min", "max"])
        kept = losses[np.isfinite(losses["mean"])]
        lost = losses.index.difference(kept.index)
        axes.plot(kept.index, kept["mean"], color=colour, marker=marker, label=name)
        axes.fill_between(kept.index, kept["min"], kept["max"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(lost, [1.0] * len(lost), marker, color=colour, fillstyle="none", **at_top)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
    axes.legend(title=f"mean and range of {tuning['seed'].nunique()} seeds")
