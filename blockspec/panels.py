"""Panels of spectral densities: the scale that several share, and a density with its error band on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from .spectra import Spectrum, block_diagonal
from .style import LN10, Look, eigenvalue_axis, look, short_name

EIGENVALUE = "eigenvalue (loss / parameter²)"
DENSITY = "share of eigenvalues per decade"
POINTS = 800  # of a curve; 10 to 20 a width of smoothing
LOWEST = 1e-6  # of the axis of densities: smaller shares are not resolved by a few probes
DECADES = 6  # on each side of zero, at most


@dataclass(frozen=True)
class Panel:
    """One small multiple: a spectrum; of several blocks their mixture by number of parameters."""

    title: str
    spectrum: Spectrum
    look: Look


@dataclass(frozen=True)
class Scale:
    """Axes that several spectra share."""

    low: float
    high: float
    linear: float
    floor: float
    top: float

    @property
    def grid(self) -> np.ndarray:
        return self.linear * np.sinh(np.linspace(*np.arcsinh(np.array([self.low, self.high]) / self.linear), POINTS))


def decade_density(spectrum: Spectrum, grid: np.ndarray, linear: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean (G,) and standard error (G,) over probes of the density per decade of the scale asinh(x / linear).

    Far from zero a decade is a factor of 10, around zero it is 2.3 * linear. The area under the curve as drawn is 1: a
    density per eigenvalue would show outliers that hold no weight as no more than a line, and the bulk as a spike.
    """
    densities = spectrum.densities(grid, linear=linear) * LN10 * np.hypot(grid, linear)
    probes = len(densities)
    error = densities.std(0, ddof=1) / math.sqrt(probes) if probes > 1 else np.zeros(len(grid))
    return densities.mean(0), error


def scale_of(spectra: Iterable[Spectrum]) -> Scale:
    """Axes that show every spectrum from its bulk to its outliers, as far as ``DECADES`` allow."""
    parts = list(spectra)
    norm = max(part.norm for part in parts) or 1.0
    linear = max(float(np.quantile([part.linear for part in parts if not part.is_zero] or [1.0], 0.25)), norm * 10.0**-DECADES)
    ends = np.array([min(0.0, *(part.nodes.min() for part in parts)), max(0.0, *(part.nodes.max() for part in parts))])
    low, high = linear * np.sinh(np.arcsinh(ends / linear) + np.array([-1.2, 1.2]))
    floor = max(min(1 / part.block.numel for part in parts), LOWEST)
    scale = Scale(low, high, linear, floor, 1.0)
    top = max(decade_density(part, scale.grid, linear)[0].max() for part in parts)
    return Scale(low, high, linear, floor, 2 * float(top))


def draw_density(axes: Axes, panel: Panel, scale: Scale, *, ticks: int = 3) -> None:
    """The density with its error band, filled."""
    mean, error = decade_density(panel.spectrum, scale.grid, scale.linear)
    axes.fill_between(scale.grid, scale.floor, np.maximum(mean, scale.floor), color=panel.look.colour, alpha=0.15, linewidth=0)
    draw_line(axes, scale, mean, error, colour=panel.look.colour)
    density_axes(axes, scale, ticks=ticks)


def draw_line(axes: Axes, scale: Scale, mean: np.ndarray, error: np.ndarray, *, colour: str, **line: object) -> None:
    low, high = (np.maximum(mean + sign * error, scale.floor / 10) for sign in (-1, 1))
    axes.fill_between(scale.grid, low, high, color=colour, alpha=0.35, linewidth=0)
    axes.plot(scale.grid, np.maximum(mean, scale.floor / 10), color=colour, **line)


def density_axes(axes: Axes, scale: Scale, *, ticks: int) -> None:
    axes.set_yscale("log")
    axes.set_ylim(scale.floor, scale.top)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    eigenvalue_axis(axes, "x", scale.low, scale.high, scale.linear, ticks=ticks)


def panel_of(parts: Mapping[str, Spectrum], *, by_kind: bool = False) -> Panel:
    """A panel of one block or of the mixture of several, called by name or by kind."""
    first = next(iter(parts))
    shown = look(first, parts[first].block.kind)
    if len(parts) > 1:
        layer = "" if by_kind or parts[first].block.layer is None else short_name(first).split(".")[0] + " "
        return Panel(f"{layer}{shown.label} ({len(parts)} blocks)", block_diagonal(parts), shown)
    return Panel(shown.label if by_kind or first == "model" else short_name(first), parts[first], shown)


def label_outer(axes: np.ndarray) -> None:
    """Tick labels for the lowest panel of each column and the first of each row, also where the grid has holes."""
    for column in axes.T:
        [place for place in column if place.axison][-1].tick_params(labelbottom=True)
    for row in axes:
        [place for place in row if place.axison][0].tick_params(labelleft=True)


def band_note(spectra: Iterable[Spectrum]) -> str:
    probes = {spectrum.num_probes for spectrum in spectra if not spectrum.exact}
    return f"; band: ± 1 standard error over {min(probes)} probes" if max(probes, default=1) > 1 else ""
