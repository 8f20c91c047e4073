"""Tail counts: how many eigenvalues lie beyond x, with a band that holds the true number.

Lanczos quadrature estimates how eigenvalues are distributed, not a density, so the count needs no
width of smoothing. Three things are known about it, and the band is made of them.

A probe sees the spectrum as a measure, and its nodes and weights are a quadrature of that measure.
The share of a node lies between its two neighbours (the inequalities of Chebyshev, Markov and
Stieltjes), and once the node has converged, no further from it than its residual. To move every
share outwards as far as it may go, or inwards, gives two curves with the probe's measure between.

The measure of a probe is not the spectrum. But a Gaussian probe gives n of P eigenvalues a share
that has a beta distribution, whatever the eigenvalues are. So a share tells between which numbers n
lies, with a single probe too.

Around each Ritz value, no further than its residual, lies an eigenvalue. Intervals that do not
overlap hold different eigenvalues. Their number is a lower bound without any chance in it.

Other data would move the nodes. Where the spectrum knows how far (a jackknife over groups of data),
every share may lie that much further from its node, and the band holds the number of the
population.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import betaincinv, stdtrit

from blockspec.numerics.jackknife import jackknife_errors
from blockspec.numerics.measures import SAME
from blockspec.spectra.spectrum import Spectrum

SIDES = {"positive": 1.0, "negative": -1.0}
OUTSIDE = 0.025  # of the probability, on each side of the band
LEVELS = (
    80  # numbers of eigenvalues whose shares are tabulated; between them interpolation is linear
)


@dataclass(frozen=True, eq=False)
class Tail:
    """Numbers of eigenvalues beyond each of G magnitudes, on one side of zero.

    Args:
        magnitudes: (G,) positive, in units of an eigenvalue.
        count: (G,) the estimate: never below the number that is certain.
        low, high: (G,) at each magnitude, the true number lies between these with at least 95 %
            confidence. (Each point alone: a curve of many points may leave the band somewhere.)
        of_population: Whether the true number is that of the population of the data; else it is
            that of the given batches.
    """

    magnitudes: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray
    of_population: bool = False


def tail(
    spectrum: Spectrum, magnitudes: np.ndarray, side: str = "positive", *, data: bool = True
) -> Tail:
    """How many eigenvalues are larger than x, or on the negative side smaller than -x.

    Args:
        spectrum: Of one block, or a mixture.
        magnitudes: (G,) the values of x, all positive.
        side: ``"positive"`` or ``"negative"``.
        data: Let the band hold the number of the population, where the error of the data is known.
    """
    if side not in SIDES:
        raise ValueError(f"side is one of {tuple(SIDES)}, got {side!r}")
    if np.min(magnitudes, initial=np.inf) <= 0:
        raise ValueError(f"magnitudes are positive numbers, got {np.min(magnitudes)}")
    nodes = SIDES[side] * spectrum.nodes
    moved = _moved_by_data(spectrum) if data else None
    down, up = (reach if moved is None else np.hypot(reach, moved) for reach in _reach(spectrum))
    if side == "negative":
        down, up = up, down
    certain = _certain(nodes, spectrum, magnitudes, 0.0 if moved is None else moved)
    low, count, high = (
        _beyond(at, spectrum.weights, spectrum.known, magnitudes)
        for at in (nodes - down, nodes, nodes + up)
    )
    numel = spectrum.block.numel
    rest = numel * float(spectrum.weights[~spectrum.known].sum()) / spectrum.num_probes
    low = numel * low[0] + _numbers(low[1] * numel, rest, spectrum.num_probes)[0]
    high = numel * high[0] + _numbers(high[1] * numel, rest, spectrum.num_probes)[1]
    count = numel * count.sum(0)
    high = np.clip(high, certain, numel)
    low = np.maximum(low, certain)
    return Tail(magnitudes, np.clip(count, certain, high), low, high, moved is not None)


def _reach(spectrum: Spectrum) -> tuple[np.ndarray, np.ndarray]:
    """(K, M) how far below a node, and how far above it, its share may lie: up to the neighbour,
    and no further than the residual.
    """
    if spectrum.apart is not None:  # a mixture: the neighbours in a row are of other blocks
        reach = np.minimum(spectrum.residuals, spectrum.apart)
        return reach, reach
    down, up = spectrum.residuals.copy(), spectrum.residuals.copy()
    for row, noisy in enumerate((spectrum.weights > 0) & ~spectrum.known):
        places = np.flatnonzero(noisy)
        gaps = np.diff(spectrum.nodes[row, places])
        up[row, places[:-1]] = np.minimum(up[row, places[:-1]], gaps)
        down[row, places[1:]] = np.minimum(down[row, places[1:]], gaps)
    return down, up


def _moved_by_data(spectrum: Spectrum) -> np.ndarray | None:
    """(K, M) how far other data of that size may move each node, 95 %; None if it is not known."""
    sample = spectrum.sample
    if sample is None or not sample.known:
        return None
    changes = sample.nodes.astype(np.float64)
    error = jackknife_errors(np.zeros(changes.shape[1:]), changes)
    return np.broadcast_to(stdtrit(len(sample) - 1, 1 - OUTSIDE) * error, spectrum.nodes.shape)


def _beyond(
    places: np.ndarray, weights: np.ndarray, known: np.ndarray, magnitudes: np.ndarray
) -> np.ndarray:
    """(2, G) shares that lie beyond each magnitude, mean over probes: of the known eigenvalues, and
    of the rest.
    """
    order = np.argsort(places, axis=None)
    places, weights, known = (a.ravel()[order] for a in (places, weights / len(places), known))
    shares = np.stack([np.where(known, weights, 0.0), np.where(known, 0.0, weights)])
    above = np.concatenate([np.cumsum(shares[:, ::-1], axis=1)[:, ::-1], np.zeros((2, 1))], axis=1)
    return above[:, np.searchsorted(places, magnitudes, side="right")]


def _numbers(seen: np.ndarray, numel: float, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of ``numel`` eigenvalues that ``probes`` probes are likely
    to see as ``seen`` (G,): smaller and larger ones have a chance of ``OUTSIDE`` each.
    """
    some = seen > 0
    if not some.any():
        return np.zeros(len(seen)), np.zeros(len(seen))
    numbers, least, largest = _shares(numel, probes)
    seen = np.log(np.where(some, seen / numel, 1.0))
    low = np.exp(np.interp(seen, largest, numbers)) * some  # at least 1 where there is a share
    return low, np.exp(np.interp(seen, least, numbers)) * some


