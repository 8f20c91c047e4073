"""Lanczos with thick restarts: the extreme eigenpairs of a symmetric matrix in bounded memory.

Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockspec.numerics.algorithms import Algorithm
from blockspec.numerics.lanczos import ROUNDING

COLUMNS_AT_ONCE = 2**16  # of the Krylov vectors, when they are turned in place
# of the tolerance: what is locked is a little better, so that later rounds are not spoilt by it
MARGIN = 0.5
# of a search for what was missed: a first step sees the mean eigenvalue, with a deceptively small
# residual
FEWEST_STEPS = 10
LOOSE = 0.05  # of the largest that such a search has seen: its residual, before it is believed
# of what lies at the other end of the spectrum, to which a residual is relative where the value
# itself is smaller: an outlier there says nothing about this end, and values may be zero
OTHER_END = 1e-2
FEW = 20  # parameters, or twice as many as pairs are wanted: so small a matrix is done exactly


@dataclass(frozen=True, eq=False)
class Found:
    """Eigenpairs, see :class:`blockspec.toolbox.eigenpairs.Eigenpairs`."""

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    converged: np.ndarray
    complete: bool


@dataclass(frozen=True, eq=False)
class Round:
    """What one round has found: the wanted Ritz pairs, the best first; ``settled``: they have
    converged, or are known not to belong among the best; ``whole``: the round's vectors span all
    that there is, so nothing can be missing.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    settled: bool
    whole: bool


