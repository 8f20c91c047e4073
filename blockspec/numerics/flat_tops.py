"""Peaks of a density that may be noise are drawn as flat tops.

The idea. A probe gives an eigenvalue a random weight, so that a curve wavers around the true one.
How much is known: weights that mean one eigenvalue are chi-square variables, and a share w of P
eigenvalues has the variance 2 w / P in each probe. A peak next to a higher one counts where it
rises from the valley between by ``CLEAR`` standard errors of that rise. Else peak and valley
together become a stretch on which the curve is its own mean, as wide as it needs to be for both of
its ends to meet the curve (pool adjacent violators, Ayer et al. 1955). Wider kernels, which would
do the same, blur all that is around, and those whose width differs from place to place make peaks
of their own.

What is certain stays: an eigenvalue that Lanczos has resolved is there, however little weight
chance has given to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr

from blockspec.numerics.density import WIDTH, mixture

CLEAR = 2.5  # standard errors
LEAST_RISE = 1e-3  # of a peak's height: rounding, and no rise that an eye sees
UNRESOLVED = 0.1  # of its share: as closely as that of a node is known that has not converged
RESOLVED = 0.1  # residual, of the width of a node that stands for one eigenvalue
POINTS = 800  # where the curve is looked at, even on the scale asinh(x / linear)
REACH = 5.0  # widths beyond the nodes


def uncertain(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, linear: float, numel: float
) -> np.ndarray:
    """The variances of weights, of the same shape; 0 where an eigenvalue is resolved.

    A node that has not converged stands for all eigenvalues up to its neighbours. Few of them make
    waves on a flat bulk, near its ends, without any noise.
    """
    resolved = residuals <= RESOLVED * WIDTH * np.hypot(nodes, linear)
    return np.where(resolved, 0.0, 2 * weights / numel + (UNRESOLVED * weights) ** 2)


def flat_tops(
    nodes: np.ndarray,
    weights: np.ndarray,
    widths: np.ndarray,
    variances: np.ndarray,
    linear: float,
) -> np.ndarray:
    """(n, 2) ends of the stretches on which a sum of normal densities is no more than flat.

    Args:
        nodes, weights, widths, variances: Of one shape, those of all probes together.
        linear: Of the scale on which the curve is looked at.
    """
    some = weights > 0
    rows = nodes[some], weights[some], widths[some], variances[some]
    low, high = (nodes - REACH * widths).min(), (nodes + REACH * widths).max()
    places = np.linspace(np.arcsinh(low / linear), np.arcsinh(high / linear), POINTS)
    half = (places[1] - places[0]) / 2
    borders = linear * np.sinh(np.append(places - half, places[-1] + half))
    curve = _Curve(*rows, linear * np.sinh(places), borders)
    while (found := curve.weakest()) is not None:
        curve.flatten(*found)
    return np.array([(borders[start], borders[stop]) for start, stop in curve.stretches]).reshape(
        -1, 2
    )


def drawn(
    nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray, tops: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """(G,) sum of weighted normal densities, each with its own width, and on the stretches ``tops``
    (n, 2) its mean there.
    """
    density = mixture(nodes, weights, widths, grid)
    for ends in tops:
        inside = (grid >= ends[0]) & (grid <= ends[1])
        density[inside] = weights @ _means(nodes, widths, ends)
    return density


def _means(nodes: np.ndarray, widths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(N,) of each normal density over a stretch."""
    low, high = ((end - nodes) / widths for end in ends)
    return (ndtr(high) - ndtr(low)) / (ends[1] - ends[0])


@dataclass(eq=False)
class _Curve:
    """The density in cells around the points of a grid.

    Args:
        nodes, weights, widths, variances: (N,)
        grid, borders: (G,) and (G + 1,)
    """

    nodes: np.ndarray
    weights: np.ndarray
    widths: np.ndarray
    variances: np.ndarray
    grid: np.ndarray
    borders: np.ndarray
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """Of cells, first and behind the last one."""

    def __post_init__(self) -> None:
        self._cells = np.diff(self.borders)
        self._heights = mixture(self.nodes, self.weights, self.widths, self.grid)
        self._noise: dict[tuple[int, int], float] = {}

    def weakest(self) -> tuple[int, int] | None:
        """A peak and the valley beside it, from which it rises the least; None: all are clear."""
        least, found = 1.0, None
        for peak, valley in self._pairs():
            rise = self._heights[peak] - self._heights[valley]
            clear = CLEAR * self._error(peak, valley) + LEAST_RISE * self._heights[peak]
            if rise <= least * clear:
                least, found = rise / clear, (peak, valley)
        return found

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Each valley with the lower of the peaks beside it; of what is flat, the first cell."""
        kept = np.flatnonzero(np.append(True, np.diff(self._heights) != 0))
        rising = np.sign(np.diff(self._heights[kept]))
        peaks = np.flatnonzero((np.append(1, rising) > 0) & (np.append(rising, -1) < 0))
        for one, other in zip(kept[peaks[:-1]], kept[peaks[1:]], strict=True):
            lower = one if self._heights[one] <= self._heights[other] else other
            yield int(lower), int(one + np.argmin(self._heights[one : other + 1]))

    def _error(self, peak: int, valley: int) -> float:
        """Standard error of the rise."""
        key = peak, valley
        if key not in self._noise:
            difference = self._each(peak) - self._each(valley)
            self._noise[key] = float(np.sqrt(difference**2 @ self.variances))
        return self._noise[key]

    def _each(self, cell: int) -> np.ndarray:
        """(N,) the normal densities there."""
        for start, stop in self.stretches:
            if start <= cell < stop:
                return _means(self.nodes, self.widths, self.borders[[start, stop]])
        z = (self.grid[cell] - self.nodes) / self.widths
        return np.exp(-0.5 * z * z) / (self.widths * np.sqrt(2 * np.pi))

    def flatten(self, peak: int, valley: int) -> None:
        """Makes peak and valley one flat stretch, up to where the curve is lower beyond the peak,
        and higher beyond the valley.
        """
        start, stop = self._pooled(min(peak, valley), max(peak, valley) + 1, rises=peak > valley)
        apart = []
        for own, end in self.stretches:
            if own < stop and start < end:  # never a part of an older one
                start, stop = min(start, own), max(stop, end)
            else:
                apart.append((own, end))
        self.stretches = [*apart, (start, stop)]
        self._heights[start:stop] = self._mean(start, stop)
        self._noise = {
            pair: error
            for pair, error in self._noise.items()
            if not any(start <= cell < stop for cell in pair)
        }

    def _pooled(self, start: int, stop: int, *, rises: bool) -> tuple[int, int]:
        """``rises``: from the valley, at the start, to the peak."""
        sign = 1 if rises else -1
        while True:
            level = self._mean(start, stop)
            if start > 0 and sign * (level - self._heights[start - 1]) > 0:
                start -= 1
            elif stop < len(self._heights) and sign * (self._heights[stop] - level) > 0:
                stop += 1
            else:
                return start, stop

    def _mean(self, start: int, stop: int) -> float:
        cells = self._cells[start:stop]
        return float(self._heights[start:stop] @ cells / cells.sum())
