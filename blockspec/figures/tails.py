"""Figures of tail counts: how many eigenvalues lie beyond x, both on logarithmic scales, block over
block.

They need no width of smoothing, so that nothing in them is invented: outliers and bulk stand on one
scale, and how far apart curves are is how different blocks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullFormatter, NullLocator

from blockspec.figures.page import inches, page, width_of
from blockspec.figures.stages import Labels, stage_title
from blockspec.figures.style import (
    Look,
    canvas,
    in_units_of,
    look,
    matrix_name,
    power_of_ten,
    spread,
    styled,
)
from blockspec.model.pieces import FULL
from blockspec.spectra.collection import Spectra, block_diagonal
from blockspec.spectra.spectrum import Spectrum
from blockspec.spectra.tails import SIDES, magnitudes_of, tail

COUNT, X = "eigenvalues beyond x (number)", "x (loss / parameter²)"
MOST_PIECES = 12  # heads, experts or neurons of one matrix that are drawn
MOST_BANDS = 24  # curves in a panel; of more, bands would cover each other
LOWEST = 0.7  # of the axis of numbers: a single eigenvalue is seen
ROUNDING = 1e-5  # of the norm: negative nodes of a positive semidefinite matrix are that small
PANEL_HEIGHT = 1.25  # inches
STAGE_MARKERS = "osD^vP*Xd<>h"


@dataclass(frozen=True)
class Curve:
    """One block on a panel."""

    spectrum: Spectrum
    look: Look


@dataclass(frozen=True)
class Field:
    """The axes that all panels share: magnitudes (G,), the sides of zero, the largest number."""

    magnitudes: np.ndarray
    sides: tuple[str, ...]
    most: int


@styled
def tails_by_block(
    spectra: Mapping[str, Spectrum], *, columns: float = 1, max_layers: int = 4
) -> Figure:
    """Tail counts of the blocks, those of one layer laid over each other.

    The left half of a panel has the negative side, the right half the positive one. A curve that
    ends further out has larger eigenvalues, one that lies higher has more of them. Bands hold the
    true number with 95 % confidence; see :func:`blockspec.spectra.tails.tail`.

    Args:
        spectra: By name of the block.
        columns: Width of the figure in columns of a paper, 1 or 2.
        max_layers: Evenly spread layers are drawn where there are more.
    """
    panels, note = _panels(spectra, max_layers)
    return _figure(panels, f"{matrix_name(spectra)}: eigenvalues of each block{note}", columns)


@styled
def tails_of_full(
    spectra_by_step: Mapping[int, Spectra],
    *,
    block: str = "model",
    columns: float = 1,
    max_stages: int = 6,
    labels: Labels | None = None,
) -> Figure:
    """Tail counts of one block at stages of training, laid over each other; for the full matrix,
    below them, the last stage beside the spectrum that it would have if it were block diagonal.

    Args:
        spectra_by_step: Of each stage.
        block: Its name; ``model`` is the full matrix.
        columns: Width of the figure in columns of a paper, 1 or 2.
        max_stages: Evenly spread stages are drawn where there are more.
        labels: What the stages are called, where their training steps are not known.
    """
    steps = spread(sorted(spectra_by_step), max_stages)
    if not steps:
        raise ValueError("no stages to draw: the mapping is empty")
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(steps)))
    stages = [
        Curve(spectra_by_step[step][block], Look(stage_title(step, labels), "", shade, marker))
        for step, shade, marker in zip(steps, shades, STAGE_MARKERS, strict=False)
    ]
    last = spectra_by_step[steps[-1]]
    called = "full spectrum" if last[block].block.kind == FULL else f"spectrum of {block}"
    several = "all stages" if labels else "along training"
    panels = {several if len(steps) > 1 else "": stages}
    if last[block].block.kind == FULL and len(last) > 1:
        mixture = block_diagonal(last.parts)
        panels[f"last {'stage' if labels else 'step'}" if len(steps) > 1 else ""] = [
            Curve(last[block], look(FULL)),
            Curve(mixture, Look("if block diagonal", "", "#AA3377", "s")),
        ]
    return _figure(panels, f"{matrix_name(last)}: {called}", columns)


def _figure(panels: Mapping[str, Sequence[Curve]], title: str, columns: float) -> Figure:
    columns = page().columns or columns
    field = _field([curve.spectrum for curves in panels.values() for curve in curves])
    per_row = 2 if columns > 1 and len(panels) > 1 else 1
    rows = -(-len(panels) // per_row)
    figure = canvas(
        figsize=(width_of(inches(columns)), PANEL_HEIGHT * rows + 1.3), layout="constrained"
    )
    axes = figure.subplots(
        rows, per_row * len(field.sides), sharex="col", sharey=True, squeeze=False
    ).reshape(rows * per_row, -1)
    for place in axes[len(panels) :].flat:
        place.set_axis_off()
    for places, (name, curves) in zip(axes, panels.items(), strict=False):
        _panel(list(places), name, curves, field)
    x = in_units_of(X, {"": next(iter(panels.values()))[0].spectrum})
    _labels(figure, axes[: len(panels)], per_row, x)
    _legend(figure, (curve for curves in panels.values() for curve in curves), columns)
    figure.suptitle(f"{title}\n{_band_note(panels)}")
    return figure


def _panels(spectra: Mapping[str, Spectrum], max_layers: int) -> tuple[dict[str, list[Curve]], str]:
    """Title -> curves, and what the title of the figure says of what is left out."""
    if not spectra:
        raise ValueError("no spectra to draw: the mapping is empty")
    layers = sorted({s.block.layer for s in spectra.values() if s.block.layer is not None})
    chosen = spread(layers, max_layers)
    panels: dict[str, list[Curve]] = {}
    shown = _few_pieces(spectra)
    for name in shown:
        spectrum = spectra[name]
        layer = spectrum.block.layer
        if layer is None or layer in chosen:
            title = f"layer {layer}" if layer is not None else "outside layers" if layers else ""
            panels.setdefault(title, []).append(Curve(spectrum, look(spectrum.block.role)))
    if outside := panels.pop("outside layers", []):  # last, wherever they stand in the model
        panels["outside layers"] = outside
    notes = []
    if len(chosen) < len(layers):
        notes.append(f"layers {', '.join(map(str, chosen))} of {len(layers)}")
    if len(shown) < len(spectra):
        notes.append(f"at most {MOST_PIECES} pieces of a matrix")
    return panels, f" ({'; '.join(notes)})" if notes else ""


def _few_pieces(spectra: Mapping[str, Spectrum]) -> list[str]:
    """The names, of each matrix at most ``MOST_PIECES``, evenly spread."""
    families: dict[tuple[str, str], list[str]] = {}
    for name, spectrum in spectra.items():
        families.setdefault((name.split("/")[0], spectrum.block.kind), []).append(name)
    kept = {name for family in families.values() for name in spread(family, MOST_PIECES)}
    return [name for name in spectra if name in kept]


def _field(spectra: Sequence[Spectrum]) -> Field:
    norm = max(spectrum.norm for spectrum in spectra)
    some_negative = any(s.nodes.min() < -ROUNDING * max(s.norm, norm * 1e-9) for s in spectra)
    sides = ("negative", "positive") if some_negative else ("positive",)
    most = max(spectrum.block.numel for spectrum in spectra)
    return Field(magnitudes_of(spectra), sides, most)


def _panel(places: Sequence[Axes], title: str, curves: Sequence[Curve], field: Field) -> None:
    for side, axes in zip(field.sides, places, strict=True):
        for curve in curves:
            _draw(axes, curve, side, field, band=len(curves) <= MOST_BANDS)
        _axis(axes, side, field)
    places[0].set_title(title, loc="left", pad=2)


def _draw(axes: Axes, curve: Curve, side: str, field: Field, *, band: bool, **line: Any) -> None:
    """The curve from where the block is resolved to its last eigenvalue, which has a marker."""
    spectrum, colour = curve.spectrum, curve.look.colour
    end = float((SIDES[side] * spectrum.nodes).max())
    if spectrum.is_zero or end <= 0:
        return
    grid = field.magnitudes[field.magnitudes >= magnitudes_of([spectrum])[0]]
    counts = tail(spectrum, grid, side)
    drawn = counts.count > 0
    below = LOWEST / 10  # off the axis, and positive for its logarithm
    axes.step(grid[drawn], counts.count[drawn], where="post", color=colour, zorder=2.5, **line)
    if band:
        low, high = (np.maximum(counts_at, below) for counts_at in (counts.low, counts.high))
        axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0, step="post")
    if end >= grid[0]:
        tip = [max(1.0, counts.count[drawn][-1])] if drawn.any() else [1.0]
        axes.plot(
            [end],
            tip,
            curve.look.marker,
            color=colour,
            markersize=3,
            clip_on=False,
            zorder=3,
        )


def _axis(axes: Axes, side: str, field: Field) -> None:
    low, high = field.magnitudes[[0, -1]]
    axes.set_xscale("log")
    axes.set_xlim((low, high) if side == "positive" else (high, low))  # as on the line of numbers
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 1.5 * field.most)
    powers = np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    stride = -(-len(powers) // 4)
    ticks = [10.0**e for e in powers if (e - powers[-1]) % stride == 0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(
        FixedFormatter([power_of_ten(SIDES[side] * tick) for tick in ticks])
    )
    axes.xaxis.set_minor_locator(FixedLocator([10.0**e for e in powers]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="0.92", linewidth=0.4)
    axes.set_axisbelow(True)
    if side == "negative":
        axes.spines["right"].set_visible(False)


def _labels(figure: Figure, axes: np.ndarray, per_row: int, x: str) -> None:
    for places in axes[-per_row:]:
        for place in places:
            place.set_xlabel(x)
            place.tick_params(labelbottom=True)
    for places in axes[1::2] if per_row == 2 else []:
        places[0].tick_params(labelleft=False)
    figure.supylabel(COUNT, fontsize="medium")


def _legend(figure: Figure, curves: Iterable[Curve], columns: float) -> None:
    kinds = {curve.look.label: curve.look for curve in curves}
    handles = [
        Line2D([], [], color=shown.colour, marker=shown.marker, markersize=3, label=shown.label)
        for shown in kinds.values()
    ]
    beside = 3 if columns <= 1 else 6
    figure.legend(handles=handles, loc="outside lower center", ncols=beside, handlelength=1.2)


def _band_note(panels: Mapping[str, Sequence[Curve]]) -> str:
    spectra = [curve.spectrum for curves in panels.values() for curve in curves]
    samples = [spectrum.sample for spectrum in spectra]
    if all(sample is not None and sample.known for sample in samples):
        return "bands: 95 %, of steps, probes and data"
    if all(spectrum.exact for spectrum in spectra):
        return "all of them computed: nothing is estimated"
    return "bands: 95 %, for the given batches"
