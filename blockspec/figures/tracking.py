"""Figures of eigenvalues that were followed through a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockspec.figures.style import (
    MATRICES,
    RUNS,
    canvas,
    short_names,
    styled,
)
from blockspec.figures.trends import DASHES

MOST_BLOCKS = len(RUNS)  # that can be told apart
WIDE = 30.0  # from this ratio of the largest to the smallest value on, the axis is logarithmic
Thresholds = Mapping[str, Any]
"""Name -> value, a number or a Series by step; or matrix -> such a mapping."""

LOWER = {
    "overlap": "overlap with\nthe one before",
    "ipr": "inverse\nparticipation\n(1: one entry)",
}


@styled
def tracked_eigenvalues(table: pd.DataFrame, thresholds: Thresholds | None = None) -> Figure:
    """The top eigenvalues along a training, a column of panels for each matrix.

    Above are the values, with a band as wide as their errors; open circles mark values whose
    error is beyond the tolerance. Below are the overlap of the first eigenvector with the
    nearest one of the measurement before, and its inverse participation ratio.

    Args:
        table: ``tracker.table``, or ``tracking.parquet`` of a run.
        thresholds: Dashed lines, such as those of the edge of stability: ``{"2/lr": 2 / lr}``. A
            value may be a Series by step, where the learning rate changes. ``{"hessian": {...},
            "preconditioned": {...}}`` gives each matrix its own.
    """
    if table.empty:
        raise ValueError("no measurements to draw: the table is empty")
    matrices = list(dict.fromkeys(table["matrix"]))
    blocks, left_out = _chosen(table)
    figure = canvas(figsize=(4.6 * len(matrices) + 1.6, 5.0), layout="constrained")
    axes = figure.subplots(3, len(matrices), sharex=True, squeeze=False, height_ratios=(2.4, 1, 1))
    colours = dict(zip(blocks, RUNS, strict=False))
    for column, matrix in zip(axes.T, matrices, strict=True):
        rows = table[(table["matrix"] == matrix) & table["block"].isin(blocks)]
        _values(column[0], rows, colours)
        _thresholds(column[0], _of_matrix(thresholds or {}, matrix), rows)
        column[0].set_title(MATRICES.get(matrix, matrix))
        for place, (name, label) in zip(column[1:], LOWER.items(), strict=True):
            _course(place, rows[rows["rank"] == 1], name, colours)
            place.set_ylabel(label)
        column[1].set_ylim(0, 1.05)
        column[2].set_yscale("log")
        column[-1].set_xlabel("training step")
    axes[0, 0].set_ylabel("eigenvalue (loss / parameter²)")
    _legend(figure, colours, axes[0], ranks=int(table["rank"].max()))
    note = f" ({len(blocks)} of {len(blocks) + left_out} blocks)" if left_out else ""
    figure.suptitle(f"Top eigenvalues along training{note}")
    return figure


def _chosen(table: pd.DataFrame) -> tuple[list[str], int]:
    """The blocks with the largest values, in the table's order, and how many are left out."""
    names = list(dict.fromkeys(table["block"]))
    sizes = table["value"].abs().groupby(table["block"]).max()
    kept = set(sizes.sort_values(ascending=False).index[:MOST_BLOCKS])
    return [name for name in names if name in kept], len(names) - len(kept)


def _values(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str]) -> None:
    for key, part in rows.groupby(["block", "rank"], sort=False):
        block, rank = cast(tuple[str, int], key)
        part, colour = part.sort_values("step"), colours[block]
        low, high = part["value"] - part["error"], part["value"] + part["error"]
        axes.fill_between(part["step"], low, high, color=colour, alpha=0.2, linewidth=0)
        dash = DASHES[(rank - 1) % len(DASHES)]
        axes.plot(part["step"], part["value"], color=colour, linestyle=dash)
        rough = part[~part["converged"].astype(bool)]
        axes.plot(rough["step"], rough["value"], "o", mfc="none", mec=colour, ms=3, linestyle="")
    sizes = rows["value"]
    if (sizes > 0).all() and sizes.max() > WIDE * sizes.min():
        axes.set_yscale("log")


def _thresholds(axes: Axes, thresholds: Thresholds, rows: pd.DataFrame) -> None:
    for name, value in thresholds.items():
        line: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 0.8, "zorder": 0}
        if isinstance(value, pd.Series):
            axes.plot(value.index, value.to_numpy(), **line)
            x, y = value.index[-1], float(value.iloc[-1])
        else:
            axes.axhline(float(value), **line)
            x, y = rows["step"].max(), float(value)
        axes.annotate(
            name, (x, y), ha="right", va="bottom", fontsize=7, color="0.35", annotation_clip=False
        )


def _of_matrix(thresholds: Thresholds, matrix: str) -> Thresholds:
    own = thresholds.get(matrix)
    if isinstance(own, Mapping):
        return own
    return {name: value for name, value in thresholds.items() if not isinstance(value, Mapping)}


def _course(axes: Axes, rows: pd.DataFrame, name: str, colours: Mapping[str, str]) -> None:
    for block, part in rows.groupby("block", sort=False):
        part = part.sort_values("step")
        axes.plot(part["step"], part[name].astype(float), color=colours[str(block)])


def _legend(figure: Figure, colours: Mapping[str, str], axes: np.ndarray, *, ranks: int) -> None:
    first: Axes = axes[0]
    names = short_names(colours)
    handles = [
        first.plot([], [], color=colour, label=names[block])[0] for block, colour in colours.items()
    ]
    if ranks > 1:
        handles += [
            first.plot(
                [], [], color="0.4", linestyle=DASHES[i % len(DASHES)], label=f"rank {i + 1}"
            )[0]
            for i in range(ranks)
        ]
    figure.legend(handles=handles, loc="outside right upper")
