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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from blockspec.numerics.jackknife import FEWEST_UNITS

CELLS = 256  # between which distribution functions are compared
DRAWS = 400  # of random combinations: the level that is found is then 0.95 +- 0.011
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Sample:
    """By how much a spectrum's nodes and weights change when each of n groups of data is left out.

    They are kept in float32, which is closer than they are known.

    Attributes:
        nodes: (n, K, M) in the order of the spectrum's nodes; K may be 1 where all rows are equal.
        weights: (n, K, M).
    """

    nodes: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls, nodes: np.ndarray, weights: np.ndarray, without: tuple[np.ndarray, np.ndarray]
    ) -> Sample:
        """From nodes and weights (K, M), and those without each group, (n, K, M) both."""
        changes = (
            without[0] - nodes[: without[0].shape[1]],
            without[1] - weights[: without[1].shape[1]],
        )
        return cls(*(change.astype(np.float32) for change in changes))

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
        without = nodes + self.nodes
        pooled = np.sort(np.concatenate([nodes.ravel(), without.ravel()]))
        places = np.linspace(0, len(pooled) - 1, min(CELLS, len(pooled))).round().astype(int)
        grid = np.unique(pooled[places])
        if len(grid) < 2:
            return 0.0
        pairs = zip(without, weights + self.weights, strict=True)
        found = np.stack([_integrals(*pair, grid) for pair in pairs])
        centred = found - found.mean(0)
        drawn = np.random.default_rng(0).standard_normal((DRAWS, count))
        moved = math.sqrt((count - 1) / count) * drawn @ centred
        few = float(stdtrit(count - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2))
        return few * float(np.quantile(np.abs(moved).sum(1), LEVEL))


PER_GROUP = {"node_changes": "nodes", "weight_changes": "weights"}
"""Columns of lists: what changes when each group of data is left out."""


def listed(sample: Sample | None, rows: int) -> dict[str, list[np.ndarray | None]]:
    """The columns of a table with so many rows, one for each node of each probe; rows of an exact
    spectrum are equal, and only the first probe's are written.
    """
    found: dict[str, list[np.ndarray | None]] = {}
    for column, name in PER_GROUP.items():
        changes = [] if sample is None else list(getattr(sample, name).reshape(len(sample), -1).T)
        found[column] = changes + [None] * (rows - len(changes))
    return found


def sample_of(columns: Mapping[str, Iterable[object]], probes: int) -> Sample | None:
    """What :func:`listed` gave, read from the columns of one spectrum; None where it lacks them."""
    arrays = []
    for column in PER_GROUP:
        lists = list(columns[column])
        written = [value for value in lists if isinstance(value, np.ndarray)]
        if not written:
            return None
        changes = np.stack(written).T.astype(np.float32)
        arrays.append(changes.reshape(len(changes), -1, len(lists) // probes))
    return Sample(*arrays)


def _integrals(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(G - 1,) the integral of the distribution function over each cell of the grid."""
    order = np.argsort(nodes, axis=None)
    places = nodes.ravel()[order]
    below = np.cumsum(weights.ravel()[order]) / weights.sum()
    # the integral up to x is linear between nodes, zero before them and of slope 1 behind them
    integral = np.concatenate([[0.0], np.cumsum(below[:-1] * np.diff(places))])
    behind = np.maximum(grid - places[-1], 0.0)
    return np.diff(np.interp(grid, places, integral) + behind)
