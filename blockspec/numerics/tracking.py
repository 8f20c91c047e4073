"""The extreme eigenpairs of a matrix that changes a little, from those that it had before.

The idea. A step of training hardly turns the eigenvectors. So the last step's Ritz vectors X, with
a few more than are wanted (the guards), are multiplied by the new matrix, and the best combinations
of them are found by Rayleigh and Ritz. Each pair's residual is known from the same products. It
says how good the pair is, and it is the best direction to look for a better one. So the residuals
of the pairs that are not good enough join the basis, are multiplied in turn, and so on: a block
Davidson method whose basis lasts for one step of training. It finds at least what block Lanczos
from the same vectors would find.

How good a value is. An eigenvalue lies within the residual r of a Ritz value. Where a gap separates
it from what is left of the spectrum, the Ritz value is much nearer: within r^2 / gap (Temple 1928,
Kato 1949). The rest begins at the first guard's value, or above it by its residual at most. That is
an estimate, because an eigenvalue that no vector here has a part in may lie higher. So three times
that bound is taken as the value's error.

The guards are for crossings. A pair that is about to overtake the last wanted one is orthogonal to
it, so its residual would not show it. As a guard it is in the basis already, and it tells the gap.

Vectors are long and few here. For those of a large model a new tensor costs more than arithmetic,
because its memory has to be fetched page by page: sums are made in place, and rows are not copied.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockspec.numerics.algorithms import Algorithm
from blockspec.numerics.lanczos import ROUNDING

ENOUGH = 0.5  # of a length: what is left of it is orthogonal to rounding
SCOUTED = 5  # rounds: a random vector is amplified by the ratio of eigenvalues in each
SAFETY = 3  # times r^2 / gap, because the gap is an estimate
Order = Callable[[np.ndarray], np.ndarray]
"""Of eigenvalues: what is to be large."""


@dataclass(frozen=True, eq=False)
class Ritz:
    """Ritz pairs, the wanted ones first.

    Args:
        values: (n,) Ritz values.
        vectors: (n, P) orthonormal.
        residuals: (n,) ``||A u - value u||``.
        errors: (n,) of the values, estimated; the residual where no gap is known, as of guards.
        products: How many were taken.
        rounds: In how many rounds; the products of one round share a pass over the data.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    errors: np.ndarray
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
        wanted: Pairs whose errors have to fall below ``tolerance``.
        order: The pairs with the largest ``order(value)`` are wanted.
        kept: n, pairs that are returned.
        tolerance: Bound on a value's error, relative to its magnitude.
        max_rounds: Rounds of products at most; each takes the residuals of the pairs that are not
            good enough.
        scout: (P,) a random vector. Its Krylov space is looked through beside, for
            ``SCOUTED`` rounds at least, for what is orthogonal to all of ``start``.

    Returns:
        n pairs, or fewer where ``start`` spans less.
    """
    looked = start[:0] if scout is None else scout[None]
    new = start if len(looked) == 0 and _is_orthonormal(start) else None
    if new is None:
        new = orthonormal([*start, *looked], [])
    kept, products = min(kept, len(new)), 0
    basis: list[Tensor] = list(new)
    images: list[Tensor] = []
    projected = np.empty((0, 0))
    rounds = max(max_rounds, SCOUTED if len(looked) else 0)
    for done in range(1, rounds + 1):
        image = yield new
        images += image
        products += len(new)
        projected = _grown(projected, np.stack([_dots(basis, row) for row in image]))
        values, turns = _ritz(projected, order)
        left = [_left(basis, images, values[i], turns[:, i]) for i in range(wanted)]
        residuals = np.array([float(row.norm()) for row in left])
        allowed = tolerance * np.abs(values[:wanted])
        # the guard's residual is asked for where it decides: it takes as long as the pair's own
        if kept > wanted and (errors(values, [*residuals, 0.0], wanted, order) <= allowed).all():
            guard = _left(basis, images, values[wanted], turns[:, wanted])
            residuals = np.append(residuals, float(guard.norm()))
        rough = errors(values, residuals, wanted, order) > allowed
        looked = image[-1:] if len(looked) and done < SCOUTED else image[:0]
        if done == rounds or not (rough.any() or len(looked)):
            break
        wrong = [row for row, is_rough in zip(left, rough, strict=True) if is_rough]
        new = orthonormal([*wrong, *looked], basis)
        if len(new) == 0:  # the basis spans an invariant space: nothing better is within reach
            break
        basis += new
    for i in range(len(residuals), kept):
        guard = _left(basis, images, values[i], turns[:, i])
        residuals = np.append(residuals, float(guard.norm()))
    residuals = np.hypot(residuals, ROUNDING[start.dtype] * np.abs(values).max())
    found = np.append(errors(values, residuals, wanted, order), residuals[wanted:])
    vectors = torch.stack([_sum(basis, turns[:, i]) for i in range(kept)])
    return Ritz(values[:kept], vectors, residuals, found, products, done)


def errors(
    values: np.ndarray, residuals: Sequence[float] | np.ndarray, wanted: int, order: Order
) -> np.ndarray:
    """(wanted,) errors of the first Ritz values, estimated.

    Args:
        values: (m,) Ritz values, the best first.
        residuals: (n,) of the first of them, wanted <= n <= m.
        wanted: How many are wanted; the next one, the first guard, tells where the rest of the
            spectrum begins.
        order: What is to be large.
    """
    own = np.array(residuals[:wanted])
    if len(residuals) == wanted:
        return own
    ranks = order(values)
    gaps = ranks[:wanted] - (ranks[wanted] + residuals[wanted])
    with np.errstate(divide="ignore", invalid="ignore"):
        near = np.where(gaps > 0, SAFETY * own**2 / gaps, np.inf)
    return np.minimum(own, near)


def orthonormal(vectors: Sequence[Tensor] | Tensor, basis: Sequence[Tensor] | Tensor) -> Tensor:
    """(m, P) orthonormal rows that span what ``vectors`` (n, P) add to the orthonormal rows of
    ``basis``, m <= n.

    Rows are taken one at a time. One that loses more than half of its length is projected a second
    time, because what is left is then not orthogonal to rounding. A row that adds nothing but
    rounding is left out.
    """
    rows: list[Tensor] = []
    for vector in vectors:
        length = float(vector.norm())
        if not length > 0:
            continue
        row = vector / length
        for _ in range(2):
            around = [*basis, *rows]
            for other, dot in zip(around, _dots(around, row), strict=True):
                row.sub_(other, alpha=dot)
            left = float(row.norm())
            if left <= ROUNDING[row.dtype]:
                break
            row.div_(left)
            if left > ENOUGH:
                break
        if left > ROUNDING[row.dtype]:
            rows.append(row)
    if not rows:
        return vectors[0][None][:0]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _is_orthonormal(rows: Tensor) -> bool:
    identity = np.eye(len(rows))
    gram = np.stack([_dots(list(rows), row) for row in rows])
    return bool(np.abs(gram - identity).max() <= ROUNDING[rows.dtype])


def _dots(rows: Sequence[Tensor], vector: Tensor) -> np.ndarray:
    """(n,) of each row with a vector (P,); they leave the device together."""
    if not rows:
        return np.empty(0)
    return torch.stack([row.dot(vector) for row in rows]).double().cpu().numpy()


def _sum(rows: Sequence[Tensor], factors: np.ndarray) -> Tensor:
    """(P,) sum of factors times rows."""
    first, *others = rows
    total = first * float(factors[0])
    for row, factor in zip(others, factors[1:], strict=True):
        total.add_(row, alpha=float(factor))
    return total


def _left(
    basis: Sequence[Tensor], images: Sequence[Tensor], value: float, turn: np.ndarray
) -> Tensor:
    """(P,) what the product of a Ritz vector has beside it, A u - value u."""
    left = _sum(images, turn)
    for row, factor in zip(basis, turn, strict=True):
        left.sub_(row, alpha=float(value * factor))
    return left


def _grown(projected: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The projected matrix (n, n) with the rows (m, n) of the vectors that have joined the
    basis.
    """
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
