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

from blockspec.numerics.jackknife import FEWEST_UNITS, MOST_GROUPS, shift_by_skewness

DRAWS = 400  # of random combinations: the level that is found is then 0.95 +- 0.011
LEVEL = 0.95
BESIDE = 3.0  # standard deviations of a node's moves that its cell reaches beyond it


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

    def distance(
        self, nodes: np.ndarray, weights: np.ndarray, *, slow: bool = False, growth: float = 1.0
    ) -> float | None:
        """The spectrum of the population is within this Wasserstein-1 distance of that of the
        sample, in 95 % of samples; None where there are too few groups.

        Args:
            nodes: (K, M) of the spectrum.
            weights: (K, M); each row sums to 1.
            slow: There are fewer units than eigenvalues. Then the bias may fall like one over the
                root of their number, not like one over it, and what leaving one out shows is half.
            growth: What it is expected to be with so many times the units.
        """
        if not self.known:
            return None
        count = len(self)
        found = _moved_mass(self, nodes, weights)
        centred = found - found.mean(0)
        bias = (2 / math.sqrt(growth) if slow else 1 / growth) * (count - 1) * found.mean(0)
        later = max(count, min(count * growth, MOST_GROUPS))
        student = float(stdtrit(later - 1, (1 + LEVEL) / 2))
        few = student + _shift(centred, student) / math.sqrt(growth)
        drawn = np.random.default_rng(0).standard_normal((DRAWS, count))
        scale = math.sqrt((count - 1) / (count * growth)) * few / float(ndtri((1 + LEVEL) / 2))
        return float(np.quantile(np.abs(scale * drawn @ centred + bias).sum(1), LEVEL))


def _shift(centred: np.ndarray, student: float) -> float:
    """By how many standard errors a heavy tail of the units moves the end on its side out (Johnson
    1978), in the direction in which they differ the most.

    Args:
        centred: (n, cells) by what each group moves the spectrum, of mean zero.
        student: Quantile of Student's t.
    """
    values, directions = np.linalg.eigh(centred @ centred.T)
    return abs(shift_by_skewness(directions[:, -1], student)) if values[-1] > 0 else 0.0


def told_of_units(units: set[int]) -> str:
    """Which units of data the data's errors rest on, or why there are none.

    Args:
        units: Numbers of units of several blocks; 0 where they were not told apart.
    """
    if units <= {0}:
        return "no errors of the data: its units were not told apart"
    fewest = min(units)
    if fewest < FEWEST_UNITS:
        return (
            f"no errors of the data: it went through the model in {fewest} units, and "
            f"{FEWEST_UNITS} are needed: cut it finer with Objective(..., micro_batch=1), or "
            "give more"
        )
    most = max(units)
    return f"errors of the data from {fewest} {f'to {most} ' if most > fewest else ''}units"


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


def _moved_mass(sample: Sample, nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n, cells) the integral of what the distribution function changes by without each group, over
    cells of the axis; sums of their magnitudes are Wasserstein-1 distances.

    Nodes that are nearer to each other than they move share a cell, where opposite moves cancel.
    The functions themselves would not do: steps that move to and fro are smoother in the mean,
    which looks like a bias. A wide gap is a cell too. How far a node moves is what three of four
    groups keep: where an outlier goes with its group, all nodes behind it take the place of the
    next one.
    """
    order = np.argsort(nodes, axis=None, kind="stable")
    places = nodes.ravel()[order]
    moves = np.broadcast_to(sample.nodes, (len(sample), *nodes.shape))
    moves = moves.reshape(len(sample), -1)[:, order]
    centred = np.abs(moves - np.median(moves, axis=0))
    steps = np.quantile(centred, 0.75, axis=0) / float(ndtri(7 / 8))
    gaps = np.diff(places)
    reach = math.sqrt(len(sample) - 1) * np.maximum(steps[1:], steps[:-1])
    wide = gaps > reach
    left, right = (
        np.minimum(BESIDE * side[wide], gaps[wide] / 2) for side in (steps[:-1], steps[1:])
    )
    far = np.abs(moves).max(initial=0.0)
    ends = np.array([places[0] - far, places[-1] + far])
    borders = np.sort(np.concatenate([ends, places[:-1][wide] + left, places[1:][wide] - right]))
    whole = _integrals(nodes, weights, borders)
    parts = [
        _integrals(nodes + moved, weights + gained, borders)
        for moved, gained in zip(sample.nodes, sample.weights, strict=True)
    ]
    return np.diff(np.stack(parts) - whole, axis=1)


def _integrals(nodes: np.ndarray, weights: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Of the distribution function of (K, M) nodes and weights, from minus infinity to each of the
    borders, the last of which is behind all nodes.
    """
    order = np.argsort(nodes, axis=None)
    places = np.append(nodes.ravel()[order], borders[-1])
    below = np.cumsum(weights.ravel()[order]) / len(nodes)
    areas = np.append(0.0, np.cumsum(below * np.diff(places)))
    return np.interp(borders, places, areas)
