"""Discrete measures: how far two are apart, and how far a random one is likely to be from what it samples."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 1.5  # times the expected probe error is exceeded in fewer than 5 % of trials: see tests/test_accuracy.py

NOTHING = np.empty(0)

CERTAIN = 1e-3  # residual of an eigenvalue, relative to the norm


def probe_error(nodes: np.ndarray, weights: np.ndarray, numel: float) -> float:
    """Expected distance between the measures of one probe and of the block: at most
    ``sqrt(2 / (P + 2)) * integral of sqrt(F (1 - F))`` with F the distribution function. The variance of F(x) over random
    unit vectors is 2 F (1 - F) / (P + 2), and no larger for Rademacher ones. K probes divide it by sqrt(K).

    nodes, weights: of all probes, of any shape; normalised here.
    """
    order = np.argsort(nodes, axis=None)
    weights = weights.ravel()[order]
    below = np.clip(np.cumsum(weights)[:-1] / weights.sum(), 0, 1)
    spread = np.diff(nodes.ravel()[order]) @ np.sqrt(below * (1 - below))
    return float(math.sqrt(2 / (numel + 2)) * spread)


def wasserstein(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """Wasserstein-1 distance between two discrete measures (nodes, weights), each of mass 1."""
    nodes = np.concatenate([p[0], q[0]])
    order = np.argsort(nodes)
    difference = np.cumsum(np.concatenate([p[1], -q[1]])[order])[:-1]
    return float(np.abs(difference) @ np.diff(nodes[order]))


def likely_weights(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, numel: float
) -> np.ndarray:
    """Weights to foresee noise with: an eigenvalue that is certain has 1 / P at least, however little of it a probe has seen."""
    certain = (residuals <= CERTAIN * np.abs(nodes).max(initial=0)) & (weights > 0)
    return np.where(certain, np.maximum(weights, 1 / numel), weights)
