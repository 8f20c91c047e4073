"""The orthonormal Krylov vectors of one probe, kept wherever there is room."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16  # vectors that are allocated at once, unless they are large
LARGE = 2**20  # entries


class Basis:
    """Vectors q_1 ... q_m (P,) that are only ever appended to and projected out.

    dtype, device: of the storage; None takes those of the vectors. bfloat16 halves the memory of float32 at the price of an
        orthogonality of about 2^-9 / sqrt(P) between vectors (see LOG.md); arithmetic is in the vectors' own dtype.
    """

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.numel = numel
        self._dtype, self._device = dtype, torch.device(device)
        self._chunks: list[Tensor] = []  # (rows, P), all full but the last
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, vector: Tensor) -> None:
        """Stores a copy of ``vector`` (P,)."""
        rows = ROWS if self.numel < LARGE else 1
        place = self._length % rows
        if place == 0:
            self._chunks.append(torch.empty(rows, self.numel, dtype=self._dtype, device=self._device))
        self._chunks[-1][place].copy_(vector)
        self._length += 1

    def project_out(self, vector: Tensor) -> Tensor:
        """Subtracts from ``vector`` (P,), in place, its part in the span; returns its coefficients (m,)."""
        coefficients = torch.cat([rows.to(vector) @ vector for rows in self._rows()])
        start = 0
        for rows in self._rows():
            vector.addmv_(rows.to(vector).T, coefficients[start : start + len(rows)], alpha=-1)
            start += len(rows)
        return coefficients

    def orthogonality(self) -> float:
        """max |Q'Q - I|, of the vectors as they are stored."""
        wide = torch.promote_types(self._dtype, torch.float32)
        worst = 0.0
        for i, rows in enumerate(self._rows()):
            for j, others in enumerate(self._rows()[: i + 1]):
                gram = rows.to(wide) @ others.to(wide).T
                if i == j:
                    gram.diagonal().sub_(1)
                worst = max(worst, float(gram.abs().max()))
        return worst

    def matrix(self) -> Tensor:
        """(m, P) a copy of all of them."""
        return torch.cat(list(self._rows())) if self._length else torch.empty(0, self.numel, dtype=self._dtype)

    def _rows(self) -> list[Tensor]:
        left = self._length
        rows = []
        for chunk in self._chunks:
            rows.append(chunk[: min(left, len(chunk))])
            left -= len(chunk)
        return rows
