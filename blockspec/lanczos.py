"""Lanczos: from products with a symmetric matrix to tridiagonal matrices. Knows nothing of models.

A :class:`Lanczos` is one probe's process. It is driven from outside, a product at a time, so that many of them can share a
sweep over the data:

    while not process.done:
        process.advance(A @ process.vector)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # entries whose float64 copy is small; see _dot

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-11}
"""What is left relative to the norm of A when rounding alone is left. float32: 16 eps; the bulk of a network's spectrum begins
not far above. float64: rounding of the first steps, amplified by later small betas, was seen at 1e-12."""


@dataclass(frozen=True)
class Tridiagonal:
    """The matrix T = Q' A Q of one probe after m steps, and what tells how far to trust it.

    alphas: (m,) diagonal, float64.
    betas: (m,) ``betas[:-1]`` is the off-diagonal; ``betas[-1]`` is the norm of what is left after the last step.
    breakdown: the probe lies in an invariant subspace of dimension m: the m Ritz values are eigenvalues.
    orthogonality: max |Q'Q - I|, or None where the basis was not kept.
    asymmetry: norm of the coefficients that are zero for a symmetric matrix without rounding; same unit as A.
    """

    alphas: np.ndarray
    betas: np.ndarray
    breakdown: bool
    orthogonality: float | None
    asymmetry: float


class Lanczos:
    """Lanczos process of one start vector (Lanczos 1950; full reorthogonalisation as in Parlett, "The Symmetric Eigenvalue
    Problem", 1998, section 6.9: classical Gram-Schmidt, twice).

    start: (P,) nonzero; normalised here.
    num_steps: steps after which it is done, at most P of them; it is done earlier after a breakdown.
    reorthogonalize: False keeps two vectors instead of ``num_steps``, at the price of repeated copies of converged
        eigenvalues: densities are not hurt, but counts of eigenvalues must not be read from the result.
    """

    def __init__(self, start: Tensor, num_steps: int, *, reorthogonalize: bool = True) -> None:
        norm = math.sqrt(_dot(start, start))
        if not 0 < norm < math.inf:
            raise ValueError(f"a start vector must have a positive finite norm, got {norm}")
        self.num_steps = min(num_steps, start.numel())
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.breakdown = False
        self.asymmetry = 0.0
        self._reorthogonalize = reorthogonalize
        self._basis = start.new_empty((self.num_steps if reorthogonalize else 2, start.numel()))
        self._basis[0] = start / norm

    @property
    def done(self) -> bool:
        return self.remaining == 0

    @property
    def remaining(self) -> int:
        """Products that it will still ask for, unless it breaks down."""
        return 0 if self.breakdown else self.num_steps - len(self.alphas)

    @property
    def vector(self) -> Tensor:
        """(P,) the vector whose product is wanted next."""
        return self._basis[self._row(len(self.alphas))]

    @property
    def scale(self) -> float:
        """A bound on the norm of T, for relative thresholds; 0 before the first step."""
        return max((abs(a) + b for a, b in zip(self.alphas, self.betas, strict=True)), default=0.0)

    def advance(self, product: Tensor, *, scale: float = 0.0) -> None:
        """One step. ``product`` (P,) is A times :attr:`vector` and is overwritten; ``scale`` is what is known of the norm
        of A from elsewhere (other probes of the same matrix)."""
        step = len(self.alphas)
        if self._reorthogonalize:
            alpha = self._project(product, self._basis[: step + 1])
        else:
            alpha = self._project_two(product)
        beta = math.sqrt(_dot(product, product))
        self.alphas.append(alpha)
        self.betas.append(beta)
        if beta <= ROUNDING[product.dtype] * max(scale, self.scale):
            self.breakdown = True
        elif not self.done:
            torch.mul(product, 1 / beta, out=self._basis[self._row(step + 1)])

    def tridiagonal(self) -> Tridiagonal:
        """What has been found so far."""
        return Tridiagonal(
            alphas=np.array(self.alphas),
            betas=np.array(self.betas),
            breakdown=self.breakdown,
            orthogonality=self._orthogonality(),
            asymmetry=self.asymmetry,
        )

    def _row(self, step: int) -> int:
        return step if self._reorthogonalize else step % 2

    def _project(self, product: Tensor, basis: Tensor) -> float:
        """Removes the basis (m, P) from ``product`` in two passes; returns alpha."""
        first = basis @ product
        product.addmv_(basis.T, first, alpha=-1)
        second = basis @ product
        product.addmv_(basis.T, second, alpha=-1)
        coefficients = (first.double() + second.double()).tolist()
        self.asymmetry = max(self.asymmetry, math.hypot(*coefficients[:-2]) if len(coefficients) > 2 else 0.0)
        return coefficients[-1]

    def _project_two(self, product: Tensor) -> float:
        """The three-term recurrence."""
        step = len(self.alphas)
        if step > 0:
            product.sub_(self._basis[self._row(step - 1)], alpha=self.betas[-1])
        alpha = _dot(self.vector, product)
        product.sub_(self.vector, alpha=alpha)
        return alpha

    def _orthogonality(self) -> float | None:
        if not self._reorthogonalize:
            return None
        basis = self._basis[: len(self.alphas)]
        gram = basis @ basis.T
        return float((gram - torch.eye(len(basis), dtype=gram.dtype, device=gram.device)).abs().max())


def tridiagonalize(
    product: Callable[[Tensor], Tensor], starts: Tensor, num_steps: int, *, reorthogonalize: bool = True
) -> list[Tridiagonal]:
    """The tridiagonal matrices of K start vectors: ``tridiagonalize(lambda V: V @ A, torch.randn(K, P), M)``.

    product: (K, P) -> (K, P), row by row a product with the same symmetric matrix; it gets only the rows not done yet.
    starts: (K, P).
    """
    processes = [Lanczos(start, num_steps, reorthogonalize=reorthogonalize) for start in starts]
    while active := [process for process in processes if not process.done]:
        products = product(torch.stack([process.vector for process in active]))
        scale = max(process.scale for process in processes)
        for process, row in zip(active, products, strict=True):
            process.advance(row.clone(), scale=scale)
    return [process.tridiagonal() for process in processes]


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in float64, in pieces: float32 sums over 10^8 entries lose four digits."""
    parts = [x.double().dot(y.double()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)]
    return float(torch.stack(parts).sum())
