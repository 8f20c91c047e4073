"""Eigenvalues that the first probe of a block has found, so that further probes need not find them
again.

Most of a probe's noise is the random share that each of the largest eigenvalues has in it. Once
their vectors are known they count with their exact weight 1 / P, and further probes stay in the
orthogonal complement, where the rest of the spectrum is, other copies of a repeated eigenvalue
among it. The idea is that of Hutch++ (Meyer et al. 2021), for a density.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockspec.engine.accuracy import (
    Accuracy,
    probes_needed,
    probes_needed_beyond,
    steps_needed,
)
from blockspec.numerics.lanczos import Lanczos, Tridiagonal
from blockspec.numerics.quadrature import quadrature, ritz_pairs
from blockspec.spectra.singles import SIMPLE

# residual, relative to the norm: together they move the spectrum by less than twice that over P
CONVERGED = 1e-5
MOST_VECTORS = 128
LARGEST = 2**16  # parameters: larger blocks need few probes
FEWEST_PROBES = 3  # that the first one is given up for
STEPS_BEYOND = 20  # that a probe typically takes in the complement
ASKED_EVERY = 8  # steps: the answer takes time itself
HOPELESS = 8  # times as many parameters as steps, where all columns would still be cheaper
LONGEST = 4  # times as many parameters as the first probe takes steps, at least


@dataclass(frozen=True, eq=False)
class Deflation:
    """c eigenpairs of a block.

    Args:
        values, residuals: (c,) unit of an eigenvalue.
        leak: What leads from the complement to the vectors, at most: the norm of all residuals.
        vectors: (c, P) orthonormal; (0, P) when no run will need them.
        steps: After which the run that found them stood still: about as many as another one takes.
        left_out: (n, c) the values without each group of data; None where they are not known.
    """

    values: np.ndarray
    residuals: np.ndarray
    leak: float
    vectors: Tensor
    steps: int
    left_out: np.ndarray | None = None


def pays(tridiagonal: Tridiagonal, numel: int, accuracy: Accuracy) -> bool:
    """Whether the first probe, which stands still, should go on, to find more eigenvalues: while it
    has taken fewer products than the probes beyond it would.
    """
    steps = len(tridiagonal.alphas)
    if LONGEST * steps >= numel or _needed(tridiagonal, numel, accuracy) < FEWEST_PROBES:
        return False
    if steps % ASKED_EVERY > 0:
        return True
    found = _found(tridiagonal, numel)
    beyond = STEPS_BEYOND * probes_needed_beyond(tridiagonal, found, numel, accuracy)
    hopeless = HOPELESS * steps >= numel and steps + beyond >= numel
    return steps < beyond and not hopeless


def deflation(
    run: Lanczos, numel: int, accuracy: Accuracy, changed: np.ndarray | None = None
) -> tuple[Deflation, int] | None:
    """What the first probe of a block has found, before its vectors are let go, and how many probes
    are needed beyond it; None where that saves no probe.

    Args:
        run: Of the first probe.
        numel: P.
        accuracy: What is asked for.
        changed: (n, m, m) by which the run's matrix changes without each group of data.
    """
    tridiagonal = run.tridiagonal()
    needed = _needed(tridiagonal, numel, accuracy)
    if needed < FEWEST_PROBES:
        return None
    found = _found(tridiagonal, numel)
    beyond = probes_needed_beyond(tridiagonal, found, numel, accuracy)
    if 1 + beyond >= needed:
        return None
    nodes, vectors, residuals = ritz_pairs(tridiagonal)
    pairs = run.combined(np.ascontiguousarray(vectors[:, found].T))
    known = Deflation(
        values=nodes[found],
        residuals=np.hypot(residuals[found], tridiagonal.asymmetry),
        leak=float(np.linalg.norm(residuals[found])),
        vectors=torch.linalg.qr(pairs.T).Q.T.contiguous(),
        steps=steps_needed(tridiagonal, numel, accuracy),
        left_out=None if changed is None else _without(nodes[found], vectors[:, found], changed),
    )
    return known, beyond


def _without(values: np.ndarray, vectors: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """(n, c) eigenvalues, within the span of the vectors (m, c), of the matrix without each
    group.
    """
    return np.linalg.eigvalsh(np.diag(values) + vectors.T @ changed @ vectors)


def longest_first_probe(numel: int, accuracy: Accuracy) -> int:
    """Steps that the first probe of a block takes at most, to foresee its memory."""
    return min(accuracy.max_steps, numel // LONGEST)


def _needed(tridiagonal: Tridiagonal, numel: int, accuracy: Accuracy) -> int:
    """Probes that are needed without a deflation; 0 of a block that is too large for one, and after
    a breakdown.
    """
    return (
        0
        if numel > LARGEST or tridiagonal.breakdown
        else probes_needed([tridiagonal], numel, accuracy)
    )


def _found(tridiagonal: Tridiagonal, numel: int) -> np.ndarray:
    """(m,) which Ritz pairs are eigenpairs, of single eigenvalues: the largest in magnitude,
    ``MOST_VECTORS`` at most.
    """
    nodes, weights, residuals = quadrature(tridiagonal)
    found = (residuals <= CONVERGED * np.abs(nodes).max()) & (weights <= SIMPLE / numel)
    found[np.argsort(-np.abs(nodes) * found)[MOST_VECTORS:]] = False
    return found
