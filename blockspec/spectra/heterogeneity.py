"""How different the blocks' spectra are from each other: distances between blocks, and one number
for a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy

from blockspec.model.pieces import FULL
from blockspec.numerics.density import RELATIVE_WIDTH, gaussians
from blockspec.numerics.jackknife import jackknife_error, jackknife_errors
from blockspec.numerics.measures import wasserstein
from blockspec.spectra.pairs import MOST_COMPARED, sampling_stderr, say_what_comes, some_of
from blockspec.spectra.resolved import even_grid, resolved_mean
from blockspec.spectra.spectrum import Estimate, Spectrum

DEFINITIONS = ("jensen-shannon", "resolved", "symmetrised-kl", "wasserstein")
PAPER_WIDTH = math.sqrt(
    1e-5
)  # the released code of arXiv 2402.16788: variance 1e-5, absolute, 50,000 points
PAPER_POINTS = 50_000
PAPER_FLOOR = 1e-258
MARGIN = 1.0  # of the grid of resolved distances, on the scale asinh(x / linear): ten widths
POINTS = 2000  # of the common grid of jensen-shannon; 20 to 60 points per width

OPTIONS = {"linear": None, "width": PAPER_WIDTH, "points": PAPER_POINTS, "floor": PAPER_FLOOR}

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

    Args:
        spectra: Of blocks. The full matrix is no block beside others, and is left out.
        definition: One of these.

            - ``"jensen-shannon"``: the Jensen-Shannon divergence in nats, between 0 and ln 2. Each
              spectrum is smoothed with a Gaussian of width 0.2 on the scale asinh(eigenvalue /
              linear), on one grid of 2000 even points that covers all blocks. It does not change
              if all blocks (the loss) are scaled by one factor; it does if one block is.
            - ``"resolved"``: the same divergence, but two blocks are compared at the resolution of
              the coarser one. Each node is drawn as in figures (see
              :func:`blockspec.spectra.resolved.resolved_density`), but at least as wide as the
              other block's nodes there. Where few steps do not resolve a bulk, the other
              definitions compare the places of single Ritz values. It takes time: half a second
              for ten blocks.
            - ``"symmetrised-kl"``: (KL(p||q) + KL(q||p)) / 2 in nats, unbounded: the scale of the
              published heat maps of "Why Transformers Need Adam", which call it JS distance. Each
              spectrum is smoothed with a Gaussian of ``width`` on ``points`` even points over the
              range of all blocks, raised to ``floor``, and normalised. It depends on width,
              points and floor, and on the scale of the loss.
            - ``"wasserstein"``: Wasserstein-1 between the raw measures, without any smoothing, in
              units of an eigenvalue. It scales with the loss. Values can be divided by a norm to
              compare models.

        linear: Of the first two: where the scale turns from linear to logarithmic, in units of an
            eigenvalue. If left out, it is the median over the blocks of their root mean square
            eigenvalue.
        width: Of ``"symmetrised-kl"``, in units of an eigenvalue; ``points`` and ``floor``
            likewise.

    Distances between estimated spectra are biased upwards by their noise; :func:`js0` corrects for
    it.

    The work grows with the square of the number of blocks. Of more than a thousand, a warning says
    what is to come.

    Raises:
        ValueError: The definition is unknown, there are no spectra, or so many that the table would
            not fit (10,000).
    """
    settings = {"linear": linear, "width": width, "points": points, "floor": floor}
    parts = _beside_each_other(spectra)
    say_what_comes(len(parts), "js_distances")
    distances = _distances(list(parts.values()), definition, settings)
    return pd.DataFrame(distances, index=list(parts), columns=list(parts))


def js_distance_errors(
    spectra: Mapping[str, Spectrum], definition: str = "jensen-shannon", **settings: float
) -> pd.DataFrame | None:
    """Errors of :func:`js_distances` that come from the data: (blocks x blocks) standard errors.

    All distances are computed again without each group of data, 32 times at most.

    Args:
        spectra, definition, settings: As there.

    Returns:
        None where the data's error is not known.

    Raises:
        ValueError: As there; it takes fewer blocks, as all those tables are held at once.
    """
    parts = _beside_each_other(spectra)
    some = list(parts.values())
    samples = [part.sample for part in some]
    if any(sample is None or not sample.known for sample in samples):
        return None
    groups = max(len(sample) for sample in samples if sample is not None)
    say_what_comes(len(some), "js_distance_errors", tables=groups)
    options = OPTIONS | settings
    values = _distances(some, definition, options)
    squares = np.zeros_like(values)
    for units in {part.units for part in some}:
        left_out = [_distances(s, definition, options) for s in _without_groups(some, units)]
        squares += jackknife_errors(values, np.stack(left_out)) ** 2
    return pd.DataFrame(np.sqrt(squares), index=list(parts), columns=list(parts))


