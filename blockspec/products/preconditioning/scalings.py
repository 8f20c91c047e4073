"""P^-1 of one parameter: what an optimizer does to a momentum before it is a step.

A step is ``-lr P^-1 m``. Optimizers keep P in three shapes. Adam and its kin divide entry by entry
(:class:`Diagonal`). Muon and Shampoo multiply the sides of a matrix by small matrices
(:class:`Kronecker`). SOAP turns a matrix into a basis where it does as Adam does
(:class:`Rotated`). Each shape is closed under powers, so that P^(-1/2) is of the same shape, and is
made once. A piece of the parameter that a block holds has a P of its own only where no matrix mixes
it with the rest; :func:`cuts` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from blockspec.model.blocks import Piece


class Scaling(Protocol):
    """A symmetric positive semidefinite matrix that acts on tensors of a parameter's shape."""

    @property
    def mixed(self) -> frozenset[int] | None:
        """Axes of the parameter whose places are mixed; None: places of all axes."""
        ...

    def __call__(self, tensor: Tensor) -> Tensor:
        """The matrix times a tensor of the parameter's shape."""
        ...

    def power(self, exponent: float) -> Scaling:
        """The matrix to a power above 0."""
        ...

    def to(self, dtype: torch.dtype, device: torch.device) -> Scaling:
        """The same in another dtype, on another device."""
        ...

    def cut(self, piece: Piece) -> Scaling:
        """Its part that acts on a piece of the parameter; the piece must not cut what is mixed."""
        ...

    def content(self) -> list[Any]:
        """What the numbers depend on, for a digest."""
        ...


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Entry by entry.

    Args:
        values: Of the parameter's shape; entries of P^-1.
    """

    values: Tensor = field(repr=False)
    mixed: frozenset[int] | None = frozenset()

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor * self.values

    def power(self, exponent: float) -> Diagonal:
        return Diagonal(self.values.pow(exponent))

    def to(self, dtype: torch.dtype, device: torch.device) -> Diagonal:
        return Diagonal(self.values.to(device, dtype))

    def cut(self, piece: Piece) -> Diagonal:
        return Diagonal(piece.select(self.values))

    def content(self) -> list[Any]:
        return [self.values]


@dataclass(frozen=True, eq=False)
class Factor:
    """A symmetric matrix (n, n) by its eigenvectors, the columns of ``basis`` (n, r), and
    eigenvalues (r,); zero on what they leave out.
    """

    basis: Tensor = field(repr=False)
    values: Tensor = field(repr=False)

    @cached_property
    def matrix(self) -> Tensor:
        """(n, n)."""
        return (self.basis * self.values) @ self.basis.T

    def to(self, dtype: torch.dtype, device: torch.device) -> Factor:
        found = Factor(self.basis, self.values)
        found.__dict__["matrix"] = self.matrix.to(device, dtype)  # rounded once, at the end
        return found


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A product of small matrices, one for each axis.

    Args:
        factors: One for each axis of ``shape``; None where nothing is done along it.
        shape: The parameter is seen in this shape, which may be another than its own.
        own: Whether the shape is the parameter's own.
    """

    factors: tuple[Factor | None, ...]
    shape: tuple[int, ...]
    own: bool = True

    @property
    def mixed(self) -> frozenset[int] | None:
        return _mixed(self.factors) if self.own else None

    def __call__(self, tensor: Tensor) -> Tensor:
        result = tensor.reshape(self.shape)
        for axis, factor in enumerate(self.factors):
            if factor is not None:
                result = along(axis, factor.matrix, result)
        return result.reshape(tensor.shape)

    def power(self, exponent: float) -> Kronecker:
        powers = [
            None if f is None else Factor(f.basis, f.values.pow(exponent)) for f in self.factors
        ]
        return replace(self, factors=tuple(powers))

    def to(self, dtype: torch.dtype, device: torch.device) -> Kronecker:
        moved = [None if f is None else f.to(dtype, device) for f in self.factors]
        return replace(self, factors=tuple(moved))

    def cut(self, piece: Piece) -> Kronecker:
        left = _without_first(self.factors, piece)
        return Kronecker(left, piece_shape(piece, self.shape))

    def content(self) -> list[Any]:
        parts = [[] if f is None else [f.basis, f.values] for f in self.factors]
        return [list(self.shape), parts]


