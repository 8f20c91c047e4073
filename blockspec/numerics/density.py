"""Smoothing of a discrete measure into a density."""

from __future__ import annotations

import math

import numpy as np

RELATIVE_WIDTH = 0.2  # of distances, on the scale asinh(x / linear)
WIDTH = (
    0.05  # of a node in a density, relative to its value: outliers an eighth apart are seen apart
)
REACHES = 2.0  # residuals, where these overlap those of the neighbours: as wide as a node may be
# eigenvalues times probes that a width holds: their random weights then move a curve by 8 %, and
# peaks that this makes are drawn as flat tops
SMOOTH = 100.0
EVEN = 3.0  # widths: nodes that lie so near to another one are drawn about as wide
ROUNDING = 1e-12  # of a sum: differences of sums below are rounding
AT_ONCE = 4096  # nodes
REACH = 8.5  # widths: beyond, a Gaussian is below 1e-15 of its peak
# points a width between which a cubic spline is right to 3e-9 of the peak: finer grids are
# interpolated
PER_WIDTH = 64


def spacing(nodes: np.ndarray) -> np.ndarray:
    """(K, M) of the nodes of K probes, ascending: the mean of the gaps to both neighbours, at the
    ends the gap to the one.
    """
    if nodes.shape[1] < 2:
        return np.full(nodes.shape, np.inf)
    gaps = np.diff(nodes, axis=1)
    return (np.hstack([gaps[:, :1], gaps]) + np.hstack([gaps, gaps[:, -1:]])) / 2


def node_widths(
    nodes: np.ndarray,
    residuals: np.ndarray,
    apart: np.ndarray,
    counts: np.ndarray,
    linear: float,
) -> np.ndarray:
    """(K, M) how wide each node of K probes is drawn.

    ``WIDTH`` times its value, or around zero times ``linear``, which suits outliers. But a Ritz
    value that has not converged stands for all eigenvalues between its neighbours: it is as wide as
    the gaps to them (``apart``, see :func:`spacing`), else these would look like gaps of the
    spectrum, and every node like a peak. It is wider where it stands for few eigenvalues
    (``counts``, those of all probes together), since their random weights would look like peaks
    too. Where its residual is smaller, the eigenvalues are that near, and the residual counts.
    """
    unresolved = apart * np.maximum(1.0, SMOOTH / np.maximum(counts, 1e-9 * SMOOTH))
    reach = np.where(residuals > apart, REACHES, 1.0) * residuals
    return np.maximum(WIDTH * np.hypot(nodes, linear), np.minimum(reach, unresolved))


def evened(nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Any shape, the same for all: widths, at least the harmonic mean by weight over the nodes
    around.

    A narrow node among wide ones would stand out as a peak. How narrow it is depends on where the
    nodes of one probe happen to fall, and so does the peak. A node of large weight is not made
    wider by light ones around.
    """
    order = np.argsort(nodes, axis=None)
    node, weight, width = (array.ravel()[order] for array in (nodes, weights, widths))
    starts = np.searchsorted(node, node - EVEN * width, side="left")
    stops = np.searchsorted(node, node + EVEN * width, side="right")

    def around(shares: np.ndarray) -> np.ndarray:
        """(N,) sums over the nodes within whose reach each one lies."""
        changes = np.bincount(starts, shares, len(node) + 1)
        return np.cumsum(changes - np.bincount(stops, shares, len(node) + 1))[:-1]

    total, narrowness = around(weight), around(weight / width)
    some = (total > ROUNDING * weight.sum()) & (narrowness > ROUNDING * (weight / width).sum())
    mean = np.divide(total, narrowness, out=np.zeros(len(node)), where=some)
    result = np.empty(len(node))
    result[order] = np.maximum(width, np.minimum(mean, width.max()))
    return result.reshape(nodes.shape)


def mixture(
    nodes: np.ndarray, weights: np.ndarray, widths: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """(G,) sum of weighted normal densities, each with its own width; some nodes at a time, since
    mixtures have many.
    """
    total = np.zeros(len(grid))
    for start in range(0, len(nodes), AT_ONCE):
        node, weight, width = (a[start : start + AT_ONCE] for a in (nodes, weights, widths))
        total += np.exp(-0.5 * ((grid[:, None] - node) / width) ** 2) @ (weight / width)
    return total / math.sqrt(2 * math.pi)


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
