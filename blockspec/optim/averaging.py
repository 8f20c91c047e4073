"""Averages of a diagonal's absolute values over blocks of its entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blockspec.model.blocks import Block, Piece

FEWEST_AXES = {"conv": 3, "rows": 2}  # which tensors an averaging by name is about

SpatialAveraging = str | int | Sequence[Block] | None
Average = Callable[[Mapping[Tensor, Tensor]], list[Tensor]]


def averaging(
    spatial: SpatialAveraging, named: Mapping[str, Tensor], *, vectors: bool = False
) -> Average:
    """The function from ``{parameter: diagonal}`` to the list of what they are averaged to, in the
    same shapes.

    Absolute values are taken first, as in the authors' code; without an average the signs stay.

    Args:
        spatial: As in :class:`blockspec.optim.AdaHessian`.
        named: The parameters by name; only blocks need it.
        vectors: Whether a number is about tensors of one axis too.
    """
    if spatial is None:
        return lambda diagonals: list(diagonals.values())
    if isinstance(spatial, str):
        if spatial not in FEWEST_AXES:
            raise ValueError(
                f"spatial_averaging is {spatial!r}; by name there are "
                f"{' and '.join(map(repr, FEWEST_AXES))}"
            )
        return lambda diagonals: [
            _over_kernels(d.abs(), FEWEST_AXES[spatial]) for d in diagonals.values()
        ]
    if isinstance(spatial, int):
        if spatial < 1:
            raise ValueError(f"spatial_averaging is {spatial}; a run of entries has at least 1")
        return lambda diagonals: [
            _over_runs(d.abs(), spatial if vectors or d.ndim > 1 else 1) for d in diagonals.values()
        ]
    rows = _rows_of_blocks(spatial, named)
    return lambda diagonals: _over_blocks(
        {p: d.abs() for p, d in diagonals.items()}, rows, len(spatial)
    )


def _over_kernels(diagonal: Tensor, fewest_axes: int) -> Tensor:
    """As the authors' code: matrices over axis 1, kernels over all axes from the third on."""
    if diagonal.ndim < fewest_axes:
        return diagonal
    return diagonal.mean(
        dim=tuple(range(min(2, diagonal.ndim - 1), diagonal.ndim)), keepdim=True
    ).expand_as(diagonal)


def _over_runs(diagonal: Tensor, length: int) -> Tensor:
    if length == 1:
        return diagonal
    flat = diagonal.reshape(-1)
    whole = flat.numel() // length * length
    runs = flat[:whole].view(-1, length).mean(1).repeat_interleave(length)
    rest = flat[whole:].mean().expand(flat.numel() - whole)
    return torch.cat([runs, rest]).view_as(diagonal)


@dataclass(frozen=True)
class _Rows:
    """Which block each place of a parameter along ``axes`` belongs to; without axes, the parameter
    as one place.
    """

    axes: tuple[int, ...]
    block: Tensor  # of the axes' sizes, int64 on the CPU; the number of blocks where there is none


def _rows_of_blocks(blocks: Sequence[Block], named: Mapping[str, Tensor]) -> dict[Tensor, _Rows]:
    if not named:
        raise ValueError(
            "spatial_averaging over blocks needs the parameters' names: "
            "AdaHessian(model.named_parameters(), ...)"
        )
    rows: dict[Tensor, _Rows] = {}
    for number, block in enumerate(blocks):
        for piece in block.pieces:
            if piece.parameter not in named:
                continue
            parameter = named[piece.parameter]
            axes = _axes(piece)
            sizes = [parameter.shape[axis] for axis in axes]
            known = rows.setdefault(parameter, _Rows(axes, torch.full(sizes, len(blocks))))
            if known.axes != axes:
                raise ValueError(
                    f"the blocks cut {piece.parameter} along more than one axis: "
                    f"{_written(known.axes)} and {_written(axes)}; pass the blocks of one partition"
                )
            known.block[_positions(piece)] = number
    if not rows:
        raise ValueError(
            "the blocks of spatial_averaging hold none of the parameters (the first is "
            f"{next(iter(named))!r}): "
            "partition the model whose named_parameters() the optimizer got"
        )
    return rows


def _axes(piece: Piece) -> tuple[int, ...]:
    """The axes of the parameter along which the piece is cut out; an expert's own come after the
    first.
    """
    outer = () if piece.first is None else (0,)
    return outer if piece.axis is None else (*outer, piece.axis + len(outer))


def _written(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes)) or "none"


def _positions(piece: Piece) -> Any:
    places: list[Any] = [] if piece.first is None else [piece.first]
    if piece.index is not None:
        places.append(list(piece.index) if isinstance(piece.index, tuple) else piece.index)
    return tuple(places) or ...


def _over_blocks(
    diagonals: Mapping[Tensor, Tensor], rows: Mapping[Tensor, _Rows], num_blocks: int
) -> list[Tensor]:
    if not diagonals:
        return []
    first = next(iter(diagonals.values()))
    sums = first.new_zeros(num_blocks + 1, dtype=torch.promote_types(first.dtype, torch.float32))
    sizes = torch.zeros_like(sums)
    for parameter, diagonal in diagonals.items():
        if parameter in rows:
            axes, block = rows[parameter].axes, rows[parameter].block.to(sums.device).flatten()
            front = diagonal.movedim(axes, tuple(range(len(axes)))) if axes else diagonal
            lines = front.reshape(len(block), -1)
            sums.index_add_(0, block, lines.sum(1).to(sums))
            sizes.index_add_(0, block, torch.full_like(block, lines.shape[1], dtype=sums.dtype))
    means = sums / sizes.clamp(min=1)
    return [_spread(means, rows[p], d) if p in rows else d for p, d in diagonals.items()]


def _spread(means: Tensor, rows: _Rows, diagonal: Tensor) -> Tensor:
    """Each row gets the mean of its block; rows in no block keep their values."""
    shape = [n if axis in rows.axes else 1 for axis, n in enumerate(diagonal.shape)]
    block = rows.block.to(means.device)
    mean = means[block].view(shape).to(diagonal)
    return torch.where((block == len(means) - 1).view(shape).to(diagonal.device), diagonal, mean)
