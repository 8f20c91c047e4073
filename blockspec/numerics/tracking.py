"""The extreme eigenpairs of a matrix that changes a little, from those that it had before.

The idea. A step of training hardly turns the eigenvectors. So the last step's Ritz vectors X, with
a few more than are wanted (the guards), are multiplied by the new matrix, and the best combinations
of them are found by Rayleigh and Ritz. Each pair's residual is known from the same products. It
says how good the pair is, and it is the best direction to look for a better one. So the residuals
of the pairs that are not good enough join the basis, are multiplied in turn, and so on: a block
Davidson method whose basis lasts for one step of training. It finds at least what block Lanczos
from the same vectors would find.

The guards are for crossings. A pair that is about to overtake the last wanted one is orthogonal to
it, so its residual would not show it. As a guard it is in the basis already.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockspec.numerics.algorithms import Algorithm
from blockspec.numerics.lanczos import ROUNDING

ENOUGH = 0.5  # of a length: what is left of it is orthogonal to rounding
SCOUTED = 5  # rounds: a random vector is amplified by the ratio of eigenvalues in each
Order = Callable[[np.ndarray], np.ndarray]
"""Of eigenvalues: what is to be large."""


@dataclass(frozen=True, eq=False)
class Ritz:
    """Ritz pairs, the wanted ones first.

    Args:
        values: (n,) Ritz values.
        vectors: (n, P) orthonormal.
        residuals: (n,) ``||A u - value u||``.
        products: How many were taken.
        rounds: In how many rounds; the products of one round share a pass over the data.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    products: int
    rounds: int


def refine(
    start: Tensor,
    wanted: int,
    order: Order,
    *,
    kept: int,
    tolerance: float,
    max_rounds: int,
    scout: Tensor | None = None,
) -> Algorithm[Ritz]:
    """The best Ritz pairs that a few rounds of products find from ``start``.

    Args:
        start: (m, P) with m >= ``wanted``: independent vectors, of any lengths.
        wanted: Pairs whose residuals have to fall below ``tolerance``.
        order: The pairs with the largest ``order(value)`` are wanted.
        kept: n, pairs that are returned.
        tolerance: Bound on a residual, relative to the magnitude of the Ritz value.
        max_rounds: Rounds of products at most; each takes the residuals of the pairs that are not
            good enough.
        scout: (P,) a random vector. Its Krylov space is looked through beside, for
            ``SCOUTED`` rounds at least, for what is orthogonal to all of ``start``.

    Returns:
        n pairs, or fewer where ``start`` spans less.
    """
    looked = start[:0] if scout is None else scout[None]
    new = orthonormal(torch.cat([start, looked]), start[:0])
    kept, products = min(kept, len(new)), 0
    bases, images_of = _Rows(new, 2 * wanted), _Rows(new[:0], len(new) + 2 * wanted)
    projected = np.empty((0, 0))
    rounds = max(max_rounds, SCOUTED if len(looked) else 0)
    for done in range(1, rounds + 1):
        image = yield new
        images_of.add(image)
        basis, images = bases.rows, images_of.rows
        products += len(new)
        projected = _grown(projected, image @ basis.T)
        values, turns = _ritz(projected, order)
        _, left, residuals = _pairs(basis, images, values[:wanted], turns)
        rough = residuals > tolerance * np.abs(values[:wanted])
        looked = images[-1:] if len(looked) and done < SCOUTED else looked[:0]
        if done == rounds or not (rough.any() or len(looked)):
            break
        new = orthonormal(torch.cat([left[torch.from_numpy(rough)], looked]), basis)
        if len(new) == 0:  # the basis spans an invariant space: nothing better is within reach
            break
        bases.add(new)
    vectors, _, residuals = _pairs(basis, images, values[:kept], turns)
    rounding = ROUNDING[basis.dtype] * np.abs(values).max()
    return Ritz(values[:kept], vectors, np.hypot(residuals, rounding), products, done)


class _Rows:
    """Rows (n, P) that others join: copying all of them each time would cost more than a product
    of a small batch.
    """

    def __init__(self, rows: Tensor, room: int) -> None:
        self._all = rows.new_empty(len(rows) + room, rows.shape[1])
        self._count = 0
        self.add(rows)

    def add(self, rows: Tensor) -> None:
        count = self._count + len(rows)
        if count > len(self._all):
            larger = self._all.new_empty(2 * count, self._all.shape[1])
            larger[: self._count] = self.rows
            self._all = larger
        self._all[self._count : count] = rows
        self._count = count

    @property
    def rows(self) -> Tensor:
        """Those that are there, a view."""
        return self._all[: self._count]


def orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """(m, P) orthonormal rows that span what ``vectors`` (n, P) add to the orthonormal rows of
    ``basis``, m <= n.

    Rows are taken one at a time. One that loses more than half of its length is projected a second
    time, because what is left is then not orthogonal to rounding. A row that adds nothing but
    rounding is left out.
    """
    rows: list[Tensor] = []
    for vector in vectors:
        length = vector.norm()
        if not float(length) > 0:
            continue
        row = vector / length
        for _ in range(2):
            row = row - basis.T @ (basis @ row)
            for other in rows:
                row = row - other * (other @ row)
            left = row.norm()
            if float(left) <= ROUNDING[row.dtype]:
                break
            row = row / left
            if float(left) > ENOUGH:
                break
        if float(left) > ROUNDING[row.dtype]:
            rows.append(row)
    return torch.stack(rows) if rows else vectors[:0]


def _grown(projected: np.ndarray, rows: Tensor) -> np.ndarray:
    """The projected matrix (n, n) with the rows (m, n) of the vectors that have joined the
    basis.
    """
    new = rows.double().cpu().numpy()
    old = len(projected)
    grown = np.empty((new.shape[1], new.shape[1]))
    grown[:old, :old] = projected
    grown[old:] = new
    grown[:old, old:] = new[:, :old].T
    grown[old:, old:] = (new[:, old:] + new[:, old:].T) / 2
    return grown


def _ritz(projected: np.ndarray, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values (n,), the best first, and their vectors' coefficients (n, n) as columns."""
    values, turns = np.linalg.eigh(projected)
    best = np.argsort(-order(values), kind="stable")
    return values[best], turns[:, best]


def _pairs(
    basis: Tensor, images: Tensor, values: np.ndarray, turns: np.ndarray
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Of the first Ritz values: vectors (m, P), what their products have beside them (m, P), and
    its lengths (m,).
    """
    turned = torch.as_tensor(turns[:, : len(values)].T.copy()).to(basis)
    vectors = turned @ basis
    column = torch.as_tensor(values).to(basis)[:, None]
    left = (turned @ images).addcmul_(vectors, column, value=-1)
    return vectors, left, left.norm(dim=1).double().cpu().numpy()
