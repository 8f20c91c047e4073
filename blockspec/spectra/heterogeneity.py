"""How different the blocks' spectra are from each other: distances between blocks, and one number
for a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy.special import xlogy

from blockspec.numerics.density import RELATIVE_WIDTH, gaussians
from blockspec.numerics.measures import wasserstein
from blockspec.spectra.spectrum import Estimate, Spectrum

DEFINITIONS = ("jensen-shannon", "symmetrised-kl", "wasserstein")
PAPER_WIDTH = math.sqrt(
    1e-5
)  # the released code of arXiv 2402.16788: variance 1e-5, absolute, 50,000 points
PAPER_POINTS = 50_000
PAPER_FLOOR = 1e-258
POINTS = 2000  # of the common grid of jensen-shannon; 20 to 60 points per width

Rows = list[tuple[np.ndarray, np.ndarray]]
"""Nodes (N,) and weights (N,) of each block, the probes merged into one measure."""


def js_distances(
    spectra: Mapping[str, Spectrum],
    definition: str = "jensen-shannon",
    *,
    linear: float | None = None,
    width: float = PAPER_WIDTH,
    points: int = PAPER_POINTS,
    floor: float = PAPER_FLOOR,
) -> pd.DataFrame:
    """Distances between the spectra of blocks: (blocks x blocks), symmetric, zero on the diagonal.

    ``"jensen-shannon"`` is the Jensen-Shannon divergence in nats, between 0 and ln 2. Each spectrum
    is smoothed with a Gaussian of width 0.2 on the scale asinh(eigenvalue / linear), on one grid of
    2000 even points that covers all blocks. It does not change when all blocks (the loss) are
    scaled by one factor; it does when one block is.

    ``"symmetrised-kl"`` is (KL(p||q) + KL(q||p)) / 2 in nats, unbounded: the scale of the published
    heat maps of "Why Transformers Need Adam", which call it JS distance. Each spectrum is smoothed
    on even points over the range of all blocks, raised to ``floor``, and normalised. It depends on
    width, points and floor, and on the scale of the loss.

    ``"wasserstein"`` is the Wasserstein-1 distance between the raw measures, without any smoothing,
    in units of an eigenvalue. It scales with the loss; divide it by a norm to compare models.

    Distances between estimated spectra are biased upwards by their noise; compare with two probes
    of the same block.

    Args:
        spectra: Of the blocks. Leave ``model`` out (``spectra.select(exclude="model")``): the full
            spectrum is no block beside the others.
        definition: ``"jensen-shannon"``, ``"symmetrised-kl"`` or ``"wasserstein"``.
        linear: Of jensen-shannon: where its scale turns from linear to logarithmic, in units of an
            eigenvalue. If left out, the median over the blocks of their root mean square
            eigenvalue.
        width: Of symmetrised-kl: standard deviation of the Gaussian, in units of an eigenvalue.
        points: Of symmetrised-kl: points of the grid.
        floor: Of symmetrised-kl: the smallest mass of a point.

    Returns:
        A table, blocks x blocks.
    """
    settings = {"linear": linear, "width": width, "points": points, "floor": floor}
    distances = _distances(list(spectra.values()), definition, settings, leave_out=None)
    return pd.DataFrame(distances, index=list(spectra), columns=list(spectra))


def js0(
    spectra: Mapping[str, Spectrum], definition: str = "jensen-shannon", **settings: float
) -> Estimate:
    """Heterogeneity of a model: the mean distance over all pairs of blocks (JS^0 of arXiv
    2402.16788, there at initialisation), with a standard error by jackknife over probes; None with
    one probe, 0 where all blocks are exact.

    Args:
        definition, settings: See :func:`js_distances`.
    """
    parts = list(spectra.values())
    if len(parts) < 2:
        raise ValueError(f"a mean over pairs needs at least 2 blocks, got {len(parts)}")
    options = {
        "linear": None,
        "width": PAPER_WIDTH,
        "points": PAPER_POINTS,
        "floor": PAPER_FLOOR,
    } | settings
    value = _mean_over_pairs(_distances(parts, definition, options, leave_out=None))
    if all(part.exact for part in parts):
        return Estimate(value, 0.0)
    probes = min(part.num_probes for part in parts if not part.exact)
    if probes < 2:
        return Estimate(value, None)
    left_out = np.array(
        [
            _mean_over_pairs(_distances(parts, definition, options, leave_out=probe))
            for probe in range(probes)
        ]
    )
    return Estimate(
        value, math.sqrt((probes - 1) / probes * ((left_out - left_out.mean()) ** 2).sum())
    )


def _mean_over_pairs(distances: np.ndarray) -> float:
    return float(distances[np.triu_indices(len(distances), k=1)].mean())


def _distances(
    parts: list[Spectrum],
    definition: str,
    settings: Mapping[str, float | None],
    *,
    leave_out: int | None,
) -> np.ndarray:
    if definition not in DEFINITIONS:
        raise ValueError(f"definition is one of {DEFINITIONS}, got {definition!r}")
    if not parts:
        raise ValueError("no spectra to compare: the mapping is empty")
    # of all probes, so that leaving one out does not move the scale
    linear = settings["linear"] or _linear(parts)
    rows = [_measure(part, leave_out) for part in parts]
    if definition == "wasserstein":
        return _pairwise(rows, wasserstein)
    if definition == "jensen-shannon":
        scaled = [(np.arcsinh(nodes / linear), weights) for nodes, weights in rows]
        return jensen_shannon(_masses(scaled, width=RELATIVE_WIDTH, points=POINTS, floor=0.0))
    width, points, floor = (settings[name] or 0.0 for name in ("width", "points", "floor"))
    return _symmetrised_kl(_masses(rows, width=width, points=int(points), floor=floor))


def _linear(parts: list[Spectrum]) -> float:
    sizes = [math.sqrt(part.moment(2).value) for part in parts if not part.is_zero]
    return float(np.median(sizes)) if sizes else 1.0


def _measure(part: Spectrum, leave_out: int | None) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(part.num_probes)
    if leave_out is not None and not part.exact:
        rows = np.delete(rows, leave_out)
    return part.nodes[rows].ravel(), part.weights[rows].ravel() / len(rows)


def _masses(rows: Rows, *, width: float, points: int, floor: float) -> np.ndarray:
    """(blocks, points) the smoothed measures as probabilities of the cells of one even grid."""
    low = min(nodes.min() for nodes, _ in rows) - 5 * width
    high = max(nodes.max() for nodes, _ in rows) + 5 * width
    grid = np.linspace(low, high, points)
    # to where a Gaussian falls below the floor
    reach = (
        8.5
        if floor == 0
        else math.sqrt(-2 * math.log(min(floor * width * math.sqrt(2 * math.pi), 1.0)))
    )
    masses = np.stack(
        [gaussians(nodes, weights, grid, width, reach=reach) for nodes, weights in rows]
    )
    masses = np.maximum(masses, floor)
    return masses / masses.sum(1, keepdims=True)


def jensen_shannon(p: np.ndarray) -> np.ndarray:
    """(blocks, blocks) divergences of probabilities p (blocks, cells), in nats: entropy of the
    mixture less the mean entropy.
    """
    entropy = -xlogy(p, p).sum(1)
    distances = np.zeros((len(p), len(p)))
    for i in range(1, len(p)):
        mixture = (p[:i] + p[i]) / 2
        distances[i, :i] = np.clip(
            -xlogy(mixture, mixture).sum(1) - (entropy[:i] + entropy[i]) / 2, 0, math.log(2)
        )
    return distances + distances.T


def _symmetrised_kl(p: np.ndarray) -> np.ndarray:
    """sum (p - q)(log p - log q) / 2."""
    cross = p @ np.log(p).T
    own = np.diag(cross)
    distances = np.maximum((own[:, None] + own[None, :] - (cross + cross.T)) / 2, 0)
    np.fill_diagonal(distances, 0)
    return distances


def _pairwise(rows: Rows, distance: Callable[..., float]) -> np.ndarray:
    distances = np.zeros((len(rows), len(rows)))
    for i in range(len(rows)):
        for j in range(i):
            distances[i, j] = distances[j, i] = distance(rows[i], rows[j])
    return distances
