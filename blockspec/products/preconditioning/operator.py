"""P^(-1/2) H P^(-1/2) as an operator around another one.

A product takes three steps: P^(-1/2) v, the product of the inner operator, and P^(-1/2) again. The
number of products stays the same. Everything else that the inner operator can do (plan its cost,
cut its batches, keep graphs) stays its own, and is reached through this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.products.operators import Operator, forget
from blockspec.products.preconditioning.preconditioner import Preconditioner
from blockspec.products.preconditioning.scalings import (
    Action,
    Diagonal,
    Rotated,
    Scaling,
    cuts,
    enter,
    leave,
    piece_shape,
    turn,
)
from blockspec.products.units import Reduce, Unit

PASSED_ON = (
    "num_batches", "largest_batch", "rehearse", "calibrate", "batches", "save_memory",
    "least_memory",
)  # fmt: skip
"""Methods that an inner operator may have. They are set on each object, because protocols look for
members without asking ``__getattr__``.
"""
KEPT = 4  # entries of diagonals that are kept ready, per parameter of the model


def _inner(name: str) -> Any:
    """A property that is read and written on the inner operator."""

    def get(self: Preconditioned) -> Any:
        return getattr(self.inner, name)

    def put(self: Preconditioned, value: Any) -> None:
        setattr(self.inner, name, value)

    return property(get, put)


class Preconditioned:
    """P^(-1/2) H P^(-1/2), where H is another operator.

    Args:
        inner: H.
        preconditioner: P; of every parameter of the blocks that products are asked for.
        in_own_basis: Vectors are those of the basis Q where P acts entry by entry, P = Q D Q'; the
            matrix is Q' P^(-1/2) H P^(-1/2) Q then. It has the same eigenvalues, and where start
            vectors are turned too (:meth:`turned`), the same spectra. SOAP's products with small
            matrices are half as many. Other preconditioners than SOAP are as they are.
    """

    objective = _inner("objective")
    parameters = _inner("parameters")
    device = _inner("device")
    ranks = _inner("ranks")
    gradients = _inner("gradients")
    products = _inner("products")
    micro_batch = _inner("micro_batch")
    graphs = _inner("graphs")
    told = _inner("told")

    def __init__(
        self, inner: Operator, preconditioner: Preconditioner, *, in_own_basis: bool = False
    ) -> None:
        self.inner = inner
        self.in_own_basis = in_own_basis
        self.preconditioner = preconditioner
        self._roots: dict[tuple[str, torch.dtype], Scaling] = {}
        self._ready: dict[int, tuple[Block, Tensor]] = {}
        for name in PASSED_ON:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        if hasattr(inner, "columns_by_unit"):
            self.columns_by_unit = self._columns_by_unit
        if hasattr(inner, "sweep_by_unit"):
            self.sweep_by_unit = self._sweep_by_unit

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # an object that is just being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def curvature(self) -> str:
        """What results call the matrix."""
        return f"preconditioned {self.inner.curvature} ({self.preconditioner.name})"

    def check(self, blocks: Sequence[Block]) -> None:
        """That P is known of the blocks and not cut by them; then the inner operator's guards.

        Raises:
            ValueError: As said; the message names the parameter and the block.
        """
        for block in blocks:
            for piece in block.pieces:
                self._check_piece(block, piece)
        self.inner.check(blocks)

    def forget(self) -> None:
        """Parameters have new values: P is read anew, where it follows an optimizer."""
        self.preconditioner = self.preconditioner.renewed()
        self._roots.clear()
        self._ready.clear()
        forget(self.inner)

    def _check_piece(self, block: Block, piece: Any) -> None:
        name = piece.parameter
        title = self.preconditioner.name
        scaling = self.preconditioner.scalings.get(name)
        if scaling is None:
            raise ValueError(
                f"block {block.name!r} holds {name!r}, which {title} does not step, so that it "
                "has no preconditioner: leave the block out (exclude=), or give all optimizers of "
                "the model, Preconditioner.from_optimizer([muon, adamw], model)"
            )
        if cuts(scaling, piece):
            raise ValueError(
                f"block {block.name!r} cuts {name!r} where {title} mixes its entries: its "
                "preconditioner is a matrix that acts on the whole, and a part of it is no "
                "preconditioner of a part. Take whole matrices: by='tensor' or by='layer'"
            )

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """For each (block b, v (P_b,)): P_b^(-1/2) H_bb P_b^(-1/2) v (P_b,)."""
        found = self.inner.sweep(self._before(requests))
        return self._after([block for block, _ in requests], found)

    def columns(
        self, requests: Sequence[tuple[Block, Tensor]], targets: Sequence[Block]
    ) -> list[list[Tensor]]:
        """For each (block b, v (P_b,)): P_c^(-1/2) H_cb P_b^(-1/2) v (P_c,) of every block c in
        ``targets``.
        """
        found = self.inner.columns(self._before(requests), targets)
        return [self._after(targets, parts) for parts in found]

    def _columns_by_unit(
        self,
        requests: Sequence[tuple[Block, Tensor]],
        targets: Sequence[Block],
        each: Reduce,
        *,
        summed: bool = True,
    ) -> tuple[list[list[Tensor]], list[tuple[int, Unit]]]:
        """:meth:`columns`, and what ``each`` makes of every unit's products."""

        def each_of_ours(number: int, parts: list[Tensor]) -> Any:
            return each(number, self._after(targets, parts))

        found, units = self.inner.columns_by_unit(  # type: ignore[attr-defined]
            self._before(requests), targets, each_of_ours, summed=summed
        )
        return [self._after(targets, parts) for parts in found] if summed else found, units

    def _sweep_by_unit(
        self, requests: Sequence[tuple[Block, Tensor]], each: Reduce
    ) -> tuple[list[Tensor], list[tuple[int, Unit]]]:
        """:meth:`sweep`, and what ``each`` makes of every unit's products."""
        blocks = [block for block, _ in requests]

        def each_of_ours(number: int, parts: list[Tensor]) -> Any:
            return each(number, self._after([blocks[number]], parts))

        found, units = self.inner.sweep_by_unit(  # type: ignore[attr-defined]
            self._before(requests), each_of_ours
        )
        return self._after(blocks, found), units

    def _before(self, requests: Sequence[tuple[Block, Tensor]]) -> list[tuple[Block, Tensor]]:
        action = enter if self.in_own_basis else _whole
        return [(block, self._acted(block, vector, action)) for block, vector in requests]

    def _after(self, targets: Sequence[Block], parts: Sequence[Tensor]) -> list[Tensor]:
        action = leave if self.in_own_basis else _whole
        return [self._acted(b, part, action) for b, part in zip(targets, parts, strict=True)]

    def root(self, block: Block, vector: Tensor) -> Tensor:
        """P_b^(-1/2) v (P_b,): how a vector of these products moves the parameters themselves."""
        return self._acted(block, vector, _whole)

    def turned(self, block: Block, vector: Tensor) -> Tensor:
        """A vector of the parameters (P_b,) as one of these products."""
        return self._acted(block, vector, turn) if self.in_own_basis else vector

    def _acted(self, block: Block, vector: Tensor, action: Action) -> Tensor:
        """An action on each piece of a block's vector."""
        kept = self._ready.get(id(block))
        if kept is not None:  # all diagonal
            return vector if action is turn else vector * kept[1]
        pieces = [self._piece(piece, vector) for piece in block.pieces]
        if all(isinstance(scaling, Diagonal) for scaling, _ in pieces):
            values = torch.cat([s.values.reshape(-1) for s, _ in pieces if isinstance(s, Diagonal)])
            self._keep(block, values)
            return self._acted(block, vector, action)
        sizes = [torch.Size(shape).numel() for _, shape in pieces]
        parts = [
            action(scaling, part.view(shape)).reshape(-1)
            for (scaling, shape), part in zip(pieces, vector.split(sizes), strict=True)
        ]
        return torch.cat(parts)

    def _piece(self, piece: Any, vector: Tensor) -> tuple[Scaling, tuple[int, ...]]:
        """P^(-1/2) of one piece, and its shape."""
        name, key = piece.parameter, (piece.parameter, vector.dtype)
        if key not in self._roots:
            root = self.preconditioner.scalings[name].power(0.5)
            self._roots[key] = root.to(vector.dtype, vector.device)
        root, shape = self._roots[key], tuple(self.inner.parameters[name].shape)
        return (root, shape) if piece.whole else (root.cut(piece), piece_shape(piece, shape))

    def _keep(self, block: Block, values: Tensor) -> None:
        """The block is kept too: its address is its name only while it lives."""
        most = KEPT * sum(p.numel() for p in self.inner.parameters.values())
        if sum(len(kept) for _, kept in self._ready.values()) + len(values) > most:
            self._ready.clear()
        self._ready[id(block)] = (block, values)


