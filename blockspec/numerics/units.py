"""Units of data: what a matrix, which is a mean over units, would be without each one of them.

The matrix is ``H = sum of H_u / W``, where the unit u has the sum ``H_u`` over its loss terms. A
Lanczos run has the products ``H_u q`` in its hands before they are summed. Their coefficients along
the Krylov vectors so far are one small vector a unit and step, and since H_u is symmetric, they
fill ``Q' H_u Q`` in. So after m steps the small matrix of every unit is known, and that of all
other units: ``T - (Q' H_u Q / w - T) w / (W - w)``, with w the unit's number of terms. Its
eigenvalues are those of the matrix without the unit, to first order in how units differ.

From there on everything is a jackknife, see :mod:`blockspec.numerics.jackknife`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blockspec.numerics.jackknife import MOST_GROUPS
from blockspec.numerics.lanczos import Tridiagonal


@dataclass(frozen=True, eq=False)
class Layout:
    """Which group each unit belongs to: neighbours share one where there are more than
    ``MOST_GROUPS``.

    Attributes:
        ends: (U,) loss terms up to the end of each unit, in the order of the data.
        terms: (n,) loss terms of each group.
    """

    ends: np.ndarray
    terms: np.ndarray

    @classmethod
    def of(cls, terms: Sequence[float]) -> Layout:
        """For units with these numbers of loss terms, in the order of the data."""
        groups = min(len(terms), MOST_GROUPS)
        group = np.arange(len(terms)) * groups // len(terms)
        return cls(np.cumsum(terms), np.bincount(group, np.asarray(terms, dtype=np.float64)))

    @property
    def units(self) -> int:
        return len(self.ends)

    def groups(self, terms: Sequence[float]) -> np.ndarray:
        """(V,) the group of each of V units, whose numbers of terms are these: the layout's own, or
        the same data cut finer.
        """
        ends = np.cumsum(terms)
        middles = ends - np.asarray(terms) / 2
        borders = np.cumsum(self.terms)
        return np.minimum(np.searchsorted(borders, middles, side="right"), len(borders) - 1)


@dataclass(eq=False)
class Projections:
    """``Q' H_g Q`` of every group g, filled in a step at a time.

    ``rows`` holds for each step the coefficients (n, j) of the groups' products, along the Krylov
    vectors up to that step; sums over loss terms.
    """

    rows: list[Tensor] = field(default_factory=list)

    def matrices(self) -> np.ndarray:
        """(n, m, m), symmetric, float64."""
        steps = len(self.rows)
        found = np.zeros((len(self.rows[0]), steps, steps))
        for step, row in enumerate(self.rows):
            found[:, : step + 1, step] = found[:, step, : step + 1] = row.double().numpy()
        return found

    def state(self) -> Tensor:
        """(n, entries) all of it, for :meth:`restore`."""
        return torch.cat(self.rows, 1) if self.rows else torch.empty(0, 0)

    def restore(self, state: Tensor) -> None:
        """Takes what :meth:`state` gave."""
        self.rows, start = [], 0
        while start < state.shape[1]:
            length = len(self.rows) + 1
            self.rows.append(state[:, start : start + length].clone())
            start += length


def changes(sums: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """(n, ...) what the mean over loss terms changes by when each group is left out.

    Args:
        sums: (n, ...) over each group's loss terms, of matrices or anything else.
        terms: (n,) their numbers.
    """
    total, count = sums.sum(0), terms.sum()
    weights = terms.reshape(-1, *[1] * total.ndim)
    rest = np.where(count > weights, count - weights, np.inf)  # a group with all terms: no change
    return total / count * (weights / rest) - sums / rest


def without_each(sums: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """(n, ...) the mean over loss terms without each group; arguments as of :func:`changes`."""
    return sums.sum(0) / terms.sum() + changes(sums, terms)


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A probe's quadrature without each group: nodes and weights, both (n, m), ascending."""

    nodes: np.ndarray
    weights: np.ndarray


def left_out(tridiagonal: Tridiagonal, changed: np.ndarray) -> LeftOut:
    """The quadratures of ``T + change`` for each of the changes (n, m, m) of its first m steps."""
    m = len(tridiagonal.alphas)
    whole = np.diag(tridiagonal.alphas)
    off = np.arange(m - 1)
    whole[off, off + 1] = whole[off + 1, off] = tridiagonal.betas[:-1]
    nodes, vectors = np.linalg.eigh(whole + changed[:, :m, :m])
    return LeftOut(nodes, vectors[:, 0] ** 2)
