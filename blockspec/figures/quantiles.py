"""A heat map of quantiles: blocks x shares of the magnitudes of their eigenvalues.

It is for many blocks of one matrix, heads, experts or neurons, whose curves would cover each other
and whose mixture would hide how they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from blockspec.figures.heatmaps import COLOURS
from blockspec.figures.page import inches, points, width_of
from blockspec.figures.style import canvas, in_units_of, matrix_name, short_names, styled
from blockspec.spectra.spectrum import Spectrum
from blockspec.spectra.tails import quantiles

LEVELS = {0.5: "median", 0.75: "75 %", 0.9: "90 %", 0.99: "99 %", 1.0: "largest"}
UNSURE = 10.0  # how many times as large the upper end of an interval may be as the lower one
DECADES = 8  # of the colours, at most
ROW, SMALLEST_ROW = 0.11, 0.004  # inches
TALLEST = 7.5  # inches
LEGIBLE = 5.5  # points of a row that has its own name
SORTED = 32  # pieces of a matrix: more of them are sorted, since their order means nothing


@styled
def quantiles_by_block(spectra: Mapping[str, Spectrum], *, columns: float = 1) -> Figure:
    """Quantiles of |eigenvalue|, a row a block: the median, and what few eigenvalues are beyond.

    Cells are crossed out where the quantile is not known within a factor of ten (95 %): often the
    median, which lies where Lanczos steps resolve least. Where a matrix has many pieces, they are
    sorted by their largest eigenvalue.

    Args:
        columns: Width of the figure in columns of a paper, 1 or 2.
    """
    if not spectra:
        raise ValueError("no spectra to draw: the mapping is empty")
    names = _order(spectra)
    tables = [quantiles(spectra[name], list(LEVELS)) for name in names]
    values, low, high = (
        np.stack([table[column].to_numpy() for table in tables])
        for column in ("value", "low", "high")
    )
    side = float(np.clip(ROW * len(names), 1.0, TALLEST))
    figure = canvas(figsize=(width_of(inches(columns)), side + 1.3), layout="constrained")
    axes = figure.subplots()
    norm = _norm(values)
    edges = np.arange(len(LEVELS) + 1), np.arange(len(names) + 1)
    image = axes.pcolormesh(
        *edges, np.clip(values, norm.vmin, norm.vmax), cmap=COLOURS, norm=norm, rasterized=True
    )
    _cross_out(axes, high > UNSURE * low)
    axes.set_ylim(len(names), 0)
    axes.set_xticks(np.arange(len(LEVELS)) + 0.5, list(LEVELS.values()), fontsize=points(6))
    _name_rows(axes, names, room=72 * side / len(names))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("quantile (share of eigenvalues)")
    axes.set_ylabel("block")
    bar = figure.colorbar(image, ax=axes, aspect=40, fraction=0.08, pad=0.02)
    bar.set_label(in_units_of("|eigenvalue| (loss / parameter²)", spectra))
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{matrix_name(spectra)}: quantiles of each block\n"
        "crossed out: not known within a factor of ten"
    )
    return figure


def _order(spectra: Mapping[str, Spectrum]) -> list[str]:
    """The blocks in their order; many pieces of one matrix by their norm."""
    families: dict[str, list[str]] = {}
    for name in spectra:
        families.setdefault(family(name), []).append(name)
    return [
        name
        for names in families.values()
        for name in (
            sorted(names, key=lambda name: -spectra[name].norm) if len(names) > SORTED else names
        )
    ]


def family(name: str) -> str:
    """What a piece is one of several of: ``…c_attn.weight/query/head_3`` is of ``…/query``."""
    path, *parts = name.split("/")
    return "/".join([path, *(part for part in parts if not part[-1:].isdigit())])


def _norm(values: np.ndarray) -> LogNorm:
    highest = float(values.max()) or 1.0
    positive = values[values > 0]
    lowest = float(positive.min()) if len(positive) else highest
    return LogNorm(max(min(lowest, highest / 10), highest / 10**DECADES), highest)


def _cross_out(axes: Axes, unsure: np.ndarray) -> None:
    hidden = np.ma.masked_where(~unsure, np.zeros(unsure.shape))
    edges = np.arange(unsure.shape[1] + 1), np.arange(len(unsure) + 1)
    grey = ListedColormap(["0.95"])
    axes.pcolor(*edges, hidden, cmap=grey, hatch="/////", edgecolor="0.7", linewidth=0)


def _name_rows(axes: Axes, names: Sequence[str], *, room: float) -> None:
    """Each block by its name where a row has room for it, else each matrix by its own."""
    if room >= LEGIBLE:
        labels = list(short_names(names).values())
        axes.set_yticks(np.arange(len(names)) + 0.5, labels, fontsize=min(points(7.0), 0.9 * room))
        return
    rows = pd.Series(range(len(names)), index=[family(name) for name in names])
    centres = rows.groupby(level=0, sort=False).mean() + 0.5
    shown: list[str] = []
    for name in centres.index:
        if not shown or (centres[name] - centres[shown[-1]]) * room >= 8:
            shown.append(name)
    labels = list(short_names(shown).values())
    axes.set_yticks(centres[shown], labels, fontsize=points(7))
    sizes = rows.groupby(level=0, sort=False).size()
    for edge in sizes.cumsum()[:-1] if sizes.max() > 1 else []:
        axes.axhline(edge, color="white", linewidth=0.6)
