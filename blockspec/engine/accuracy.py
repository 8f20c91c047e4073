"""How far an estimated spectrum is from the true one, as Wasserstein-1 distances in units of an eigenvalue.

Two errors add up. A probe's quadrature after m steps differs from the probe's own spectral measure (more steps help), and
that measure differs from the block's (more probes help).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.measures import (
    CONFIDENCE,
    NOTHING,
    likely_weights,
    probe_error,
    wasserstein,
)
from blockspec.numerics.quadrature import quadrature

NORM_KNOWN = (
    1e-2  # residual of the extreme Ritz value, relative: the tolerance is relative to the norm
)


@dataclass(frozen=True)
class Accuracy:
    """What is asked for; None leaves a number as it is set.

    tolerance: Wasserstein-1 error, relative to the block's spectral norm.
    num_steps, num_probes: fixed numbers, or None: as many as the tolerance needs, at most ``max_steps``, ``max_probes``.
    """

    num_steps: int | None
    num_probes: int | None
    tolerance: float
    max_steps: int = 300
    max_probes: int = 128

    @property
    def adaptive(self) -> bool:
        return self.num_steps is None or self.num_probes is None


def steps_error(tridiagonal: Tridiagonal) -> float:
    """Distance between a probe's quadrature and its spectral measure: the smaller of two estimates.

    One is a bound: by the Chebyshev-Markov-Stieltjes inequalities the true distribution function lies between the
    partial sums of the weights (Szego, "Orthogonal Polynomials", section 3.41). The other is the distance to the quadrature of
    half as many steps, which is an upper estimate where the error falls at least like 1 / m.
    """
    if tridiagonal.breakdown:
        return 0.0
    nodes, weights, residuals = quadrature(tridiagonal)
    steps = len(nodes)
    bound = float(
        np.diff(nodes) @ np.maximum(weights[:-1], weights[1:])
        + weights[[0, -1]] @ residuals[[0, -1]]
    )
    if steps < 4:
        return bound
    half = steps // 2
    coarse = Tridiagonal(tridiagonal.alphas[:half], tridiagonal.betas[:half], False, None, 0.0)
    return min(bound, wasserstein((nodes, weights), quadrature(coarse)[:2]))


def stands_still(
    tridiagonal: Tridiagonal, numel: int, accuracy: Accuracy, known: np.ndarray = NOTHING
) -> bool:
    """Whether one probe has taken enough steps: the spectral norm is known, and their error fits into what the probe's own error
    leaves of the tolerance, or into half of it.

    known: (c,) eigenvalues in whose complement the probe is.
    """
    nodes, _, residuals = quadrature(tridiagonal)
    extreme = int(np.argmax(np.abs(nodes)))
    if len(known) == 0 and residuals[extreme] > NORM_KNOWN * abs(nodes[extreme]):
        return False
    steps, noise, allowed = _errors([tridiagonal], numel, accuracy, known)
    return steps <= max(allowed - noise, allowed / 2)


def probes_needed(
    tridiagonals: Sequence[Tridiagonal], numel: int, accuracy: Accuracy, known: np.ndarray = NOTHING
) -> int:
    """Number of probes that the tolerance needs, going by those that are done; ``known`` as in :func:`stands_still`."""
    return _probes(*_errors(tridiagonals, numel, accuracy, known))


def probes_needed_beyond(
    tridiagonal: Tridiagonal, found: np.ndarray, numel: int, accuracy: Accuracy
) -> int:
    """The number in the complement of those Ritz vectors, (m,) true or false, of a probe."""
    return _probes(
        *_errors([tridiagonal], numel, accuracy, quadrature(tridiagonal)[0][found], left_out=found)
    )


def _errors(
    tridiagonals: Sequence[Tridiagonal],
    numel: int,
    accuracy: Accuracy,
    known: np.ndarray,
    *,
    left_out: np.ndarray | None = None,
) -> tuple[float, float, float]:
    """Of the whole spectrum: the error of the steps, the likely noise of one probe, and what is allowed for both."""
    rows = [quadrature(t) for t in tridiagonals]
    nodes, weights, residuals = (np.concatenate([row[i] for row in rows]) for i in range(3))
    left = numel - len(known)
    weights = likely_weights(nodes, weights, residuals, left)
    allowed = accuracy.tolerance * float(np.abs([*nodes, *known]).max())
    if left_out is not None:
        nodes, weights = nodes[~left_out], weights[~left_out]
    noise = CONFIDENCE * probe_error(nodes, weights, left)
    steps = float(np.mean([steps_error(t) for t in tridiagonals]))
    return left / numel * steps, left / numel * noise, allowed


def _probes(steps: float, noise: float, allowed: float) -> int:
    if noise == 0:
        return 1
    return max(1, math.ceil((noise / max(allowed - steps, allowed / 2)) ** 2))