@dataclass(frozen=True, eq=False)
class Rotated:
    """Entry by entry in another basis.

    Args:
        bases: For each axis of ``values``, an orthogonal matrix whose columns are the new axes, or
            None.
        values: Entries of P^-1 in that basis; the parameter is seen in this shape.
        own: Whether the shape is the parameter's own.
    """

    bases: tuple[Tensor | None, ...] = field(repr=False)
    values: Tensor = field(repr=False)
    own: bool = True

    @property
    def mixed(self) -> frozenset[int] | None:
        return _mixed(self.bases) if self.own else None

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.back(self.turned(tensor) * self.values.view(tensor.shape))

    def turned(self, tensor: Tensor) -> Tensor:
        """In that basis, in the tensor's own shape."""
        found = tensor.reshape(self.values.shape)
        for axis, basis in enumerate(self.bases):
            if basis is not None:
                found = along(axis, basis.T, found)
        return found.reshape(tensor.shape)

    def back(self, tensor: Tensor) -> Tensor:
        """From that basis."""
        found = tensor.reshape(self.values.shape)
        for axis, basis in enumerate(self.bases):
            if basis is not None:
                found = along(axis, basis, found)
        return found.reshape(tensor.shape)

    def power(self, exponent: float) -> Rotated:
        return replace(self, values=self.values.pow(exponent))

    def to(self, dtype: torch.dtype, device: torch.device) -> Rotated:
        bases = [None if b is None else b.to(device, dtype) for b in self.bases]
        return Rotated(tuple(bases), self.values.to(device, dtype), self.own)

    def cut(self, piece: Piece) -> Rotated:
        return Rotated(_without_first(self.bases, piece), piece.select(self.values))

    def content(self) -> list[Any]:
        return [[[] if b is None else b for b in self.bases], self.values]


Action = Callable[[Scaling, Tensor], Tensor]
"""What is done to a tensor of the shape that a scaling acts on."""


def enter(scaling: Scaling, tensor: Tensor) -> Tensor:
    """C t with C C' the scaling's square: of a turned one, Q D where it is itself Q D Q'."""
    if not isinstance(scaling, Rotated):
        return scaling(tensor)
    return scaling.back(tensor * scaling.values.view(tensor.shape))


def leave(scaling: Scaling, tensor: Tensor) -> Tensor:
    """C' t."""
    if not isinstance(scaling, Rotated):
        return scaling(tensor)
    return scaling.turned(tensor) * scaling.values.view(tensor.shape)


def turn(scaling: Scaling, tensor: Tensor) -> Tensor:
    """Q' t; the tensor itself where nothing is turned."""
    return scaling.turned(tensor) if isinstance(scaling, Rotated) else tensor


def along(axis: int, matrix: Tensor, tensor: Tensor) -> Tensor:
    """``matrix`` (n, n) times the columns of ``tensor`` along an axis of length n."""
    if tensor.ndim == 2:
        return matrix @ tensor if axis == 0 else tensor @ matrix.T
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


def cuts(scaling: Scaling, piece: Piece) -> bool:
    """Whether the piece holds some and not all of what the matrix mixes."""
    if piece.whole:
        return False
    if scaling.mixed is None:
        return True
    behind = int(piece.first is not None)
    taken = {0} if behind else set()
    if piece.axis is not None:
        taken.add(piece.axis + behind)
    return bool(taken & scaling.mixed)


def piece_shape(piece: Piece, shape: Sequence[int]) -> tuple[int, ...]:
    """Of the piece of a parameter of this shape."""
    left = list(shape if piece.first is None else shape[1:])
    if piece.axis is not None:
        del left[piece.axis]
        left.insert(piece.axis, piece.size(shape) // max(1, _product(left)))
    return tuple(left)


def _product(sizes: Sequence[int]) -> int:
    return int(torch.Size(sizes).numel())


def _mixed(parts: Sequence[object]) -> frozenset[int]:
    return frozenset(axis for axis, part in enumerate(parts) if part is not None)


def _without_first(parts: tuple[Any, ...], piece: Piece) -> tuple[Any, ...]:
    """A slice of the first axis has the axes behind it."""
    return parts if piece.first is None else parts[1:]
