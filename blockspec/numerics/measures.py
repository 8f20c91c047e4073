"""Discrete measures: how far two are apart, and how far a random one is likely to be from what it samples.

A random start vector gives an eigenvalue the weight ``g^2 / sum of g^2`` with g normal, and a group of n eigenvalues the sum of n
of these: gamma variables of shape n / 2, divided by their sum. So the noise of an estimated measure can be played through:
draw gamma weights around the ones that were found, many times, and see how far the drawn measures are from it. The 95 %
quantile of these distances is right whether one gap dominates (a normal variable's 1.96 standard deviations), a wide bulk
(little more than the mean distance) or one outlier (a chi-square variable with one degree of freedom).
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95  # of confidence
CONFIDENCE = 1.96  # standard deviations of a normal variable that hold the truth with it
DRAWS = 400  # of gamma weights: the level of the quantile that is found is then 0.95 +- 0.011
PLACES = 128  # that the nodes are put into before drawing, so that it takes 2 ms at most

NOTHING = np.empty(0)

CERTAIN = 1e-3  # residual of an eigenvalue, relative to the norm
SAME = 2e-5  # how far two probes' values of one eigenvalue may be apart, relative to the norm: roundings of float32


def probe_noise(nodes: np.ndarray, weights: np.ndarray, numel: float, probes: float = 1) -> float:
    """Distance between the mean measure of ``probes`` random probes and that of the block, which 95 % of them keep.

    Args:
        nodes, weights: The estimated measure, of any shape; weights are normalised here.
        numel: Eigenvalues of the block, each of which has the same weight in the mean.
        probes: Gaussian ones, or uniform on the sphere. Rademacher ones have this noise in a random basis; where eigenvectors
            are axes, less.
    """
    places, masses = merged(nodes.ravel(), weights.ravel())
    if len(places) < 2:
        return 0.0
    drawn = np.random.default_rng(0).standard_gamma(
        numel * probes / 2 * masses, (DRAWS, len(places))
    )
    totals = drawn.sum(1, keepdims=True)
    drawn = drawn[totals[:, 0] > 0] / totals[totals[:, 0] > 0]
    below = np.cumsum(drawn - masses, axis=1)[:, :-1]
    return float(np.quantile(np.abs(below) @ np.diff(places), LEVEL))


def merged(nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``PLACES`` places (ascending) and masses (positive, of sum 1): where nodes are many, those between which little
    of the noise arises are put together."""
    order = np.argsort(nodes, kind="stable")
    order = order[weights[order] > 0]
    nodes, weights = nodes[order], weights[order] / weights[order].sum()
    if len(nodes) <= PLACES:
        return nodes, weights
    below = np.clip(np.cumsum(weights)[:-1], 0, 1)
    noise = np.sqrt(below * (1 - below)) * np.diff(nodes)
    starts = np.sort(np.append(0, 1 + np.argpartition(-noise, PLACES - 1)[: PLACES - 1]))
    masses = np.add.reduceat(weights, starts)
    return np.add.reduceat(nodes * weights, starts) / masses, masses


def wasserstein(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """Wasserstein-1 distance between two discrete measures (nodes, weights), each of mass 1."""
    nodes = np.concatenate([p[0], q[0]])
    order = np.argsort(nodes)
    difference = np.cumsum(np.concatenate([p[1], -q[1]])[order])[:-1]
    return float(np.abs(difference) @ np.diff(nodes[order]))


def likely_weights(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, numel: float, probes: int = 1
) -> np.ndarray:
    """Weights to foresee noise with: an eigenvalue that is certain has 1 / P at least, however little of it the probes have seen.

    Args:
        nodes, weights, residuals: Of all probes, of any shape; the weights of each probe sum to 1. Nodes that are equal
            within their residuals are the same eigenvalue.
        numel: P.
    """
    shape = nodes.shape
    nodes, weights, residuals = nodes.ravel(), weights.ravel(), residuals.ravel()
    order = np.argsort(nodes, kind="stable")
    norm = np.abs(nodes).max(initial=0)
    certain = (residuals <= CERTAIN * norm) & (weights > 0)
    reach, sure = residuals[order] + SAME / 2 * norm, certain[order]
    same = (np.diff(nodes[order]) <= reach[1:] + reach[:-1]) & sure[1:] & sure[:-1]
    group = np.empty(len(order), int)
    group[order] = np.concatenate([[0], np.cumsum(~same)])
    seen = np.bincount(group, weights)[group]
    raised = weights * np.maximum(1.0, probes / numel / np.where(seen > 0, seen, 1.0))
    return np.where(certain, raised, weights).reshape(shape)
