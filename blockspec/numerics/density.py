"""Smoothing of a discrete measure into a density."""

from __future__ import annotations

import math

import numpy as np

RELATIVE_WIDTH = (
    0.2  # of the default smoothing: 40 Ritz values over six decades are about this far apart
)
REACH = 8.5  # widths: beyond, a Gaussian is below 1e-15 of its peak
# points a width between which a cubic spline is right to 3e-9 of the peak: finer grids are
# interpolated
PER_WIDTH = 64


def smooth(
    nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float | None, linear: float
) -> np.ndarray:
    """(G,) Gaussian smoothing of a discrete measure, on the axis itself (``width``) or on the scale
    asinh(x / linear).
    """
    if width is None:
        slope = 1 / np.hypot(grid, linear)
        return slope * gaussians(
            np.arcsinh(nodes / linear), weights, np.arcsinh(grid / linear), RELATIVE_WIDTH
        )
    if width <= 0:
        raise ValueError(f"width is a positive number in units of an eigenvalue, got {width}")
    return gaussians(nodes, weights, grid, width)


def gaussians(
    nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float, *, reach: float = REACH
) -> np.ndarray:
    """(G,) sum of weighted normal densities at ``grid``, each evaluated within ``reach`` widths:
    beyond 8.5 it is below 1e-15 of its peak.
    """
    order = np.argsort(grid, kind="stable")
    density = np.empty(len(grid))
    density[order] = _on_ascending(nodes, weights, grid[order], width, reach)
    return density


def _on_ascending(
    nodes: np.ndarray, weights: np.ndarray, points: np.ndarray, width: float, reach: float
) -> np.ndarray:
    enough = math.ceil((points[-1] - points[0]) / width * PER_WIDTH) + 2
    if len(points) > 2 * enough and reach <= REACH:
        from scipy.interpolate import CubicSpline  # here: it takes half a second to import

        coarse = np.linspace(points[0], points[-1], enough)
        return np.maximum(
            CubicSpline(coarse, _sum(nodes, weights, coarse, width, reach))(points), 0
        )
    return _sum(nodes, weights, points, width, reach)


def _sum(
    nodes: np.ndarray, weights: np.ndarray, points: np.ndarray, width: float, reach: float
) -> np.ndarray:
    starts = np.searchsorted(points, nodes - reach * width)
    stops = np.searchsorted(points, nodes + reach * width)
    total = np.zeros(len(points))
    for node, weight, start, stop in zip(nodes, weights, starts, stops, strict=True):
        if weight > 0 and stop > start:
            z = (points[start:stop] - node) / width
            total[start:stop] += weight * np.exp(-0.5 * z * z)
    return total / (width * math.sqrt(2 * math.pi))