class Search:
    """The search for the k eigenpairs whose ``order(value)`` is largest.

    Args:
        draw: Gives for a number a random vector (P,).
        k: Number of pairs.
        order: What is largest for the pairs that are wanted, of all values at once.
        tolerance: Bound on the residual of each pair, relative to :meth:`own_scale`: with a bound
            relative to the norm of the whole matrix, everything in a bulk under a large outlier
            would count as found after one step.
        basis: Number of Krylov vectors that are kept; those that are found lie beside them.
        max_products: Number of products after which the search ends.

    Attributes:
        scale: The norm of the matrix, as far as it is known.
    """

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        k: int,
        order: Callable[[np.ndarray], np.ndarray],
        *,
        tolerance: float,
        basis: int,
        max_products: int,
    ) -> None:
        self.draw, self.k, self.order = draw, k, order
        self.tolerance, self.basis, self.max_products = tolerance, basis, max_products
        self.products = 0
        self.scale = 0.0
        self._rounding = 0.0
        self._last = math.inf  # the Ritz value of the lowest order seen
        self._leak = 0.0  # norm of the residuals of what is locked: other pairs have it in theirs
        self._drawn = 0

    def own_scale(self, values: np.ndarray) -> np.ndarray:
        """What the residual of each value is relative to: the value itself, so that neither an
        outlier before it nor one at the other end loosens the bound; but ``OTHER_END`` of the
        latter at least, and what rounding leaves of the residuals.
        """
        rounding = self._rounding * self.scale / self.tolerance
        last = 0.0 if math.isinf(self._last) else OTHER_END * abs(self._last)
        return np.maximum(np.abs(values), max(last, rounding))

    def run(self) -> Algorithm[Found]:
        """Rounds of Lanczos, each orthogonal to what was found, until one finds nothing that
        belongs among the k best.
        """
        vectors = self.draw(0)[None][:0]
        values, residuals, worst = np.empty(0), np.empty(0), -math.inf
        complete = False
        while not complete and self.products < self.max_products:
            part = yield from self._round(vectors, worst)
            margin = self.tolerance * self.own_scale(part.values[:1])[0]
            complete = part.settled and self.order(part.values).max() <= worst + margin
            if complete:
                break
            vectors = torch.cat([vectors, part.vectors])
            values, residuals = np.append(values, part.values), np.append(residuals, part.residuals)
            complete = part.whole
            if not part.settled:
                break
            worst = np.sort(self.order(values))[-self.k]
            self._leak = float(np.linalg.norm(residuals))
        best = np.argsort(-self.order(values), kind="stable")[: self.k]
        converged = residuals[best] <= self.tolerance * self.own_scale(values[best])
        return Found(values[best], vectors[best.tolist()], residuals[best], converged, complete)

    def _round(self, locked: Tensor, worst: float) -> Generator[Tensor, Tensor, Round]:
        """Thick-restart Lanczos in the complement of ``locked``: for k pairs at first, later for
        one better than ``worst``.
        """
        size = locked.shape[1] - len(locked)
        wanted = min(self.k if worst == -math.inf else 1, size)
        exactly = worst == -math.inf and size <= min(self.basis, max(2 * self.k + 1, FEW))
        space = Space(locked, min(self.basis, size))
        vector = self._fresh(space)
        steps = 0
        while True:
            product = (yield vector[None])[0]
            self.products += 1
            steps += 1
            left = space.add(vector, product)
            self.scale = max(self.scale, space.scale)
            whole = len(space) == size
            broken = left <= ROUNDING[product.dtype] * self.scale
            values, turns, residuals = space.ritz(0.0 if broken or whole else left)
            residuals = np.hypot(residuals, 32 * torch.finfo(product.dtype).eps * self.scale)
            best = np.argsort(-self.order(values), kind="stable")
            self._note(product.dtype, values[best[-1]])
            some = best[:wanted]
            enough = len(space) >= wanted and self._settled(
                values[some], residuals[some], worst, space, steps
            )
            settled = whole or (enough and not exactly)
            if settled or self.products >= self.max_products:
                found = space.turned(turns[:, some])
                return Round(values[some], found, residuals[some], settled, whole)
            if len(space) == space.room:
                kept = best[: wanted + (space.room - wanted) // 2]
                space.restart(values[kept], turns[:, kept])
            vector = self._fresh(space) if broken else product.mul_(1 / left)

    def _settled(
        self, values: np.ndarray, residuals: np.ndarray, worst: float, space: Space, steps: int
    ) -> bool:
        largest = residuals.max()
        near = (residuals <= MARGIN * self.tolerance * self.own_scale(values)).all()
        if worst == -math.inf or largest <= ROUNDING[space.vectors.dtype] * self.scale:
            return bool(near)
        visible = max(LOOSE * space.scale, self._rounding * self.scale, 2 * self._leak)
        seen = steps >= FEWEST_STEPS and largest <= visible
        below = self.order(values).max() + largest < worst
        return bool(seen and (below or near))

    def _note(self, dtype: torch.dtype, value: float) -> None:
        self._rounding = max(ROUNDING[dtype], 128 * torch.finfo(dtype).eps)
        if math.isinf(self._last) or self.order(np.array(value)) < self.order(np.array(self._last)):
            self._last = float(value)

    def _fresh(self, space: Space) -> Tensor:
        vector = self.draw(self._drawn)
        self._drawn += 1
        vector /= vector.norm()
        space.project_out(vector)
        vector /= vector.norm()
        space.project_out(vector)
        return vector / vector.norm()


class Space:
    """Orthonormal vectors, orthogonal to ``locked`` (l, P), and the matrix's projection on them.

    Args:
        locked: (l, P) orthonormal vectors of the pairs that are found.
        room: Largest number of vectors.

    Attributes:
        scale: Norm of the largest product seen: a lower bound on the norm of the matrix in this
            space.
    """

    def __init__(self, locked: Tensor, room: int) -> None:
        self.locked, self.room = locked, room
        self.vectors = locked.new_empty(room, locked.shape[1])
        self.scale = 0.0
        self._length = 0
        self._projected = np.zeros((room, room))
        self._leak = np.zeros(
            (len(locked), room)
        )  # into the locked vectors: they are not quite invariant

    def __len__(self) -> int:
        return self._length

    def add(self, vector: Tensor, product: Tensor) -> float:
        """Takes one more vector. Of its product, the part in the spaces is removed in place;
        returns the norm of what is left.
        """
        at = self._length
        self.vectors[at].copy_(vector)
        self._length += 1
        leak, inside = self.project_out(product)
        self._leak[:, at] = leak
        self._projected[at, : at + 1] = self._projected[: at + 1, at] = inside
        left = float(product.norm())
        self.scale = max(self.scale, math.hypot(*inside, left))
        return left

    def project_out(self, vector: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Removes from ``vector`` its parts in ``locked`` and in the space, in place and twice;
        returns their coefficients.
        """
        spaces = (self.locked, self.vectors[: self._length])
        coefficients = [np.zeros(len(space)) for space in spaces]
        for _ in range(2):
            for sums, space in zip(coefficients, spaces, strict=True):
                some = space @ vector
                vector.addmv_(space.T, some, alpha=-1)
                sums += some.double().cpu().numpy()
        return coefficients[0], coefficients[1]

    def ritz(self, left: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values (m,), their vectors in this basis as columns (m, m), and their residuals
        (m,).
        """
        m = self._length
        values, turns = np.linalg.eigh(self._projected[:m, :m])
        return (
            values,
            turns,
            np.hypot(left * np.abs(turns[-1]), np.linalg.norm(self._leak[:, :m] @ turns, axis=0)),
        )

    def turned(self, turns: np.ndarray) -> Tensor:
        """(r, P) the vectors with these coefficients (m, r)."""
        return torch.as_tensor(turns.T.copy()).to(self.vectors) @ self.vectors[: self._length]

    def restart(self, values: np.ndarray, turns: np.ndarray) -> None:
        """Keeps these Ritz vectors only."""
        matrix = torch.as_tensor(turns.T.copy()).to(self.vectors)
        for columns in self.vectors.split(COLUMNS_AT_ONCE, dim=1):
            columns[: len(values)] = matrix @ columns[: self._length]
        self._leak[:, : len(values)] = self._leak[:, : self._length] @ turns
        self._length = len(values)
        self._projected[:] = 0
        self._projected[range(len(values)), range(len(values))] = values
