"""A block of parameters, as the pieces of tensors that it consists of.

Tables know blocks without a model. This module therefore imports torch only where a tensor is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


FULL, LAYER = "full", "layer"
"""Kinds of blocks that are no part of a layer: the whole model, and a layer."""


@dataclass(frozen=True)
class Piece:
    """A parameter, or the rows ``index`` of it along ``axis``.

    With ``first``, of the slice at that place of the parameter's first axis (one expert of fused
    experts), whose own axes are then counted from 0.
    """

    parameter: str
    axis: int | None = None  # None: the whole tensor
    index: slice | tuple[int, ...] | None = None
    first: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the piece is the whole parameter."""
        return self.axis is None and self.first is None

    def size(self, shape: Sequence[int]) -> int:
        """Number of entries of the piece of a parameter of this shape."""
        shape = tuple(shape) if self.first is None else tuple(shape)[1:]
        if self.axis is None or self.index is None:
            return math.prod(shape)
        rows = (
            len(self.index) if isinstance(self.index, tuple) else self.index.stop - self.index.start
        )
        return math.prod(shape) // shape[self.axis] * rows

    def select(self, tensor: Tensor) -> Tensor:
        """The piece of ``tensor``, which has the parameter's shape: a view, but for an index that
        is a tuple.
        """
        tensor = tensor if self.first is None else tensor[self.first]
        if self.axis is None:
            return tensor
        if isinstance(self.index, slice):
            return tensor.narrow(self.axis, self.index.start, self.index.stop - self.index.start)
        return tensor.index_select(self.axis, self._positions(tensor))

    def fill(self, tensor: Tensor, values: Tensor) -> None:
        """Write ``values`` (flat) into the piece of ``tensor``, in place."""
        target = self.select(tensor)
        if isinstance(self.index, tuple):
            assert self.axis is not None
            within = tensor if self.first is None else tensor[self.first]
            within.index_copy_(self.axis, self._positions(tensor), values.view_as(target))
        else:
            target.copy_(values.view(target.shape))

    def _positions(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.tensor(self.index, device=tensor.device)


@dataclass(frozen=True)
class Block:
    """A named subset of the parameters; its vectors are its pieces, flattened and put one after the
    other.
    """

    name: str
    kind: str
    layer: int | None
    numel: int
    pieces: tuple[Piece, ...] = field(
        default=(), repr=False, compare=False
    )  # () for a block loaded from a file
    note: str = field(default="", repr=False, compare=False)
    """What is to be said of the block's kind or cut: where its name and the forward pass disagree,
    and why a fused tensor stayed whole.
    """
    role: str = field(default="", repr=False, compare=False)
    """What it is among others of its kind, see :mod:`blockspec.model.places`: figures and logs go
    by it. The kind itself where there is nothing to tell apart.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", self.role or self.kind)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the block has pieces of, each once, in order."""
        return tuple(dict.fromkeys(piece.parameter for piece in self.pieces))


class Blocks(tuple[Block, ...]):
    """Blocks in their order, as a tuple that a notebook shows as a table."""

    __slots__ = ()

    def to_frame(self) -> pd.DataFrame:
        """A row a block: kind, layer, numel and, where there are any, roles and notes."""
        return frame_of(self)

    def _repr_html_(self) -> str:
        total = sum(block.numel for block in self)
        table = frame_of(self).to_html(max_rows=60)
        return f"<p>{len(self)} blocks, {total:,} parameters</p>{table}"


def frame_of(blocks: Sequence[Block]) -> pd.DataFrame:
    """A row a block: kind, layer, numel and, where there are any, roles and notes."""
    import pandas as pd

    rows = [(b.name, b.kind, b.role, b.layer, b.numel, b.note) for b in blocks]
    table = pd.DataFrame(rows, columns=["block", "kind", "role", "layer", "numel", "note"])
    table = table.astype({"layer": "Int64"}).set_index("block")
    table = table if table["note"].any() else table.drop(columns="note")
    return table if (table["role"] != table["kind"]).any() else table.drop(columns="role")
