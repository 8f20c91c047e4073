"""Blocks whose matrix is computed column by column."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from blockspec.numerics.basis import fresh
from blockspec.numerics.ranks import Shared


class Columns:
    """The work on a small block: it asks for the products with all P unit vectors, one after the
    other; driven like :class:`blockspec.numerics.lanczos.Lanczos`.
    """

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._columns: list[Tensor] = []
        self.asymmetry = 0.0
        """Frobenius norm of what :meth:`matrix` took away to symmetrise: (A - A') / 2."""
        self._eigenvalues: np.ndarray | None = None  # in the matrix's place, once they are known
        self._numel, self._dtype, self._device = numel, dtype, device

    @property
    def done(self) -> bool:
        return self.remaining == 0

    @property
    def remaining(self) -> int:
        """Products that it will still ask for."""
        return 0 if self._eigenvalues is not None else self._numel - len(self._columns)

    @property
    def vector(self) -> Tensor:
        """(P,) the next unit vector."""
        unit = torch.zeros(self._numel, dtype=self._dtype, device=self._device)
        unit[len(self._columns)] = 1
        return unit

    @property
    def request(self) -> Tensor:
        """What a product is asked for with: the whole vector, whoever shares the work."""
        return self.vector

    def __len__(self) -> int:
        """Columns so far."""
        return len(self._columns)

    def along(self, product: Tensor) -> Tensor:
        """(j + 1,) what a unit's symmetric matrix is filled in with: its column up to the
        diagonal.
        """
        return product[: len(self._columns) + 1].cpu()

    def step(self, product: Tensor) -> Shared[None]:
        """Takes the product with :attr:`vector`.

        A generator, as that of a Lanczos recurrence; it has nothing to sum.
        """
        self._columns.append(product.cpu())
        yield from ()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs to go on: the columns (n, P), or all eigenvalues (P,)."""
        if self._eigenvalues is not None:
            found = {"columns": torch.from_numpy(self._eigenvalues)}
            return found, {"asymmetry": self.asymmetry}
        return {
            "columns": torch.stack(self._columns) if self._columns else torch.empty(0, self._numel)
        }, {}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        if tensors["columns"].ndim == 1:
            self._eigenvalues = fresh(tensors["columns"]).numpy()
            self.asymmetry = numbers["asymmetry"]
            return
        self._columns = [fresh(column) for column in tensors["columns"]]

    def matrix(self) -> np.ndarray:
        """(P, P) the symmetrised matrix, float64; before :meth:`eigenvalues` is asked for."""
        matrix = np.empty((self._numel, self._numel))
        for row, column in zip(matrix, self._columns, strict=True):
            row[:] = column.double().numpy()
        squares = 0.0
        for i in range(self._numel):  # in place: a sum of the whole would take as much again
            squares += float(np.square(matrix[i, i:] - matrix[i:, i]).sum()) / 2
            matrix[i, i:] = matrix[i:, i] = (matrix[i, i:] + matrix[i:, i]) / 2
        self.asymmetry = math.sqrt(squares)
        return matrix

    def eigenvalues(self) -> np.ndarray:
        """(P,) ascending. The matrix is given up for them: of many blocks, it would be most of the
        memory.
        """
        if self._eigenvalues is None:
            matrix = self.matrix()
            self._columns = []
            # transposed, it lies in memory as LAPACK wants it, so that it is not copied
            found = scipy.linalg.eigvalsh(matrix.T, overwrite_a=True, check_finite=False)
            self._eigenvalues = found
        return self._eigenvalues

    @staticmethod
    def bytes_of(numel: int, dtype: torch.dtype) -> int:
        """Memory that the columns and the matrix of float64 take, at most."""
        return numel * numel * (dtype.itemsize + 8)
