"""How far an estimated spectrum is from the true one, as Wasserstein-1 distances in units of an
eigenvalue.

Two errors add up, like the legs of a right triangle, since they are independent. A probe's
quadrature after m steps differs from the probe's own spectral measure (more steps help), and that
measure differs from the block's (more probes help). The first one is bounded by theory and, closer,
foreseen by what the residuals and gaps of the Ritz values say. The second one is played through,
see :mod:`blockspec.numerics.measures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.measures import NOTHING, Noisy, noisy, wasserstein
from blockspec.numerics.quadrature import quadrature

NORM_KNOWN = 1e-2
"""Residual of the extreme Ritz value, relative to it, at which the spectral norm counts as known.

The tolerance is relative to the norm, so a tolerance above this number needs the norm no better
than itself. A Ritz value is never above the norm: one that has not converged allows too small an
error, and not too large a one.
"""
STEPS_SHARE = 3**-0.5
"""What the steps may leave of the tolerance where several probes are needed.

Their error falls like 1 / m, the noise like 1 / sqrt(K); so K m is smallest where the square of the
error of the steps is a third of the tolerance's.
"""
WITHIN_GAPS, MOVED = 1.25, 1.0
"""Factors of the two estimates of the error of the steps.

On 752 quadratures the first one alone was 1.05 times the error at the median and 0.72 at worst, the
second one 2.1 times and 0.08; the larger one with these factors was never below the error: see
LOG.md.
"""
FEWEST_STEPS = 4  # before the quadrature of half as many steps says anything


@dataclass(frozen=True)
class Accuracy:
    """What is asked for; None leaves a number as it is set.

    Args:
        tolerance: Wasserstein-1 error, relative to the block's spectral norm.
        num_steps, num_probes: Fixed numbers, or None: as many as the tolerance needs, with at most
            ``max_steps`` a probe and ``max_products`` in all, then a warning says what was reached.
    """

    num_steps: int | None
    num_probes: int | None
    tolerance: float
    max_steps: int = 300
    max_products: int = 20_000

    @property
    def adaptive(self) -> bool:
        return self.num_steps is None or self.num_probes is None


def steps_error(tridiagonal: Tridiagonal) -> float:
    """Distance between a probe's quadrature and its spectral measure: the smallest of two bounds
    and an estimate.

    The estimate has two parts, of which the larger one counts. Each Ritz value's share is as far
    away from it as its residual says, or, where neighbours are nearer, a quarter of the harmonic
    mean of the gaps to both: between evenly spaced nodes, that is the mean distance to the nearest
    one. And the quadrature of half as many steps is about twice as far away.
    """
    if tridiagonal.breakdown:
        return 0.0
    nodes, weights, residuals = quadrature(tridiagonal)
    bound = min(_separation_bound(nodes, weights, residuals), float(np.sqrt(weights) @ residuals))
    if len(nodes) < FEWEST_STEPS:
        return bound
    half = len(nodes) // 2
    coarse = Tridiagonal(tridiagonal.alphas[:half], tridiagonal.betas[:half], False, None, 0.0)
    moved = wasserstein((nodes, weights), quadrature(coarse)[:2])
    spread = weights @ np.minimum(residuals, _gaps(nodes) / 4)
    return min(bound, max(MOVED * moved, WITHIN_GAPS * float(spread)))


def _gaps(nodes: np.ndarray) -> np.ndarray:
    """(m,) the harmonic mean of the gaps to both neighbours; at the ends, the gap to the one."""
    gaps = np.maximum(np.diff(nodes), np.finfo(float).tiny)
    return 2 / (1 / np.append(gaps[:1], gaps) + 1 / np.append(gaps, gaps[-1:]))


def _separation_bound(nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray) -> float:
    """By the Chebyshev-Markov-Stieltjes inequalities the true distribution function lies between
    the partial sums of the weights (Szego, "Orthogonal Polynomials", section 3.41): between two
    nodes it is off by the larger of their weights at most.

    Beyond the first node x with weight w and residual r, what counts is the integral of x - t over
    the measure m there. Its mass is at most w. The Lagrange polynomial l of x is at least 1 there,
    and w r^2 is the integral of (t - x)^2 l^2 over all of m; so that of (x - t)^2 is at most w r^2,
    and by Cauchy-Schwarz that of x - t at most w r. Likewise beyond the last one.

    The other bound, sum of sqrt(w) r: with y the Ritz vectors, v = sum of sqrt(w) y, and for a
    function f of slope 1 at most, v'f(A)v - sum of w f(x) is the sum of sqrt(w) v'(f(A) - f(x))y,
    where the length of (f(A) - f(x))y is at most r.
    """
    ends = weights[[0, -1]] @ residuals[[0, -1]]
    return float(np.diff(nodes) @ np.maximum(weights[:-1], weights[1:]) + ends)


def stands_still(
    tridiagonal: Tridiagonal, numel: int, accuracy: Accuracy, known: np.ndarray = NOTHING
) -> bool:
    """Whether one probe has taken enough steps: the spectral norm is known, and their error fits
    into what the probe's own error leaves of the tolerance, or into ``STEPS_SHARE`` of it.

    Args:
        known: (c,) eigenvalues in whose complement the probe is.
    """
    nodes, _, residuals = quadrature(tridiagonal)
    extreme = int(np.argmax(np.abs(nodes)))
    norm_known = max(NORM_KNOWN, accuracy.tolerance) * abs(nodes[extreme])
    if len(known) == 0 and residuals[extreme] > norm_known:
        return False
    errors = _of([tridiagonal], numel, accuracy, known)
    if errors.steps > errors.allowed:  # most often; the noise takes longer to play through
        return False
    left = math.sqrt(max(0.0, errors.allowed**2 - errors.noise(1) ** 2))
    return errors.steps <= max(left, STEPS_SHARE * errors.allowed)


def steps_needed(tridiagonal: Tridiagonal, numel: int, accuracy: Accuracy) -> int:
    """After how many steps a probe stood still, to two of them."""
    found = len(tridiagonal.alphas)
    low, high = 0, -(-found // 2)  # pairs of steps: not still after low, still after high
    while high - low > 1:
        middle = (low + high) // 2
        steps = min(2 * middle, found)
        part = Tridiagonal(tridiagonal.alphas[:steps], tridiagonal.betas[:steps], False, None, 0.0)
        low, high = (low, middle) if stands_still(part, numel, accuracy) else (middle, high)
    return min(2 * high, found)


def probes_needed(
    tridiagonals: Sequence[Tridiagonal], numel: int, accuracy: Accuracy, known: np.ndarray = NOTHING
) -> int:
    """Number of probes that the tolerance needs, going by those that are done; ``known`` as in
    :func:`stands_still`.
    """
    return _of(tridiagonals, numel, accuracy, known).probes()


def probes_needed_beyond(
    tridiagonal: Tridiagonal, found: np.ndarray, numel: int, accuracy: Accuracy
) -> int:
    """The number in the complement of those Ritz vectors, (m,) true or false, of a probe."""
    values = quadrature(tridiagonal)[0][found]
    return _of([tridiagonal], numel, accuracy, values, left_out=found).probes()


@dataclass(frozen=True, eq=False)
class _Errors:
    """Of the whole spectrum: the error of the steps, what is allowed for it and the noise of the
    probes together, and what is noisy: ``share`` of the eigenvalues.
    """

    steps: float
    allowed: float
    seen: Noisy
    share: float

    def noise(self, probes: float) -> float:
        """Of so many probes."""
        return self.share * self.seen.noise(probes)

    def probes(self) -> int:
        """How many probes bring the noise below what the steps leave.

        It falls like one over the root of their number, and at first, where few eigenvalues make
        most of it, somewhat faster.
        """
        room = math.sqrt(max(self.allowed**2 - self.steps**2, self.allowed**2 / 4))
        wanted = 1.0
        for _ in range(4):
            if room > 0:
                wanted = max(1.0, wanted * (self.noise(wanted) / room) ** 2)
        return math.ceil(wanted)


def _of(
    tridiagonals: Sequence[Tridiagonal],
    numel: int,
    accuracy: Accuracy,
    known: np.ndarray,
    *,
    left_out: np.ndarray | None = None,
) -> _Errors:
    rows = [quadrature(t) for t in tridiagonals]
    nodes, weights, residuals = (np.concatenate([row[i] for row in rows]) for i in range(3))
    left = numel - len(known)
    allowed = accuracy.tolerance * float(np.abs([*nodes, *known]).max())
    if left_out is not None:
        nodes, weights, residuals = (a[~left_out] for a in (nodes, weights, residuals))
    steps = left / numel * float(np.mean([steps_error(t) for t in tridiagonals]))
    return _Errors(steps, allowed, noisy(nodes, weights, residuals, left, len(rows)), left / numel)
