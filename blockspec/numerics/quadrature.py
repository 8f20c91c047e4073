"""Gauss quadrature of a probe's spectral measure from its tridiagonal matrix."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.linalg import eigh_tridiagonal

from blockspec.numerics.lanczos import Tridiagonal


def quadrature(tridiagonal: Tridiagonal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and residuals, each (m,): Ritz values, squared first components of the
    eigenvectors of T, and ``beta_m |last component|`` (Golub and Welsch 1969; Parlett 1998, section
    13.2).
    """
    nodes, vectors, residuals = ritz_pairs(tridiagonal)
    return nodes, vectors[0] ** 2, residuals


@lru_cache(maxsize=16)  # the same matrix is asked about several times in a row
def ritz_pairs(tridiagonal: Tridiagonal) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values (m,) in ascending order, the coefficients of their vectors in the columns of (m,
    m), and residuals (m,).
    """
    nodes, vectors = eigh_tridiagonal(tridiagonal.alphas, tridiagonal.betas[:-1])
    return nodes, vectors, tridiagonal.betas[-1] * np.abs(vectors[-1])


def cut(tridiagonal: Tridiagonal, threshold: float) -> Tridiagonal:
    """Cut at the first step whose remainder is rounding: what follows it are ghosts.

    The scale of the matrix is known better at the end than on the way.
    """
    small = np.flatnonzero(tridiagonal.betas <= threshold)
    if len(small) == 0:
        return tridiagonal
    m = int(small[0]) + 1
    t = tridiagonal
    beside = None if t.beside is None else t.beside[:m]
    return Tridiagonal(t.alphas[:m], t.betas[:m], True, t.orthogonality, t.asymmetry, beside)
