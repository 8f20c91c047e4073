"""The orthonormal Krylov vectors of one probe, kept wherever there is room."""

from __future__ import annotations

import torch
from torch import Tensor

from blockspec.numerics.portions import along as along_portions
from blockspec.numerics.ranks import Ranks, Shared

FEWEST, ROWS = 4, 16  # vectors that are allocated at once, unless they are large
LARGE = 2**20  # entries


def fresh(tensor: Tensor) -> Tensor:
    """A copy in memory of its own.

    Tensors read from a file or cut from a message begin anywhere, new ones at a multiple of 64
    bytes, and sums over the same numbers differ in the last bit by where they begin. What is
    restored must be what it was.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def rows_at_once(length: int, numel: int) -> int:
    """For how many vectors memory is taken when ``length`` of them are full: a few at first,
    because a GPU, unlike a CPU, gives memory at once that is not written to yet.
    """
    return min(max(length, FEWEST), ROWS) if numel < LARGE else 1


def rows_taken(count: int, numel: int) -> int:
    """For how many vectors memory is taken by so many of them."""
    taken = 0
    while taken < count:
        taken += rows_at_once(taken, numel)
    return taken


class Basis:
    """Vectors q_1 ... q_m (P,) that are only ever appended to and projected out.

    Args:
        fixed: (c, P) orthonormal vectors that are projected out too and come first in coefficients;
            not copied, where their type and place allow it.
        dtype, device: How and where the vectors are kept; None: as they come. bfloat16 halves the
            memory of float32 at the price of an orthogonality of about 2^-9 / sqrt(P) between
            vectors (see LOG.md); arithmetic is in the vectors' own dtype.
        ranks: Processes that share the vectors, each keeping a part of every one.
        parts: The vectors that come in are this process's parts too, and not whole.
    """

    def __init__(
        self,
        numel: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        fixed: Tensor | None = None,
        ranks: Ranks | None = None,
        parts: bool = False,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._parts = parts
        self._whole = numel
        self._part = self._ranks.share(numel)
        self.numel = self._part.stop - self._part.start
        """Entries of each vector that are kept here."""
        self._dtype, self._device = dtype, torch.device(device)
        self._fixed = [] if fixed is None else [fixed[:, self._part].to(self._device, dtype)]
        self._chunks: list[Tensor] = []  # (rows, P), all full but the last
        self._length, self._taken = 0, 0

    def __len__(self) -> int:
        return self._length

    def append(self, vector: Tensor) -> None:
        """Stores a copy of ``vector`` (P,)."""
        self._append(self._own(vector))

    def project_out(self, vector: Tensor) -> Shared[Tensor]:
        """Subtracts from ``vector`` (P,), in place, its part in the span, twice (the second time
        removes what rounding left); returns its coefficients (m,) in float64. A generator, see
        :meth:`blockspec.numerics.ranks.Ranks.together`.
        """
        part = self._own(vector)
        chunks = self._rows()
        sizes = [len(rows) for rows in chunks]
        coefficients = torch.zeros(sum(sizes), dtype=torch.float64, device=vector.device)
        for _ in range(2):
            found = yield torch.cat([rows.to(part) @ part for rows in chunks])
            for rows, along in zip(chunks, found.split(sizes), strict=True):
                part.addmv_(rows.to(part).T, along, alpha=-1)
            coefficients += found
        if self._ranks.rows > 1 and not self._parts:
            vector[: self._part.start] = 0
            vector[self._part.stop :] = 0
            vector.copy_((yield vector))
        return coefficients

    def along(self, vector: Tensor, last: Tensor) -> Tensor:
        """(m + 1,) coefficients of ``vector`` (P,), which is left alone, along all that were
        appended, and along ``last`` (P,), which was not.

        The vectors stay where they are kept, because there is more of them. There is a call for
        every unit of data, so it takes as few operations as may be. Where ``parts`` of them are
        kept, ``last`` is a part too, and ``vector`` is whole, and another one on each process.
        """
        if self._parts:
            return along_portions([*self._appended(), last[None]], vector, self._ranks)
        assert self._ranks.rows == 1
        part = vector if vector.device == self._device else vector.to(self._device)
        same = self._dtype == part.dtype
        rows = [(rows if same else rows.to(part.dtype)) @ part for rows in self._appended()]
        newest = torch.dot(last, vector)[None]
        if rows and rows[0].device != newest.device:
            rows = [found.to(newest.device) for found in rows]
        return torch.cat([*rows, newest]) if rows else newest

    def orthogonality(self) -> float:
        """max |Q'Q - I|, of the vectors as they are stored, the fixed ones among them."""
        wide = torch.promote_types(self._dtype, torch.float32)
        chunks = self._rows()
        pairs = [(i, j) for i in range(len(chunks)) for j in range(i + 1)]
        grams = self._ranks.sums([chunks[i].to(wide) @ chunks[j].to(wide).T for i, j in pairs])
        for (i, j), gram in zip(pairs, grams, strict=True):
            if i == j:
                gram.diagonal().sub_(1)
        return max(float(gram.abs().max()) for gram in grams)

    def combined(self, coefficients: Tensor) -> Tensor:
        """(c, m) coefficients of all that were appended -> (c, P) their combinations, whole on
        every process.
        """
        found = torch.zeros(len(coefficients), self._whole, dtype=self._dtype, device=self._device)
        chunks = self._appended()
        for rows, share in zip(
            chunks, coefficients.split([len(rows) for rows in chunks], dim=1), strict=True
        ):
            found[:, self._part].addmm_(share.to(found), rows)
        return self._ranks.sums([found])[0]

    def matrix(self) -> Tensor:
        """(m, P) what is kept here of all that were appended, a copy."""
        return torch.cat(
            [torch.empty(0, self.numel, dtype=self._dtype, device=self._device), *self._appended()]
        )

    def restore(self, matrix: Tensor) -> None:
        """Appends what :meth:`matrix` gave."""
        for row in matrix:
            self._append(row)

    def _own(self, vector: Tensor) -> Tensor:
        return vector if self._parts else vector[self._part]

    def _append(self, part: Tensor) -> None:
        if self._length == self._taken:
            rows = rows_at_once(self._taken, self.numel)
            self._chunks.append(
                torch.empty(rows, self.numel, dtype=self._dtype, device=self._device)
            )
            self._taken += rows
        self._chunks[-1][self._length - self._taken].copy_(part)
        self._length += 1

    def _rows(self) -> list[Tensor]:
        return [*self._fixed, *self._appended()]

    def _appended(self) -> list[Tensor]:
        left = self._length
        rows = []
        for chunk in self._chunks:
            rows.append(chunk[: min(left, len(chunk))])
            left -= len(chunk)
        return rows