@lru_cache(maxsize=256)
def _shares(numel: float, probes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithms of numbers of eigenvalues, 1 to numel, and of the shares that they hardly ever
    have less, or more, than.
    """
    numbers = np.geomspace(1, max(numel, 1.0), LEVELS)
    a, b = numbers * probes / 2, np.maximum(numel - numbers, 1e-9) * probes / 2
    shares = [betaincinv(a, b, p) for p in (OUTSIDE, 1 - OUTSIDE)]
    least, largest = (np.log(np.maximum(share, np.finfo(float).tiny)) for share in shares)
    return np.log(numbers), least, largest


def _certain(
    nodes: np.ndarray, spectrum: Spectrum, magnitudes: np.ndarray, moved: np.ndarray | float
) -> np.ndarray:
    """(G,) the number of eigenvalues that are certainly beyond each magnitude: of intervals around
    Ritz values that do not overlap.
    """
    used = spectrum.weights > 0
    reach = np.hypot(spectrum.residuals, moved)[used]
    reach += SAME / 2 * spectrum.norm  # what float32 may add
    lower, upper = nodes[used] - reach, nodes[used] + reach
    apart, last = [], np.inf
    for at in np.argsort(-lower):  # the one that begins furthest out first: none fits in more
        if upper[at] < last:
            last = lower[at]
            apart.append(last)
    ends = np.array(apart[::-1])
    return len(ends) - np.searchsorted(ends, magnitudes, side="right")


def quantiles(spectrum: Spectrum, levels: Sequence[float]) -> pd.DataFrame:
    """Quantiles of the magnitudes of the eigenvalues: below which |eigenvalue| a share lies.

    Args:
        spectrum: Of one block, or a mixture.
        levels: Shares, from 0 to 1; 0.5 is the median and 1 the largest magnitude.

    Returns:
        A row a level: value, low, high in units of an eigenvalue. The true one lies between low and
        high with at least 95 % confidence. A level of which less than half an eigenvalue lies above
        is that of the largest magnitude.
    """
    if not 0 <= min(levels) <= max(levels) <= 1:
        raise ValueError(f"levels are shares from 0 to 1, got {list(levels)}")
    if spectrum.is_zero:
        return pd.DataFrame(0.0, index=list(levels), columns=["value", "low", "high"])
    grid = magnitudes_of([spectrum])
    sides = [tail(spectrum, grid, side) for side in SIDES]
    above = (1 - np.asarray(levels)) * spectrum.block.numel
    # the true one lies between two points of the grid: below it for low, above it for high
    lower, upper = np.append(0.0, grid), np.concatenate([[0.0], grid[1:], grid[-1:]])
    found = {
        name: _where(ends, sum(getattr(one, field) for one in sides), above)
        for name, field, ends in (
            ("value", "count", np.sqrt(lower * upper)),
            ("low", "low", lower),
            ("high", "high", upper),
        )
    }
    return pd.DataFrame(found, index=list(levels))


def _where(ends: np.ndarray, counts: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The entry of ``ends`` (G + 1,) for the last of G magnitudes with more than so many
    eigenvalues beyond it; the first entry where there is none.
    """
    more = counts[None] > np.maximum(above, 0.5)[:, None]  # counts fall along the grid
    return ends[more.sum(1)]


def magnitudes_of(
    spectra: Sequence[Spectrum], *, decades: float = 8, points: int = 500
) -> np.ndarray:
    """(points,) magnitudes, even on a logarithmic scale, from the smallest that a spectrum resolves
    to beyond the largest; ``decades`` at most.
    """
    largest = max(spectrum.norm for spectrum in spectra) or 1.0
    smallest = [
        float(np.quantile(np.abs(s.nodes[s.nodes != 0]), 0.02)) for s in spectra if not s.is_zero
    ]
    low = max(min(smallest, default=largest), largest / 10**decades)
    return np.geomspace(min(low, largest / 10), 1.5 * largest, points)
