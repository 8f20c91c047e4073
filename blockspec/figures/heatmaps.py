"""Heat maps of distances between blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from blockspec.figures.page import width_of
from blockspec.figures.style import canvas, short_names, styled

COLOURS = ListedColormap(
    colormaps["magma_r"](np.linspace(0, 0.88, 256))
)  # lightness falls evenly: readable in grey
CHARACTER = 0.66  # mean width of a character over the size of its font, generously
VECTORS = 40  # blocks: the cells of larger maps are drawn as one picture, not one by one
SMALLEST = 4.5  # points: below, a number cannot be read

BOUNDED_TICKS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Measure:
    """How a definition of distance is called on a colour bar, its bound, and whether its colours
    are logarithmic.
    """

    label: str
    bound: float | None = None
    logarithmic: bool = False


MEASURES = {
    "jensen-shannon": Measure("Jensen-Shannon divergence\n(nats; at most ln 2)", bound=math.log(2)),
    "resolved": Measure(
        "Jensen-Shannon divergence\nat the coarser resolution (nats)", bound=math.log(2)
    ),
    "symmetrised-kl": Measure("symmetrised KL divergence\n(nats; unbounded)"),
    "wasserstein": Measure("Wasserstein-1 distance\n(loss / parameter²)", logarithmic=True),
}


def distance_heatmap(
    distances: pd.DataFrame,
    definition: str = "jensen-shannon",
    *,
    top: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Distances between blocks, the lower triangle; see :func:`distance_heatmaps`."""
    return distance_heatmaps({"": distances}, definition, top=top, ax=ax)


@styled
def distance_heatmaps(
    distances: Mapping[str, pd.DataFrame],
    definition: str = "jensen-shannon",
    *,
    top: float | None = None,
) -> Figure:
    """Distances between blocks, a map for each title, beside each other on one colour scale; up to
    three in a row.

    Args:
        distances: title -> (blocks x blocks) as of ``js_distances``.
        definition: Of the distances: names the colour bar and its bound.
        top: Upper end of the colours where the definition has no bound; the largest distance if
            left out. 3 is that of the published maps of arXiv 2402.16788 (``symmetrised-kl``).
    """
    if definition not in MEASURES:
        raise ValueError(f"definition is one of {tuple(MEASURES)}, got {definition!r}")
    if not distances:
        raise ValueError("no distances to draw: the mapping is empty")
    measure = MEASURES[definition]
    size = max(len(table) for table in distances.values())
    side = min(max(0.11 * size, 1.7), 5.5 if len(distances) == 1 else 4.2)  # inches
    same = len({tuple(table.index) for table in distances.values()}) == 1
    beside = max(_label_inches(table, side) for table in distances.values())
    columns = len(distances) if len(distances) <= 3 else math.ceil(math.sqrt(len(distances)))
    rows = math.ceil(len(distances) / columns)
    width = (side + 0.15) * columns + beside * (1 if same else columns) + 1.3
    if width_of(width) < width:
        columns = min(columns, max(1, int(width_of(width) // 2)))
        side = min(
            side, (width_of(width) - 1.4) / columns - 0.15 - beside / (columns if same else 1)
        )
        beside = max(_label_inches(table, side) for table in distances.values())
        rows = math.ceil(len(distances) / columns)
    width = width_of(width)
    figure = canvas(figsize=(width, (side + beside + 0.4) * rows), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place in axes[len(distances) :]:
        place.set_axis_off()
    norm = _norm(distances, measure, top)
    for i, (place, (title, table)) in enumerate(zip(axes, distances.items(), strict=False)):
        image = _map(place, table, norm, side, labelled=i % columns == 0 or not same)
        place.set_title(title)
    beyond = (
        top is not None and max(float(table.to_numpy().max()) for table in distances.values()) > top
    )
    bar = figure.colorbar(
        image, ax=list(axes), extend="max" if beyond else "neither", shrink=0.8, aspect=20
    )
    if measure.bound and top is None:
        bar.set_ticks([*BOUNDED_TICKS, measure.bound], labels=[*map(str, BOUNDED_TICKS), "ln 2"])
    bar.set_label(measure.label)
    bar.outline.set_visible(False)
    return figure


def _norm(distances: Mapping[str, pd.DataFrame], measure: Measure, top: float | None) -> Normalize:
    values = np.concatenate(
        [table.to_numpy()[np.tril_indices(len(table), -1)] for table in distances.values()]
    )
    highest = top or measure.bound or float(values.max(initial=0)) or 1.0
    if not measure.logarithmic:
        return Normalize(0, highest)
    positive = values[values > 0]
    lowest = float(positive.min(initial=highest)) if len(positive) else highest
    return LogNorm(max(min(lowest, highest / 10), highest * 1e-6), highest)


def _map(
    axes: Axes, table: pd.DataFrame, norm: Normalize, side: float, *, labelled: bool
) -> QuadMesh:
    size = len(table)
    upper = np.triu(np.ones((size, size), bool), 1)
    values = np.ma.array(table.to_numpy(float), mask=upper)
    edges = np.arange(size + 1)
    image = axes.pcolormesh(
        edges,
        edges,
        np.maximum(values, norm.vmin or 0.0),
        cmap=COLOURS,
        norm=norm,
        rasterized=size > VECTORS,
    )
    axes.set_xlim(0, size)
    axes.set_ylim(size, 0)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    places, labels, font = _labels(table, side)
    axes.set_xticks(places, labels, rotation=90, fontsize=font)
    axes.set_yticks(places, labels if labelled else [""] * len(labels), fontsize=font)
    if size > 1:
        mean = table.to_numpy()[np.tril_indices(size, -1)].mean()
        axes.text(
            0.98,
            0.98,
            f"mean over pairs\n{mean:.3g}",
            transform=axes.transAxes,
            ha="right",
            va="top",
        )
    _write_values(axes, values, norm, room=side * 72 / size)
    return image


def _write_values(axes: Axes, values: np.ma.MaskedArray, norm: Normalize, *, room: float) -> None:
    """The numbers, where they find room: points a cell."""
    texts = {
        (i, j): f"{values[i, j]:.2g}"
        for i, j in zip(*np.tril_indices(len(values), -1), strict=True)
    }
    font = min(6.0, room / (CHARACTER * max(map(len, texts.values()), default=1)))
    if font < SMALLEST:
        return
    for (i, j), text in texts.items():
        colour = "white" if norm(values[i, j]) > 0.55 else "black"
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=font, color=colour)


def _label_inches(table: pd.DataFrame, side: float) -> float:
    _, labels, font = _labels(table, side)
    return max(map(len, labels)) * CHARACTER * font / 72


def _labels(table: pd.DataFrame, side: float) -> tuple[np.ndarray, list[str], float]:
    """Places, labels and font size: each block's where they find room, else each layer's."""
    names = list(short_names(map(str, table.index)).values())
    room = side * 72 / len(names)  # points
    if room >= 5.5:
        return np.arange(len(names)) + 0.5, names, min(8.0, 0.85 * room)
    groups = [name.split(".")[0] for name in names]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    shown: list[tuple[float, str]] = []
    for start, stop in zip(starts, [*starts[1:], len(groups)], strict=True):
        centre = (start + stop) / 2
        if not shown or (centre - shown[-1][0]) * room >= 8:
            shown.append((centre, groups[start]))
    return np.array([place for place, _ in shown]), [label for _, label in shown], 7.0