def js0(
    spectra: Mapping[str, Spectrum],
    definition: str = "jensen-shannon",
    *,
    data_errors: bool = True,
    max_blocks: int | None = MOST_COMPARED,
    **settings: float,
) -> Estimate:
    """Heterogeneity of a model: the mean distance over all pairs of blocks (JS^0 of arXiv
    2402.16788, there at initialisation).

    The noise of probes makes spectra look different, so that the mean of :func:`js_distances` is
    too large, by an amount that falls like one over the number of probes. The jackknife takes most
    of that away and gives the standard error: everything, the scale too, is computed again without
    one probe of each block. Where blocks have different numbers of probes, these are dealt into as
    many groups as the fewest, and a group is left out.

    Args:
        spectra, definition, settings: See :func:`js_distances`.
        data_errors: Also how far the number of the population may lie that the data is a sample of,
            from all distances without each group of data.
        max_blocks: Of more blocks, a random sample of so many is compared, the same at each call,
            and a warning says so; at least 3. The standard error then holds how far the sample's
            mean may lie from that of all pairs. None compares all pairs: the work grows with the
            square of the number of blocks.

    Returns:
        The corrected mean. With one probe it is not corrected, and its standard error is None; it
        is 0 where all blocks are exact and compared. An interval takes Student's t with one degree
        of freedom less than the fewest probes.
    """
    parts = list(_beside_each_other(spectra).values())
    if len(parts) < 2:
        raise ValueError(f"a mean over pairs needs at least 2 blocks, got {len(parts)}")
    options = OPTIONS | settings
    some = some_of(parts, max_blocks)
    mean = mean_over_probes(
        some,
        lambda some: _mean_over_pairs(_distances(some, definition, options)),
        data_errors=data_errors,
    )
    if len(some) == len(parts) or mean.stderr is None:
        return mean
    left = 1 - len(some) / len(parts)  # a sample of nearly all blocks is nearly all of the truth
    sampling = math.sqrt(left) * sampling_stderr(_distances(some, definition, options))
    return mean._replace(stderr=math.hypot(mean.stderr, sampling))


def corrected_distances(spectra: Mapping[str, Spectrum]) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, blocks) Jensen-Shannon divergences with the bias by the noise of probes taken off,
    and their standard errors, by the jackknife of :func:`js0`; the errors are nan where there is
    one probe.
    """
    parts = list(_beside_each_other(spectra).values())

    def statistic(some: list[Spectrum]) -> np.ndarray:
        return _distances(some, "jensen-shannon", OPTIONS)

    corrected, errors = _over_probes(parts, statistic, statistic(parts))
    return corrected, np.full_like(corrected, np.nan) if errors is None else errors


def mean_over_probes(
    parts: Sequence[Spectrum],
    statistic: Callable[[list[Spectrum]], float],
    *,
    data_errors: bool = True,
) -> Estimate:
    """A number that is not negative, made of spectra, by the jackknife over their probes, and over
    the data; see :func:`js0`.
    """
    value = statistic(list(parts))
    corrected, stderr = _over_probes(parts, statistic, value)
    found = Estimate(float(corrected), None if stderr is None else float(stderr))
    if not data_errors:
        return found
    return found._replace(data_stderr=_over_data(parts, statistic, value))


def _over_data(
    parts: Sequence[Spectrum], statistic: Callable[[list[Spectrum]], float], value: float
) -> float | None:
    """The error of the number that comes from the data; None where it is not known of a part.

    Spectra from the same units of data lose the same group at a time. Those from other numbers of
    units take their turn, and the errors add like those of independent samples.
    """
    if any(part.sample is None for part in parts):
        return None
    squares = 0.0
    for units in {part.units for part in parts}:
        left_out = np.array([statistic(some) for some in _without_groups(parts, units)])
        error = jackknife_error(value, left_out)
        if error is None:
            return None
        squares += error**2
    return math.sqrt(squares)


def _without_groups(parts: Sequence[Spectrum], units: int) -> list[list[Spectrum]]:
    """All spectra, those from so many units without the same group of data, one group after the
    other.
    """
    without = [part.without_groups() if part.units == units else None for part in parts]
    count = min(len(some) for some in without if some is not None)
    return [
        [part if some is None else some[group] for part, some in zip(parts, without, strict=True)]
        for group in range(count)
    ]


def _over_probes(
    parts: Sequence[Spectrum], statistic: Callable[[list[Spectrum]], Any], values: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers that are not negative, (...,), with the bias by the noise of probes taken off, and
    their standard errors; these are None where there is one probe.
    """
    groups = min((part.num_probes for part in parts if not part.exact), default=0)
    values = np.asarray(values)
    if groups < 2:
        return values, np.zeros_like(values) if groups == 0 else None
    left_out = np.stack(
        [
            statistic([without_probes(part, group, groups) for part in parts])
            for group in range(groups)
        ]
    )
    corrected = groups * values - (groups - 1) * left_out.mean(0)
    return np.maximum(corrected, 0.0), np.sqrt((groups - 1) * left_out.var(0))