def _whole(scaling: Scaling, tensor: Tensor) -> Tensor:
    return scaling(tensor)


def in_own_basis(operator: Operator) -> Operator:
    """The operator as it is cheapest for eigenvalues: :class:`Preconditioned` in P's own basis."""
    if not isinstance(operator, Preconditioned):
        return operator
    scalings = operator.preconditioner.scalings.values()
    if not any(isinstance(scaling, Rotated) for scaling in scalings):
        return operator
    return Preconditioned(operator.inner, operator.preconditioner, in_own_basis=True)


def turned(operator: Operator, block: Block, vector: Tensor) -> Tensor:
    """A vector of the parameters (P_b,) as one of the operator's products."""
    return operator.turned(block, vector) if isinstance(operator, Preconditioned) else vector


Side = tuple[Operator, Block]
"""A block of one of several matrices."""


def sweep_sides(inner: Operator, requests: Sequence[tuple[Side, Tensor]]) -> list[Tensor]:
    """Products of an operator and of preconditioned ones around it, from one sweep of its own.

    Args:
        inner: The operator H.
        requests: For each ((H itself or a :class:`Preconditioned` around it, block b), v (P_b,)).

    Returns:
        The product of each request (P_b,).
    """

    def rooted(operator: Operator, block: Block, vector: Tensor) -> Tensor:
        if operator is inner:
            return vector
        assert isinstance(operator, Preconditioned), "an operator around another one"
        assert operator.inner is inner, "an operator around this one"
        return operator.root(block, vector)

    found = inner.sweep([(side[1], rooted(*side, vector)) for side, vector in requests])
    return [rooted(*side, part) for (side, _), part in zip(requests, found, strict=True)]
