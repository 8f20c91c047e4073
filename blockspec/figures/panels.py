"""Panels of spectral densities: the scale that several share, and a density with its error band on
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from blockspec.figures.page import points
from blockspec.figures.style import Look, column_of, eigenvalue_axis, look, short_name, spread
from blockspec.model.pieces import FULL
from blockspec.spectra.collection import block_diagonal
from blockspec.spectra.resolved import even_grid, resolution, resolved_density, resolved_mean
from blockspec.spectra.spectrum import Spectrum

EIGENVALUE = "eigenvalue (loss / parameter²)"
DENSITY = "spectral density (parameter² / loss)"
CONVERGED = 0.01  # residual of a node, relative to its value, that is marked as an eigenvalue
MOST_CURVES = 12  # in a panel
DECADES = 6  # of eigenvalues on each side of zero, at most
SPAN = 1e10  # of densities, at most


@dataclass(frozen=True)
class Panel:
    """One small multiple: a spectrum; of several blocks their mixture by number of parameters, and
    beside it the blocks whose curves are drawn over each other.
    """

    title: str
    spectrum: Spectrum
    look: Look
    parts: tuple[Spectrum, ...] = ()

    @property
    def curves(self) -> tuple[Spectrum, ...]:
        return self.parts or (self.spectrum,)


@dataclass(frozen=True)
class Scale:
    """Axes that several spectra share: eigenvalues from ``low`` to ``high``, even on asinh(x /
    linear); densities.
    """

    low: float
    high: float
    linear: float
    floor: float
    top: float

    @property
    def grid(self) -> np.ndarray:
        return even_grid(self.low, self.high, self.linear)


def scale_of(spectra: Iterable[Spectrum]) -> Scale:
    """Axes that show every spectrum from its bulk to its outliers, as far as ``DECADES`` and
    ``SPAN`` allow.
    """
    parts = list(spectra)
    norm = max(part.norm for part in parts) or 1.0
    resolutions = [resolution(part) for part in parts if not part.is_zero] or [1.0]
    linear = max(float(np.quantile(resolutions, 0.25)), norm / 10**DECADES)
    ends = np.array(
        [min(part.nodes.min() for part in parts), max(part.nodes.max() for part in parts)]
    )
    low, high = linear * np.sinh(np.arcsinh(ends / linear) + np.array([-1.0, 1.0]))
    low, high = min(low, -linear), max(high, linear)
    grid = even_grid(low, high, linear)
    top = 3 * max(float(resolved_mean(part, grid, linear).max()) for part in parts)
    single = 1 / (
        norm * max(part.block.numel for part in parts)
    )  # about the density of one eigenvalue at the edge
    return Scale(low, high, linear, max(single, top / SPAN), top)


def draw_density(axes: Axes, panel: Panel, scale: Scale, *, width: float) -> None:
    """The density with its error band, filled; ``width`` is that of the axes in inches.

    Several blocks are a thin curve each: a mixture would hide how they differ.
    """
    colour, curves = panel.look.colour, panel.curves
    thin = {"linewidth": 0.5} if len(curves) > 1 else {}
    for curve in curves:
        mean, error = resolved_density(curve, scale.grid, scale.linear)
        shown = np.maximum(mean, scale.floor)
        axes.fill_between(
            scale.grid, scale.floor, shown, color=colour, alpha=0.15 / len(curves), linewidth=0
        )
        draw_line(axes, scale, mean, error if not thin else 0 * error, colour=colour, **thin)
    density_axes(axes, scale, width=width)


def draw_line(
    axes: Axes, scale: Scale, mean: np.ndarray, error: np.ndarray, *, colour: Any, **line: Any
) -> None:
    below = scale.floor / 10  # off the axis, and positive for its logarithm
    low, high = (np.maximum(mean + sign * error, below) for sign in (-1, 1))
    axes.fill_between(scale.grid, low, high, color=colour, alpha=0.35, linewidth=0)
    axes.plot(scale.grid, np.maximum(mean, below), color=colour, **line)


def density_axes(axes: Axes, scale: Scale, *, width: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(scale.floor, scale.top)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    eigenvalue_axis(axes, "x", scale.low, scale.high, scale.linear, room=points(0.32) / width)


def mark_eigenvalues(axes: Axes, spectrum: Spectrum, *, colour: Any) -> None:
    """Short lines on the axis at the nodes that have converged."""
    nodes = spectrum.nodes[
        (spectrum.residuals < CONVERGED * np.abs(spectrum.nodes)) & (spectrum.weights > 0)
    ]
    height, along = np.full(nodes.shape, 0.03), axes.get_xaxis_transform()
    axes.plot(nodes, height, "|", color=colour, transform=along, markersize=5, markeredgewidth=0.5)


def panel_of(
    parts: Mapping[str, Spectrum], names: Mapping[str, str], *, by_kind: bool = False
) -> Panel:
    """A panel of one block, called by its short name in ``names`` or by its kind, or of several:
    curves of evenly spread ones where there are more than ``MOST_CURVES``.
    """
    first = next(iter(parts))
    kind = column_of(parts[first].block)
    shown = look(kind)
    if len(parts) > 1:
        layers = {part.block.layer for part in parts.values()}
        layer = (
            short_name(first).split(".")[0] + " "
            if not by_kind and layers.isdisjoint({None}) and len(layers) == 1
            else ""
        )
        drawn = tuple(spread(list(parts.values()), MOST_CURVES))
        number = f"{len(parts)}" if len(drawn) == len(parts) else f"{len(drawn)} of {len(parts)}"
        title = f"{layer}{shown.label} ({number} blocks)"
        return Panel(title, block_diagonal(parts), shown, drawn)
    return Panel(shown.label if by_kind or kind == FULL else names[first], parts[first], shown)


def label_outer(axes: np.ndarray) -> None:
    """Tick labels for the lowest panel of each column and the first of each row, also where the
    grid has holes.
    """
    for column in axes.T:
        for place in [place for place in column if place.axison][-1:]:
            place.tick_params(labelbottom=True)
    for row in axes:
        for place in [place for place in row if place.axison][:1]:
            place.tick_params(labelleft=True)


def smoothing_note(spectra: Iterable[Spectrum]) -> str:
    """What a reader must know to read the curves: the second line of a title."""
    parts = [spectrum for spectrum in spectra if not spectrum.exact]
    if not parts:
        return "exact eigenvalues, smoothed"
    probes, steps = (
        min(part.num_probes for part in parts),
        max(int(part.steps.max()) for part in parts),
    )
    return f"{_band(parts, probes)}a flat top is what {steps} Lanczos steps do not resolve"


def _band(parts: Sequence[Spectrum], probes: int) -> str:
    """Which errors the band holds, in words."""
    with_data = all(part.sample is not None for part in parts)
    held = [f"{probes} probes"] * (probes > 1) + [f"{parts[0].units} units of data"] * with_data
    return f"band: ± 1 standard error over {' and '.join(held)}; " if held else ""
