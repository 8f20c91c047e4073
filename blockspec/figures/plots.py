"""Figures of spectra: one function each, from spectra or their tidy table to a matplotlib
figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure

from blockspec.figures.heatmaps import CHARACTER
from blockspec.figures.heatmaps import distance_heatmap as distance_heatmap
from blockspec.figures.heatmaps import distance_heatmaps as distance_heatmaps
from blockspec.figures.page import points, width_of
from blockspec.figures.panels import (
    DENSITY,
    EIGENVALUE,
    Panel,
    draw_density,
    draw_line,
    label_outer,
    mark_eigenvalues,
    panel_of,
    resolved_density,
    resolved_mean,
    scale_of,
    smoothing_note,
)
from blockspec.figures.quantiles import quantiles_by_block as quantiles_by_block
from blockspec.figures.stages import Labels, stage_title
from blockspec.figures.style import (
    Look,
    canvas,
    column_of,
    eigenvalue_axis,
    in_units_of,
    looks_of,
    matrix_name,
    short_names,
    spread,
    styled,
)
from blockspec.figures.style import save as save
from blockspec.figures.style import with_note as with_note
from blockspec.figures.tails import tails_by_block as tails_by_block
from blockspec.figures.tails import tails_of_full as tails_of_full
from blockspec.figures.trends import compare_runs as compare_runs
from blockspec.figures.trends import heterogeneity_over_training as heterogeneity_over_training
from blockspec.figures.trends import trace_by_kind_over_training as trace_by_kind_over_training
from blockspec.spectra.collection import Spectra, block_diagonal
from blockspec.spectra.spectrum import Estimate, RitzValue, Spectrum

WRAP = 6  # panels in a row where rows are not layers
MOST_PANELS = 30
PANEL = 1.1  # width of a panel in inches
LEAST_HEIGHT = 2.6  # inches, in which the name of the vertical axis finds room


@dataclass(frozen=True)
class Row:
    label: str
    panels: tuple[Panel | None, ...]


@styled
def esd_by_block(spectra: Mapping[str, Spectrum], *, max_layers: int = 4) -> Figure:
    """Spectral densities of the blocks side by side, on common axes.

    Rows are layers (evenly spread ones where there are more than ``max_layers``), columns are kinds
    of block, and what lies outside the layers comes last; models with fewer than three kinds of
    matrix in a layer get a panel a block. Several blocks of one kind in one layer, such as heads or
    norms, are thin curves in one panel. The band is one standard error,
    over probes and, where it is known, over the data.
    How curves are smoothed: see :func:`blockspec.figures.panels.resolved_density`.
    """
    rows, note = _rows(spectra, max_layers)
    columns = max(len(row.panels) for row in rows)
    width = width_of(max(PANEL * columns + 0.6, 5.2))
    if (fitting := int((width - 0.6) / (0.8 * PANEL))) < columns:
        rows, columns = _folded(rows, fitting), fitting
    shown = [panel for row in rows for panel in row.panels if panel]
    scale = scale_of(curve for panel in shown for curve in panel.curves)
    figure = canvas(
        figsize=(width, max(1.15 * len(rows) + 0.9, 3.0)),
        layout="constrained",
    )
    axes = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
    above: dict[int, str] = {}
    for row, line in zip(rows, axes, strict=True):
        for j, (place, panel) in enumerate(zip_longest(line, row.panels)):
            if panel is None:
                place.set_axis_off()
                continue
            draw_density(place, panel, scale, width=0.95)
            if above.get(j) != panel.title:
                longest = max(map(len, panel.title.split("\n")))
                room = 72 * min(PANEL, (width - 0.6) / columns) / (CHARACTER * longest)
                place.set_title(panel.title, fontsize=min(points(8.0), room))
            above[j] = panel.title
        next(place for place in line if place.axison).set_ylabel(row.label)
    label_outer(axes)
    figure.supxlabel(in_units_of(EIGENVALUE, spectra), fontsize="medium")
    figure.supylabel(in_units_of(DENSITY, spectra), fontsize="medium")
    figure.suptitle(
        f"{matrix_name(spectra)}: spectrum of each block{note}\n{smoothing_note(spectra.values())}"
    )
    return figure


def _rows(spectra: Mapping[str, Spectrum], max_layers: int) -> tuple[list[Row], str]:
    """Rows of panels, and what the title says of what is left out."""
    if not spectra:
        raise ValueError("no spectra to draw: the mapping is empty")
    names = short_names(spectra)
    layers = sorted({s.block.layer for s in spectra.values() if s.block.layer is not None})
    present = {column_of(s.block) for s in spectra.values() if s.block.layer is not None}
    kinds = list(looks_of(present))
    if len(present - {"norm", "bias"}) < 3:
        panels = [panel_of(parts, names) for parts in _cells(spectra, by_layer=False).values()]
        shown = spread(panels, MOST_PANELS)
        return _wrapped("", shown, WRAP), f" ({len(shown)} of {len(panels)} panels)" if len(
            shown
        ) < len(panels) else ""
    cells = _cells(spectra, by_layer=True)
    chosen = spread(layers, max_layers)
    grid = {
        at: panel_of(parts, names, by_kind=True) for at, parts in cells.items() if at[0] in chosen
    }
    rows = [
        Row(f"layer {layer}", tuple(grid.get((layer, kind)) for kind in kinds)) for layer in chosen
    ]
    outside = [panel_of(parts, names) for (layer, _), parts in cells.items() if layer is None]
    note = (
        f" (layers {', '.join(map(str, chosen))} of {len(layers)})"
        if len(chosen) < len(layers)
        else ""
    )
    return rows + _wrapped("outside\nlayers", outside, len(kinds)), note


def _folded(rows: Sequence[Row], columns: int) -> list[Row]:
    """The same panels in fewer columns: each is called by its row too."""
    panels = [
        replace(
            panel, title=f"{row.label}\n{panel.title}" if "layer " in row.label else panel.title
        )
        for row in rows
        for panel in row.panels
        if panel
    ]
    return _wrapped("", panels, columns)


def _wrapped(label: str, panels: Sequence[Panel], columns: int) -> list[Row]:
    return [
        Row(label, tuple(panels[start : start + columns]))
        for start in range(0, len(panels), columns)
    ]


def _cells(
    spectra: Mapping[str, Spectrum], *, by_layer: bool
) -> dict[tuple[int | None, str], dict[str, Spectrum]]:
    """(layer, kind or name) -> the blocks that share a panel: norms, biases, the many pieces of one
    matrix.
    """
    layer_of = {name: s.block.layer if by_layer else None for name, s in spectra.items()}
    counts = Counter(name.split("/")[0] for name in spectra)
    cells: dict[tuple[int | None, str], dict[str, Spectrum]] = {}
    for name, spectrum in spectra.items():
        layer, kind, matrix = layer_of[name], column_of(spectrum.block), name.split("/")[0]
        together = layer is not None or kind in ("norm", "bias")
        key = kind if together else matrix if counts[matrix] > 4 else name
        cells.setdefault((layer, key), {})[name] = spectrum
    return cells


@styled
def esd_stages(
    spectra_by_step: Mapping[int, Spectra],
    block: str = "model",
    *,
    normalised: str | None = None,
    max_stages: int = 6,
    labels: Labels | None = None,
) -> Figure:
    """The spectrum of one block at stages of training, one below the other; the first stage as a
    dashed line in each.

    Args:
        normalised: None, or ``"tenth"``: eigenvalues are divided by the 10th largest one of their
            stage, as in figure 1 of arXiv 2402.16788; see :func:`tenth_largest`.
        max_stages: Evenly spread stages are drawn where there are more.
        labels: What the stages are called, where their training steps are not known.
    """
    if normalised not in (None, "tenth"):
        raise ValueError(f"normalised is None or 'tenth', got {normalised!r}")
    steps = spread(sorted(spectra_by_step), max_stages)
    if not steps:
        raise ValueError("no stages to draw: the mapping is empty")
    parts = {step: spectra_by_step[step][block] for step in steps}
    if normalised:
        parts = {step: divided(part, tenth_largest(part)) for step, part in parts.items()}
    scale = scale_of(parts.values())
    height = max(0.85 * len(steps) + 0.9, LEAST_HEIGHT)
    figure = canvas(figsize=(width_of(5.5), height), layout="constrained")
    axes = figure.subplots(len(steps), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    first = resolved_mean(parts[steps[0]], scale.grid, scale.linear)
    for place, step, shade in zip(axes, steps, np.linspace(0.05, 0.8, len(steps)), strict=True):
        draw_density(
            place,
            Panel("", parts[step], Look("", "", colormaps["viridis"](shade), "")),
            scale,
            width=width_of(5.5) - 0.7,
        )
        if step != steps[0]:
            below = scale.floor / 10
            place.plot(
                scale.grid,
                np.maximum(first, below),
                color="0.35",
                linestyle=(0, (3, 2)),
                linewidth=0.6,
            )
        mark_eigenvalues(place, parts[step], colour="0.2")
        place.set_title(stage_title(step, labels), loc="right", y=0.72)
    figure.supylabel(
        "spectral density (no unit)" if normalised else in_units_of(DENSITY, parts),
        fontsize="medium",
    )
    axes[-1].set_xlabel(
        "eigenvalue / 10th largest eigenvalue (no unit)"
        if normalised
        else in_units_of(EIGENVALUE, parts)
    )
    note = (
        f" ({len(steps)} of {len(spectra_by_step)} stages)"
        if len(steps) < len(spectra_by_step)
        else ""
    )
    called = "full spectrum" if block == "model" else f"spectrum of {block}"
    marks = "marks: converged eigenvalues"
    if len(steps) > 1:
        marks += f"; dashed: {stage_title(steps[0], labels)}"
    lines = [f"{matrix_name(parts)}: {called}{note}", marks, smoothing_note(parts.values())]
    figure.suptitle("\n".join(lines))
    return figure


def tenth_largest(spectrum: Spectrum) -> float:
    """The 10th largest Ritz value, the largest over probes: the 10th largest eigenvalue, once it
    has converged.

    Raises:
        ValueError: It cannot be told: fewer than 10 values, eigenvalues that may be repeated, or a
            value <= 0.
    """
    if not spectrum.reorthogonalized:
        raise ValueError(
            "the 10th largest eigenvalue needs reorthogonalize=True: without it eigenvalues are "
            "repeated"
        )
    rows = [
        np.sort(nodes[weights > 0])[::-1]
        for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True)
    ]
    values = [float(row[9]) for row in rows if len(row) >= 10]
    if not values:
        raise ValueError(
            "the 10th largest eigenvalue needs at least 10 Lanczos steps, got "
            f"{max(map(len, rows))}"
        )
    if max(values) <= 0:
        raise ValueError(
            f"the 10th largest Ritz value is {max(values):.3g}, not positive: take more Lanczos "
            "steps"
        )
    return max(values)


def divided(spectrum: Spectrum, unit: float) -> Spectrum:
    """The spectrum with eigenvalues in that unit, which is positive."""
    lengths = {
        name: getattr(spectrum, name) / unit for name in ("nodes", "residuals", "steps_error")
    }
    if spectrum.apart is not None:  # a mixture
        lengths["apart"] = spectrum.apart / unit
    sample = spectrum.sample
    if sample is not None:
        sample = replace(sample, nodes=sample.nodes / unit)
    return replace(spectrum, **lengths, sample=sample)


@styled
def full_and_block_diagonal(spectra: Spectra, *, full: str = "model") -> Figure:
    """The spectrum of the full matrix, and over it the one that it would have if it were block
    diagonal.
    """
    whole, mixture = spectra[full], block_diagonal(spectra.select(exclude=full))
    scale = scale_of([whole])
    figure = canvas(figsize=(width_of(5.5), 3.3), layout="constrained")
    axes = figure.subplots()
    draw_density(
        axes, Panel("", whole, Look("", "", "#777777", "")), scale, width=width_of(5.5) - 0.7
    )
    axes.lines[0].set_label(f"full: {_ends(whole)}")
    label = f"block diagonal, {len(spectra) - 1} blocks: {_ends(mixture)}"
    mean, error = resolved_density(mixture, scale.grid, scale.linear, like=whole)
    draw_line(axes, scale, mean, error, colour="#AA3377", linestyle=(0, (4, 1.5)), label=label)
    axes.set_xlabel(in_units_of(EIGENVALUE, spectra))
    axes.set_ylabel(in_units_of(DENSITY, spectra))
    figure.legend(loc="outside lower center")
    figure.suptitle(
        f"{matrix_name(spectra)}: full, and block diagonal at the same "
        f"resolution\n{smoothing_note([whole])}"
    )
    return figure


def _ends(spectrum: Spectrum) -> str:
    ends = f"{spectrum.smallest.value:.3g} to {spectrum.largest.value:.3g}"
    return f"eigenvalues from {ends.replace('-', chr(0x2212))}"


@styled
def edges_by_block(
    spectra: Mapping[str, Spectrum],
    *,
    max_blocks: int = 60,
    thresholds: Mapping[str, float] | None = None,
) -> Figure:
    """Smallest, mean and largest eigenvalue of each block: how different the blocks are, at a
    glance.

    Bars are residuals of the extreme Ritz values and the standard error of the mean, both with the
    error of the data. Of models with
    more than ``max_blocks`` blocks, the blocks of one kind in one layer share a line, and evenly
    spread layers are drawn.

    Args:
        spectra: Of all blocks.
        max_blocks: Lines at most.
        thresholds: Label -> eigenvalue where a dashed line stands, such as the edge of stability:
            ``{t.label: t.value for t in blockspec.stability_thresholds(optimizer)}``.
    """
    panels, note = _lines(spectra, max_blocks)
    table = edges(panels)
    figure = canvas(
        figsize=(width_of(5.5), points(0.135) * len(panels) + 1.2), layout="constrained"
    )
    axes = figure.subplots()
    colours = [panel.look.colour for panel in panels]
    axes.hlines(
        range(len(panels)),
        table["smallest"],
        table["largest"],
        colors=colours,
        linewidth=0.8,
        alpha=0.6,
    )
    for column, (marker, filled, label) in EDGES.items():
        _edge_markers(axes, table, column, colours, marker, filled)
        axes.plot(
            [],
            [],
            marker,
            color="0.2",
            markerfacecolor="0.2" if filled else "white",
            markersize=3.5,
            label=label,
        )
    axes.set_yticks(range(len(panels)), [panel.title for panel in panels], fontsize=points(6.5))
    axes.set_ylim(len(panels) - 0.4, -0.6)
    axes.axvline(0, color="0.7", linewidth=0.5, zorder=0)
    for label, value in (thresholds or {}).items():
        axes.axvline(value, color="0.2", linewidth=0.8, linestyle=(0, (4, 2)), label=label)
    axes.grid(axis="x", color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    _edge_scale(axes, table, (thresholds or {}).values())
    axes.set_xlabel(in_units_of(EIGENVALUE, spectra))
    axes.set_ylabel("block")
    figure.legend(loc="outside lower center", ncols=3 if width_of(5.5) > 5 else 2)
    figure.suptitle(
        f"{matrix_name(spectra)}: eigenvalues of each block{note}\n"
        "bars: total errors, of estimate and data, as far as known"
    )
    return figure


EDGES = {
    "smallest": ("<", True, "smallest"),
    "mean": ("o", False, "mean (trace / parameters)"),
    "largest": (">", True, "largest"),
}
"""Column of the table of edges -> marker, whether it is filled, and its name in the legend."""


def _edge_markers(
    axes: Axes, table: pd.DataFrame, column: str, colours: Sequence[str], marker: str, filled: bool
) -> None:
    rows, errors = range(len(table)), table[f"{column}_error"].fillna(0)
    axes.errorbar(table[column], rows, xerr=errors, fmt="none", ecolor="0.2", elinewidth=0.8)
    for row, value, colour in zip(rows, table[column], colours, strict=True):
        axes.plot(
            value,
            row,
            marker,
            color=colour,
            markerfacecolor=colour if filled else "white",
            markersize=3.5,
        )


def edges(panels: Sequence[Panel]) -> pd.DataFrame:
    """A row a panel: smallest, mean and largest eigenvalue, each with its error (nan where it
    cannot be known): residual or standard error over probes, and the data's.
    """
    columns = ("smallest", "smallest_error", "mean", "mean_error", "largest", "largest_error")
    parts = [p.spectrum for p in panels]
    rows = [(*_edge(s.smallest), *_edge(s.moment(1)), *_edge(s.largest)) for s in parts]
    return pd.DataFrame(rows, columns=columns).astype(float)


def _edge(found: Estimate | RitzValue) -> tuple[float, float]:
    """A value and its total error."""
    value, error, data_error = found
    return value, math.nan if error is None else math.hypot(error, data_error or 0.0)


def _lines(spectra: Mapping[str, Spectrum], max_blocks: int) -> tuple[list[Panel], str]:
    """A panel for each line of the figure, and what the title says of what is left out."""
    if not spectra:
        raise ValueError("no spectra to draw: the mapping is empty")
    layers = sorted({s.block.layer for s in spectra.values() if s.block.layer is not None})
    cells = [{name: spectrum} for name, spectrum in spectra.items()]
    if len(cells) > max_blocks:
        cells = list(_cells(spectra, by_layer=True).values())
    chosen = layers
    shown = cells
    while len(shown) > max_blocks and len(chosen) > 2:
        chosen = spread(layers, len(chosen) - 1)
        shown = [cell for cell in cells if next(iter(cell.values())).block.layer in (None, *chosen)]
    note = (
        f" (layers {', '.join(map(str, chosen))} of {len(layers)})"
        if len(chosen) < len(layers)
        else ""
    )
    names = short_names(spectra)
    return [panel_of(cell, names) for cell in shown], note


def _edge_scale(axes: Axes, table: pd.DataFrame, lines: Iterable[float] = ()) -> None:
    sizes = table[["smallest", "mean", "largest"]].abs().to_numpy()
    norm = float(sizes.max()) or 1.0
    linear = max(float(np.quantile(sizes[sizes > 0], 0.1)) if sizes.any() else 1.0, norm * 1e-8)
    ends = np.array([min(0.0, table["smallest"].min()), max(0.0, table["largest"].max(), *lines)])
    low, high = linear * np.sinh(np.arcsinh(ends / linear) + np.array([-0.6, 0.6]))
    eigenvalue_axis(axes, "x", low, high, linear, room=points(0.11) * 5.5 / width_of(5.5))
