"""Distances between the blocks of an MLP-mixer, and Adam and SGD on it (figure 5, right)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from blockspec.figures.plots import distance_heatmaps
from blockspec.figures.style import styled
from paper.distances import RESOLVED, over_pairs
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.figure_4 import heatmap
from paper.optimizers import ADAM, SGD, gaps
from training.curves import draw_curves


@dataclass(frozen=True)
class Settings:
    """model: its name in figure 4 and in table 1."""

    model: str = "mixer"


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    tables = context.needed["table_1"]
    trained = {
        name: tables[name][tables[name]["model"] == settings.model] for name in ("runs", "curves")
    }
    return {
        "distances": heatmap(context.needed["figure_4"], settings.model, RESOLVED).reset_index(),
        **trained,
    }


@styled
def plot_training(curves: pd.DataFrame) -> Figure:
    """Held-out loss by step, each optimizer with its best learning rate."""
    figure = Figure(figsize=(3.6, 2.6), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves, [ADAM, SGD], x="step")
    axes.set(title="mixer", xlabel="training step", ylabel="held-out loss (nats)")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {
        "figure_5_mixer_distances": distance_heatmaps(
            {"mixer at initialisation": tables["distances"].set_index("block")}
        ),
        "figure_5_mixer_training": plot_training(tables["curves"]),
    }


def judge(tables: Tables) -> list[Finding]:
    gap = gaps(tables["runs"])
    mean = float(np.mean(over_pairs(tables["distances"].set_index("block"))))
    return [
        Finding(
            "the mixer, whose blocks differ, is trained better by Adam than by SGD",
            "share of Adam's decrease of the held-out loss that SGD does not reach: "
            f"{with_error(gap.mean(), gap.sem())}; mean "
            f"distance between its blocks {mean:.3g} nats ({RESOLVED})",
            "agrees" if gap.mean() > 2 * gap.sem() else "disagrees",
            f"more than two standard errors over {len(gap)} seeds above 0 are needed",
        )
    ]


EXHIBIT = Exhibit(
    name="figure_5_mixer",
    title="An MLP-mixer",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 5",
    measure=measure,
    draw=draw,
    judge=judge,
    needs=("figure_4", "table_1"),
    scales={
        name: Scale(
            Settings(),
            "The map of figure 4, and the trainings of table 1.",
            "Seconds after figure 4 and table 1.",
        )
        for name in ("small", "paper")
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
