"""Lanczos: from products with a symmetric matrix to tridiagonal matrices. Knows nothing of models.

A :class:`Lanczos` is one probe's recurrence. It is driven from outside, a product at a time, so
that many of them can share a sweep over the data:

    while not recurrence.done:
        recurrence.advance(A @ recurrence.vector)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockspec.numerics.basis import Basis, fresh
from blockspec.numerics.portions import Portion
from blockspec.numerics.ranks import Ranks, Shared

CHUNK = 2**20  # entries whose float64 copy is small; see _dot

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-11}
"""What is left relative to the norm of A when rounding alone is left. float32: 16 eps; the bulk of
a network's spectrum begins not far above. float64: rounding of the first steps, amplified by later
small betas, was seen at 1e-12.
"""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """The matrix T = Q' A Q of one probe after m steps, and what tells how far to trust it.

    Args:
        alphas: (m,) diagonal, float64.
        betas: (m,) ``betas[:-1]`` is the off-diagonal; ``betas[-1]`` is the norm of what is left
            after the last step.
        breakdown: The probe lies in an invariant subspace of dimension m: the m Ritz values are
            eigenvalues.
        orthogonality: Max |Q'Q - I|; None where the basis was not kept, or is not finished.
        asymmetry: Norm of the coefficients that are zero for a symmetric matrix without rounding;
            same unit as A.
        beside: (m,) inner products of the Krylov vectors with another probe's start vector of norm
            1; None where there was none.
    """

    alphas: np.ndarray
    betas: np.ndarray
    breakdown: bool
    orthogonality: float | None
    asymmetry: float
    beside: np.ndarray | None = None


class Lanczos:
    """Lanczos recurrence of one start vector (Lanczos 1950; full reorthogonalisation as in Parlett,
    "The Symmetric Eigenvalue Problem", 1998, section 6.9: classical Gram-Schmidt, twice).

    Args:
        start: (P,) nonzero; normalised here.
        num_steps: Number of steps after which the recurrence is done, at most P. A breakdown ends
            it earlier.
        reorthogonalize: False keeps two vectors instead of ``num_steps``, at the price of repeated
            copies of converged eigenvalues: densities are not hurt, but counts of eigenvalues must
            not be read from the result.
        deflated: (c, P) orthonormal vectors; the recurrence runs in their complement. With
            ``reorthogonalize`` only.
        storage: Dtype and device of the kept vectors; None takes those of ``start``.
        ranks: Processes that run this recurrence together, with equal products, and share the kept
            vectors.
        beside: (P,) another probe's start vector; see :attr:`Tridiagonal.beside`.
        by_unit: Products of units of data will be asked for :meth:`along`. With several ``ranks``
            each process then keeps all of every vector, unless it has ``parts``.
        parts: Each of the ``ranks`` holds its part of every vector alone, ``start`` aside, and is
            given its part of the products; see :mod:`blockspec.numerics.portions`.
    """

    def __init__(
        self,
        start: Tensor,
        num_steps: int,
        *,
        reorthogonalize: bool = True,
        deflated: Tensor | None = None,
        storage: tuple[torch.dtype, torch.device] | None = None,
        ranks: Ranks | None = None,
        by_unit: bool = False,
        beside: Tensor | None = None,
        parts: bool = False,
    ) -> None:
        given = () if deflated is None else deflated
        self._deflated = len(given)
        for vector in given:
            start = start - _dot(vector, start) * vector
        norm = math.sqrt(_dot(start, start))
        if not 0 < norm < math.inf:
            raise ValueError(f"a start vector must have a positive finite norm, got {norm}")
        self.num_steps = min(num_steps, start.numel() - self._deflated)
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.breakdown = False
        self.asymmetry = 0.0
        self._beside = None if beside is None else beside / math.sqrt(_dot(beside, beside))
        self.products_beside: list[float] = []
        self.numel = start.numel()
        self.vector = start / norm
        """(P,) the vector whose product is wanted next; the process's part of it with ``parts``."""
        self._ranks = (ranks or Ranks()) if parts else None
        if self._ranks is not None:
            own = self._ranks.share(self.numel)
            self.vector = self.vector[own].clone()
            self._beside = None if self._beside is None else self._beside[own].clone()
        self._previous: Tensor | None = None
        dtype, device = storage or (start.dtype, start.device)
        assert reorthogonalize or deflated is None
        self._basis = None
        if reorthogonalize:
            self._basis = Basis(
                start.numel(),
                dtype=dtype,
                device=device,
                fixed=deflated,
                ranks=ranks,
                parts=parts,
            )
        self._whole = self._basis
        if by_unit and not parts and ranks is not None and ranks.rows > 1:
            self._whole = Basis(start.numel(), dtype=dtype, device=device)

    @property
    def request(self) -> Any:
        """What a product is asked for with: :attr:`vector`, or the Portion that it is."""
        if self._ranks is None:
            return self.vector
        return Portion(self.vector, self.numel, self._ranks)

    @property
    def done(self) -> bool:
        return self.remaining == 0

    @property
    def remaining(self) -> int:
        """Products that it will still ask for, unless it breaks down."""
        return 0 if self.breakdown else self.num_steps - len(self.alphas)

    @property
    def scale(self) -> float:
        """A bound on the norm of T, for relative thresholds; 0 before the first step."""
        return max((abs(a) + b for a, b in zip(self.alphas, self.betas, strict=True)), default=0.0)

    def step(self, product: Tensor) -> Shared[None]:
        """One step. ``product`` (P,) is A times :attr:`vector` and is overwritten. A generator, see
        :meth:`blockspec.numerics.ranks.Ranks.together`."""
        if self._beside is not None:
            self.products_beside.append((yield from self._dot(self.vector, self._beside)))
        alpha = (
            (yield from self._recurrence(product))
            if self._basis is None
            else (yield from self._project(product, self._basis))
        )
        beta = math.sqrt((yield from self._dot(product, product)))
        self.alphas.append(alpha)
        self.betas.append(beta)
        self.breakdown = beta <= ROUNDING[product.dtype] * self.scale
        if not self.breakdown:
            self._previous = self.vector if self._basis is None else None
            self.vector = product.mul_(1 / beta)

    def advance(self, product: Tensor) -> None:
        """One :meth:`step` of a recurrence that is not shared."""
        Ranks().together([self.step(product)])

    def tridiagonal(self, steps: int | None = None) -> Tridiagonal:
        """What has been found so far, or after the first ``steps`` steps."""
        found = len(self.alphas)
        steps = found if steps is None else steps
        return Tridiagonal(
            alphas=np.array(self.alphas[:steps]),
            betas=np.array(self.betas[:steps]),
            breakdown=self.breakdown and steps == found,
            orthogonality=None,
            asymmetry=self.asymmetry,
            beside=None if self._beside is None else np.array(self.products_beside[:steps]),
        )

    def along(self, product: Tensor) -> Tensor:
        """(j + 1,) coefficients of a part of the product with :attr:`vector`, along the j Krylov
        vectors so far and this one.
        """
        assert self._whole is not None
        return self._whole.along(product.to(self.vector), self.vector)

    def combined(self, coefficients: np.ndarray) -> Tensor:
        """(c, m) -> (c, P) combinations of the m Krylov vectors, which :meth:`finish` lets go."""
        assert self._basis is not None
        return self._basis.combined(torch.from_numpy(coefficients)).to(self.vector)

    def finish(self) -> Tridiagonal:
        """The final result; the vectors are let go."""
        orthogonality = None if self._basis is None else self._basis.orthogonality()
        found = replace(self.tridiagonal(), orthogonality=orthogonality)
        self._basis = self._whole = self._previous = self._beside = None
        self.vector = self.vector[:0]
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs to go on, bit by bit the same: tensors and plain numbers."""
        tensors = {"vector": self.vector}
        if self._previous is not None:
            tensors["previous"] = self._previous
        if self._basis is not None:
            tensors["basis"] = self._basis.matrix()
        if self._whole is not None and self._whole is not self._basis:
            tensors["whole"] = self._whole.matrix()
        numbers = {"alphas": self.alphas, "betas": self.betas, "asymmetry": self.asymmetry}
        return tensors, numbers | {"products_beside": self.products_beside}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Goes on from a state of the same start vector."""
        self.alphas, self.betas = list(numbers["alphas"]), list(numbers["betas"])
        self.asymmetry = numbers["asymmetry"]
        self.products_beside = list(numbers["products_beside"])
        self.vector = fresh(tensors["vector"]).to(self.vector)
        kept = tensors.get("previous")
        self._previous = None if kept is None else fresh(kept).to(self.vector)
        if self._basis is not None:
            self._basis.restore(tensors["basis"])
        if self._whole is not None and self._whole is not self._basis:
            self._whole.restore(tensors["whole"])

    def _project(self, product: Tensor, basis: Basis) -> Shared[float]:
        """Removes the basis from ``product`` in two passes; returns alpha.

        What leads out of the complement of the deflated vectors is no asymmetry.
        """
        basis.append(self.vector)
        if self._whole is not None and self._whole is not basis:
            self._whole.append(self.vector)
        coefficients = (yield from basis.project_out(product)).tolist()
        self.asymmetry = max(self.asymmetry, math.hypot(*coefficients[self._deflated : -2]))
        return coefficients[-1]

    def _recurrence(self, product: Tensor) -> Shared[float]:
        """The three-term recurrence."""
        if self._previous is not None:
            product.sub_(self._previous, alpha=self.betas[-1])
        alpha = yield from self._dot(self.vector, product)
        product.sub_(self.vector, alpha=alpha)
        return alpha

    def _dot(self, a: Tensor, b: Tensor) -> Shared[float]:
        """Inner product of vectors, from the parts of all processes where each has its own."""
        own = _dot(a, b)
        if self._ranks is None:
            return own
        return float((yield torch.tensor([own], dtype=torch.float64)))


def tridiagonalize(
    product: Callable[[Tensor], Tensor],
    starts: Tensor,
    num_steps: int,
    *,
    reorthogonalize: bool = True,
) -> list[Tridiagonal]:
    """The tridiagonal matrices of K start vectors: ``tridiagonalize(lambda V: V @ A, torch.randn(K,
    P), M)``.

    Args:
        product: (K, P) -> (K, P), row by row a product with the same symmetric matrix; it gets only
            the rows not done yet.
        starts: (K, P).
    """
    recurrences = [Lanczos(start, num_steps, reorthogonalize=reorthogonalize) for start in starts]
    while active := [recurrence for recurrence in recurrences if not recurrence.done]:
        products = product(torch.stack([recurrence.vector for recurrence in active]))
        for recurrence, row in zip(active, products, strict=True):
            recurrence.advance(row.clone())
    return [recurrence.finish() for recurrence in recurrences]


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in float64, in pieces: float32 sums over 10^8 entries lose four digits."""
    parts = [
        x.double().dot(y.double()) for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    ]
    return float(torch.stack(parts).sum())
