"""Discrete measures: how far two are apart, and how far a random one is likely to be from what it
samples.

A random start vector gives an eigenvalue the weight ``g^2 / sum of g^2`` with g normal, and a group
of n eigenvalues the sum of n of these: gamma variables of shape n / 2, divided by their sum. So the
noise of an estimated measure can be played through: draw gamma weights around the ones that were
found, many times, and see how far the drawn measures are from it.

A measure that gives an outlier too little weight by chance foresees too little noise as well. So
distances are not taken as they are, but in units of a spread that every measure foresees for
itself, the integral of sqrt(F (1 - F)) with F its distribution function (the bootstrap-t of Efron,
1979). The quantile in these units is right whether one gap dominates (a normal variable's 1.96), a
wide bulk (little more than the mean) or one outlier (a chi-square variable with one degree of
freedom).

One thing the measure cannot foresee: that an eigenvalue which looks like a single one is a repeated
one, of which the probes saw little. So a few times 1 / P are added to the variance (``HIDDEN``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = (
    0.97  # of confidence, so that 0.95 is left where the measure itself is known from few probes
)
CONFIDENCE = 1.96  # standard deviations of a normal variable that hold the truth with it
DRAWS = 400  # of gamma weights: the level of the quantile that is found is then 0.97 +- 0.009
# divided by the number of probes: of a repeated eigenvalue, of which they saw next to nothing, as
# many times the weight 1 / P more than they saw as 95 % need
HIDDEN = 2.0
# by how many spreads 97 % of chi-square variables with one degree of freedom are off: draws of
# smaller shapes, which no eigenvalue has, are often 0, with no spread at all
FARTHEST = 26.0
PLACES = 128  # that the nodes are put into before drawing, so that it takes 2 ms at most

NOTHING = np.empty(0)

CERTAIN = 1e-3  # residual of an eigenvalue, relative to the norm
# how far two probes' values of one eigenvalue may be apart, relative to the norm: roundings of
# float32
SAME = 2e-5


@dataclass(frozen=True, eq=False)
class Noisy:
    """A measure that random probes have seen, as their noise is foreseen from it.

    Attributes:
        nodes: (n,) of all probes, ascending.
        weights: (n,) positive, of sum 1.
        least: (n,) what of a weight is there however little of it the probes have seen.
        numel: Eigenvalues of which the measure is.
    """

    nodes: np.ndarray
    weights: np.ndarray
    least: np.ndarray
    numel: float

    def noise(self, probes: float) -> float:
        """Distance between the mean measure of so many random probes and the true one, which 95 %
        of them keep.

        Probes are Gaussian, or uniform on the sphere; Rademacher ones have this noise in a random
        basis, and less where eigenvectors are axes.
        """
        if len(self.nodes) < 2 or self.nodes[0] == self.nodes[-1]:
            return 0.0
        gaps = np.diff(self.nodes)
        shapes = self.numel * probes / 2 * self.weights
        drawn = np.random.default_rng(0).standard_gamma(shapes, (DRAWS, len(shapes)))
        drawn /= np.maximum(drawn.sum(1, keepdims=True), np.finfo(float).tiny)
        distances = np.abs(np.cumsum(drawn - self.weights, axis=1)[:, :-1]) @ gaps
        spreads = _spread(np.maximum(drawn, self.least), gaps)
        own = distances / np.maximum(spreads, np.finfo(float).tiny)
        hidden = HIDDEN / (self.numel * probes)
        far = min(float(np.quantile(own, LEVEL)), FARTHEST)
        return far * float(_spread(self.weights, gaps, hidden))

    def merged(self) -> Noisy:
        """The same in at most ``PLACES`` places: nodes between which little of the noise arises are
        put together.
        """
        if len(self.nodes) <= PLACES:
            return self
        below = np.clip(np.cumsum(self.weights)[:-1], 0, 1)
        noise = np.sqrt(below * (1 - below)) * np.diff(self.nodes)
        starts = np.sort(np.append(0, 1 + np.argpartition(-noise, PLACES - 1)[: PLACES - 1]))
        weights, least = (np.add.reduceat(a, starts) for a in (self.weights, self.least))
        nodes = np.add.reduceat(self.nodes * self.weights, starts) / weights
        return Noisy(nodes, weights, least, self.numel)


def noisy(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, numel: float, probes: int
) -> Noisy:
    """What ``probes`` probes have seen.

    Within its residual of a node there is an eigenvalue, which has the weight 1 / P at least,
    however little of it they have seen. Nodes whose reaches meet may share one; a node that is
    certain has one to itself, but for nodes that are equal to it. A single node is the mean of what
    lies around it, and its residual the standard deviation of that; so it stands for two places.

    Args:
        nodes, weights, residuals: Of all probes, of any shape.
        numel: P.
    """
    order = np.argsort(nodes, axis=None, kind="stable")
    order = order[weights.ravel()[order] > 0]
    nodes, weights, residuals = (a.ravel()[order] for a in (nodes, weights, residuals))
    weights = weights / weights.sum()
    norm = np.abs(nodes).max(initial=0)
    if len(nodes) == 1 and residuals[0] > CERTAIN * norm:
        nodes, weights = nodes + residuals * (-1, 1), np.full(2, 0.5)
        residuals = np.repeat(residuals, 2)
    reach = residuals + SAME / 2 * norm
    certain = residuals <= CERTAIN * norm
    farthest = np.maximum.accumulate(nodes + reach)
    apart = nodes[1:] - reach[1:] > farthest[:-1]
    same = (np.diff(nodes) <= reach[1:] + reach[:-1]) & certain[1:] & certain[:-1]
    least = np.maximum(_shared(weights, apart), certain * _shared(weights, ~same)) / numel
    likely = np.maximum(weights, least)
    return Noisy(nodes, likely / likely.sum(), least / likely.sum(), numel).merged()


def _shared(weights: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """(n,) what each node has of one, which those share that are not apart (n - 1,)."""
    group = np.cumsum(np.append(False, apart))[: len(weights)]  # of no nodes there is no group
    return weights / np.bincount(group, weights)[group]


def _spread(weights: np.ndarray, gaps: np.ndarray, more: np.ndarray | float = 0.0) -> np.ndarray:
    """(...,) integral of sqrt(F (1 - F) + more) of measures with weights (..., n) at places with
    these gaps (n - 1,).
    """
    below = np.cumsum(weights, axis=-1)
    below /= below[..., -1:]
    return np.sqrt(np.clip(below * (1 - below), 0, None)[..., :-1] + more) @ gaps


def wasserstein(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """Wasserstein-1 distance between two discrete measures (nodes, weights), each of mass 1."""
    nodes = np.concatenate([p[0], q[0]])
    order = np.argsort(nodes)
    difference = np.cumsum(np.concatenate([p[1], -q[1]])[order])[:-1]
    return float(np.abs(difference) @ np.diff(nodes[order]))


def transport(
    nodes: np.ndarray, weights: np.ndarray, places: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """(m,) the means of a measure over the shares of another one: what lies, in ascending order,
    where the shares (m,) of the places (m,) lie.

    It has the measure's mean, and moves ``places`` by the Wasserstein-1 distance at most. A place
    without a share stays.
    """
    order = np.argsort(nodes, kind="stable")
    ends = np.concatenate([[0.0], np.cumsum(weights[order])])
    sums = np.concatenate([[0.0], np.cumsum(weights[order] * nodes[order])])
    own = np.argsort(places, kind="stable")
    borders = np.concatenate([[0.0], np.cumsum(shares[own])])
    parts = np.diff(np.interp(borders / borders[-1], ends / ends[-1], sums / ends[-1]))
    found = places.astype(np.float64)
    filled = shares[own] > 0
    found[own[filled]] = parts[filled] * borders[-1] / shares[own][filled]
    return found
