"""The error of a spectrum that comes from the data: the batches are a sample of what the loss is
meant to be the mean over.

A :class:`Sample` holds what a block's spectrum would be without each group of data. Any number that
is read off spectra is then computed again without each group, which is a jackknife. The distance
between the spectrum of the sample and that of the population is played through: the distribution
functions without each group span the directions in which it may lie, and random combinations of
them have the covariance that the jackknife gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from blockspec.numerics.jackknife import FEWEST_UNITS

CELLS = 512  # between which distribution functions are compared
DRAWS = 1000  # of random combinations: the level that is found is then 0.95 +- 0.007
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Sample:
    """Quadratures without each of n groups of data, place by place beside those of the spectrum.

    Attributes:
        nodes: (n, K, M) in the order of the spectrum's nodes; K may be 1 where all rows are equal.
        weights: (n, K, M).
    """

    nodes: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def known(self) -> bool:
        """Whether there are enough groups for an error."""
        return len(self) >= FEWEST_UNITS

    def distance(self, nodes: np.ndarray, weights: np.ndarray) -> float | None:
        """The spectrum of the population is within this Wasserstein-1 distance of that of the
        sample, in 95 % of samples; None where there are too few groups.

        Args:
            nodes: (K, M) of the spectrum.
            weights: (K, M); each row sums to 1.
        """
        if not self.known:
            return None
        count = len(self)
        pooled = np.sort(np.concatenate([nodes.ravel(), self.nodes.ravel()]))
        places = np.linspace(0, len(pooled) - 1, min(CELLS, len(pooled))).round().astype(int)
        grid = np.unique(pooled[places])
        if len(grid) < 2:
            return 0.0
        found = np.stack(
            [_integrals(n, w, grid) for n, w in zip(self.nodes, self.weights, strict=True)]
        )
        centred = found - found.mean(0)
        drawn = np.random.default_rng(0).standard_normal((DRAWS, count))
        moved = math.sqrt((count - 1) / count) * drawn @ centred
        few = float(stdtrit(count - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2))
        return few * float(np.quantile(np.abs(moved).sum(1), LEVEL))


def _integrals(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(G - 1,) the integral of the distribution function over each cell of the grid."""
    order = np.argsort(nodes, axis=None)
    places = nodes.ravel()[order]
    below = np.cumsum(weights.ravel()[order]) / weights.sum()
    # the integral up to x is linear between nodes, zero before them and of slope 1 behind them
    integral = np.concatenate([[0.0], np.cumsum(below[:-1] * np.diff(places))])
    behind = np.maximum(grid - places[-1], 0.0)
    return np.diff(np.interp(grid, places, integral) + behind)