SPECTRA_BY_NAME = "distances are between spectra of blocks: Spectra, or a mapping {name: Spectrum}"


def _beside_each_other(spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    """Without the full matrix, where there are other blocks: it overlaps each of them.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(spectra, Mapping):
        raise TypeError(f"{SPECTRA_BY_NAME}; got {type(spectra).__name__}")
    if wrong := [part for part in spectra.values() if not isinstance(part, Spectrum)]:
        raise TypeError(f"{SPECTRA_BY_NAME}; got one with {type(wrong[0]).__name__}")
    parts = {name: part for name, part in spectra.items() if part.block.kind != FULL}
    return parts or dict(spectra)


PER_PROBE = (
    "nodes",
    "weights",
    "residuals",
    "known",
    "single",
    "steps",
    "breakdown",
    "orthogonality",
    "steps_error",
)


def without_probes(part: Spectrum, group: int, groups: int) -> Spectrum:
    """The spectrum without every ``groups``-th probe, counted from ``group``; an exact one as it
    is.
    """
    if part.exact:
        return part
    kept = np.arange(part.num_probes) % groups != group
    rows = {name: getattr(part, name)[kept] for name in PER_PROBE}
    rows |= {} if part.apart is None else {"apart": part.apart[kept]}
    return replace(part, **rows, sample=None)


def _mean_over_pairs(distances: np.ndarray) -> float:
    return float(distances[np.triu_indices(len(distances), k=1)].mean())


def _distances(
    parts: list[Spectrum], definition: str, settings: Mapping[str, float | None]
) -> np.ndarray:
    if definition not in DEFINITIONS:
        raise ValueError(f"definition is one of {DEFINITIONS}, got {definition!r}")
    if not parts:
        raise ValueError("no spectra to compare: the mapping is empty")
    linear = settings["linear"] or _linear(parts)
    if definition == "resolved":
        return _resolved(parts, linear)
    rows = [(p.nodes.ravel(), p.weights.ravel() / p.num_probes) for p in parts]
    if definition == "wasserstein":
        return _pairwise(rows, wasserstein)
    if definition == "jensen-shannon":
        scaled = [(np.arcsinh(nodes / linear), weights) for nodes, weights in rows]
        return jensen_shannon(_masses(scaled, width=RELATIVE_WIDTH, points=POINTS, floor=0.0))
    width, points, floor = (settings[name] or 0.0 for name in ("width", "points", "floor"))
    return _symmetrised_kl(_masses(rows, width=width, points=int(points), floor=floor))


def _resolved(parts: list[Spectrum], linear: float) -> np.ndarray:
    ends = np.array([min(p.nodes.min() for p in parts), max(p.nodes.max() for p in parts)])
    low, high = linear * np.sinh(np.arcsinh(ends / linear) + np.array([-MARGIN, MARGIN]))
    grid = even_grid(low, high, linear)
    cells = np.gradient(grid)
    distances = np.zeros((len(parts), len(parts)))
    for i, first in enumerate(parts):
        for j, second in enumerate(parts[:i]):
            one = resolved_mean(first, grid, linear, like=second)
            other = resolved_mean(second, grid, linear, like=first)
            masses = np.stack([one, other]) * cells
            masses /= masses.sum(1, keepdims=True)
            distances[i, j] = distances[j, i] = jensen_shannon(masses)[0, 1]
    return distances


def _linear(parts: list[Spectrum]) -> float:
    sizes = [math.sqrt(part.moment(2).value) for part in parts if not part.is_zero]
    return float(np.median(sizes)) if sizes else 1.0


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
