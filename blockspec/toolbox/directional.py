"""Curvature along a direction: what the loss does when the weights move this way, block by block.

To second order, a move d changes the loss by ``g'd + d'Hd / 2``. Both terms split over blocks:
``g_b'd_b`` is what block b gains by itself, and the matrix ``d_b'H_bc d_c`` says how blocks help or
hinder each other. Row sums of this matrix come from one product ``H d``; all of its entries take a
product ``H_:c d_c`` for every block c, since one vector cannot tell the blocks apart. They share
one sweep: one graph of every batch. The loss's real change stands beside, from one forward pass.

Units of data (micro-batches) give every number a second error: each number is a ratio of sums over
units, and a jackknife over the units says how far the value for the whole population may lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blockspec.model.blocks import Block, gather
from blockspec.model.objective import Objective
from blockspec.products.operators import Operator
from blockspec.products.preconditioning.operator import Preconditioned
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes
from blockspec.products.union import Union
from blockspec.products.units import ColumnsByUnit, Unit
from blockspec.spectra.collection import Cost
from blockspec.spectra.spectrum import Estimate
from blockspec.toolbox.by_unit import (
    Numbered,
    Samples,
    errors_over_units,
    gradients_by_unit,
    losses_by_unit,
    of_all_processes,
    over_units,
)
from blockspec.toolbox.moves import joined, shifted

Direction = Mapping[str, Tensor]
"""Parameter name -> how it moves; parameters that are left out stay."""
Directions = Mapping[str, Mapping[Block, Tensor]]


@dataclass(frozen=True, eq=False)
class Directional:
    """The second-order picture of one move d; unit: of the loss.

    Attributes:
        blocks: The n blocks, in the order of every table.
        gradient: (n,) ``g_b'd_b`` by block.
        rows: (n,) ``d_b'(H d)_b`` by block: the block with itself and with all others.
        curvature: (n, n) ``d_b'H_bc d_c``; None where it was not asked for.
        units: How many units of data (micro-batches) the data's errors rest on.
        matrix: Which matrix H is.
        cost: Of this process, over all directions of the call. Its ``gradients`` are the graphs of
            the products and the gradients of ``g'd``, one of each for every micro-batch.
    """

    blocks: tuple[Block, ...]
    gradient: pd.Series
    rows: pd.Series
    curvature: pd.DataFrame | None
    units: int
    matrix: str
    cost: Cost
    samples: dict[str, np.ndarray] = field(repr=False)
    terms: np.ndarray = field(repr=False)

    @cached_property
    def predicted(self) -> Estimate:
        """``g'd + d'Hd / 2``, the change of the loss to second order."""
        slopes = self.samples["gradient"].sum(1) + 0.5 * self.samples["rows"].sum(1)
        return over_units(slopes, self.terms)

    @cached_property
    def measured(self) -> Estimate | None:
        """The loss's real change; None where it was not asked for."""
        changes = self.samples.get("measured")
        return None if changes is None else over_units(changes, self.terms)

    @cached_property
    def slope(self) -> Estimate:
        """``g'd``."""
        return over_units(self.samples["gradient"].sum(1), self.terms)

    @cached_property
    def bend(self) -> Estimate:
        """``d'Hd``."""
        return over_units(self.samples["rows"].sum(1), self.terms)

    @cached_property
    def curvature_data_stderr(self) -> pd.DataFrame | None:
        """(n, n) errors of ``curvature`` over the data, nan where they are not known; None where
        it was not asked for.
        """
        if self.curvature is None:
            return None
        errors = errors_over_units(self.samples["curvature"], self.terms)
        return pd.DataFrame(errors, self.curvature.index, self.curvature.columns)

    @property
    def within_share(self) -> float:
        """Share of ``d'Hd`` that blocks have with themselves; above 1 where blocks hinder each
        other's curvature.
        """
        if self.curvature is None:
            raise ValueError(
                "the matrix of couplings was not measured: directional(..., couplings=True)"
            )
        return float(np.trace(self.curvature.to_numpy()) / self.bend.value)

    def to_frame(self) -> pd.DataFrame:
        """A row a block: kind, layer, numel, gradient, rows and within (each with its error over
        the data).
        """
        table = pd.DataFrame(
            [(b.name, b.kind, b.layer, b.numel) for b in self.blocks],
            columns=["block", "kind", "layer", "numel"],
        )
        table = table.astype({"layer": "Int64"}).set_index("block")
        table["gradient"], table["rows"] = self.gradient, self.rows
        for name in ("gradient", "rows"):
            table[f"{name}_data_stderr"] = errors_over_units(self.samples[name], self.terms)
        if self.curvature is not None and self.curvature_data_stderr is not None:
            table["within"] = np.diag(self.curvature.to_numpy())
            table["within_data_stderr"] = np.diag(self.curvature_data_stderr.to_numpy())
        table["predicted"] = table["gradient"] + 0.5 * table["rows"]
        return table

    def __repr__(self) -> str:
        measured = "" if self.measured is None else f", measured {_written(self.measured)}"
        share = "" if self.curvature is None else f", within blocks {100 * self.within_share:.0f} %"
        return (
            f"Directional({len(self.blocks)} blocks, {self.matrix}: predicted "
            f"{_written(self.predicted)}{measured}; "
            f"g'd {self.slope.value:.4g}, d'Hd {self.bend.value:.4g}{share})"
        )


@takes(settings=OperatorSettings)
def directional(
    objective: Objective,
    blocks: Sequence[Block],
    direction: Direction,
    *,
    couplings: bool = True,
    measure: bool = True,
    settings: OperatorSettings,
) -> Directional:
    """How the loss changes along a direction, to second order and in truth, by block and between
    blocks.

    Args:
        objective: The loss and its data. Its micro-batches are the units of the data's errors:
            ``micro_batch=1`` makes every sequence or image a unit. Units must have been drawn
            independently.
        blocks: Disjoint, from :func:`blockspec.partition`. What the direction does outside of them
            is left out everywhere.
        direction: Parameter name -> tensor, with the names of ``named_parameters()`` (a tied tensor
            counts once, under its first name); see :mod:`blockspec.toolbox.directions` for where
            directions come from. With ``precondition=P`` it is one in the coordinates of the
            preconditioned matrix, which moves the weights by ``P^(-1/2) d``.
        couplings: Also the matrix ``d_b'H_bc d_c``, for one product a block; else one product in
            all. Both take one sweep over the data.
        measure: Also the loss's real change, for one more forward pass.
        [settings]

    Raises:
        ValueError: Blocks overlap, the direction has an unknown name or a wrong shape, or the
            weights stay elsewhere (``device=``, ``dtype=``).
    """
    return _directionals(objective, blocks, {"": direction}, couplings, measure, settings)[""]


@takes(settings=OperatorSettings)
def directionals(
    objective: Objective,
    blocks: Sequence[Block],
    directions: Mapping[str, Direction],
    *,
    couplings: bool = True,
    measure: bool = True,
    settings: OperatorSettings,
) -> dict[str, Directional]:
    """:func:`directional` for several directions, by name: they share the passes over the data.

    Args:
        objective: As for :func:`directional`.
        blocks: As for :func:`directional`.
        directions: Name -> direction.
        couplings: As for :func:`directional`.
        measure: As for :func:`directional`.
        [settings]
    """
    return _directionals(objective, blocks, directions, couplings, measure, settings)


def _directionals(
    objective: Objective,
    blocks: Sequence[Block],
    given: Mapping[str, Direction],
    couplings: bool,
    measure: bool,
    settings: OperatorSettings,
) -> dict[str, Directional]:
    if objective.weights.brought:
        raise ValueError(
            "the weights stay elsewhere (device=, dtype=) and cannot be moved along a direction: "
            "leave these out, or save a full checkpoint and measure that model"
        )
    operator, chosen = open_operator(objective, blocks, settings)
    union = Union(operator, chosen)
    if sum(block.numel for block in chosen) > union.covered:
        raise ValueError("blocks overlap (is 'model' beside its parts?): give disjoint ones")
    directions = {name: restricted(d, operator.parameters, chosen) for name, d in given.items()}
    moves = {name: _moves(operator, d) for name, d in directions.items()}
    products, terms = _products(operator, union, directions, couplings)
    shared: dict[str, Any] = {"ranks": objective.shards()}
    if told_apart := isinstance(operator, ColumnsByUnit):  # as the products took the data
        shared = {"ranks": operator.ranks, "micro_batch": operator.micro_batch}
    first, taken = _first_order(objective, chosen, moves, **shared)
    shapes = operator.parameters
    cost = Cost(operator.gradients + taken, operator.products)
    found = {}
    for place, name in enumerate(directions):
        samples = {"gradient": first["values"][:, place]}
        if measure:
            change = joined(moves[name], shapes)
            samples["measured"] = _moved(objective, change, **shared) - first["losses"]
        if not told_apart:
            samples = {
                n: v.sum(0, keepdims=True) / first["terms"].sum() for n, v in samples.items()
            }
        found[name] = _result(chosen, products[name] | samples, terms, operator.curvature, cost)
    return found


def restricted(
    direction: Direction, parameters: Mapping[str, Tensor], blocks: Sequence[Block]
) -> dict[Block, Tensor]:
    """Block -> (P_b,) the direction inside the block.

    Raises:
        ValueError: The direction has an unknown name or a wrong shape.
    """
    if not isinstance(direction, Mapping):
        raise TypeError(
            "a direction is a mapping, parameter name -> tensor, got an object of type "
            f"{type(direction).__name__}"
        )
    whole = {}
    for name, tensor in direction.items():
        if name not in parameters:
            raise ValueError(
                f"the direction moves {name!r}, which is no parameter that requires gradients; "
                "names are those of "
                "named_parameters(), where a tied tensor stands once, under its first name"
            )
        expected = parameters[name].shape
        if tensor.shape != expected:
            raise ValueError(
                f"the direction of {name!r} has the shape {tuple(tensor.shape)}, the parameter "
                f"{tuple(expected)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the direction of {name!r} holds NaN or infinite values")
        whole[name] = tensor.detach().to(parameters[name])
    held = {name for block in blocks for name in block.parameters}
    absent = {name: torch.zeros_like(parameters[name]) for name in held if name not in whole}
    return {block: gather(block, whole | absent) for block in blocks}


def _moves(operator: Operator, direction: Mapping[Block, Tensor]) -> Mapping[Block, Tensor]:
    """How the direction moves the parameters: for a preconditioned matrix by P^(-1/2) d."""
    if not isinstance(operator, Preconditioned):
        return direction
    return {block: operator.root(block, vector) for block, vector in direction.items()}


def _first_order(
    objective: Objective, blocks: Sequence[Block], moves: Directions, **shared: Any
) -> tuple[Samples, int]:
    """Of every unit: its loss, its number of terms, and ``values`` (U, directions, n), the sums
    ``g_b'd_b``. One gradient a unit serves all directions; also how many this process took.
    """
    taken = 0

    def each(gradient: Mapping[str, Tensor]) -> list[float]:
        nonlocal taken
        taken += 1
        parts = [(block, gather(block, gradient)) for block in blocks]
        return [_dot(part, d[block]) for d in moves.values() for block, part in parts]

    found = gradients_by_unit(objective, each, len(moves) * len(blocks), **shared)
    found["values"] = found["values"].reshape(-1, len(moves), len(blocks))
    return found, taken


def _moved(objective: Objective, change: Mapping[str, Tensor], **shared: Any) -> np.ndarray:
    """(U,) the loss of every unit behind the move, from one forward pass."""
    with shifted(objective.parameters(), change):
        return losses_by_unit(objective, **shared)[0]


def _products(
    operator: Operator, union: Union, directions: Directions, couplings: bool
) -> tuple[dict[str, Samples], np.ndarray]:
    """For each direction, ``"rows"`` (U, n) and, where wanted, ``"curvature"`` (U, n, n): sums over
    the loss terms of every unit, all from one sweep; and the units' (U,) numbers of terms. The only
    unit of an operator that does not tell them apart is the mean over all terms.
    """
    asked = _asked(union, directions, couplings)
    aims = [directions[name] for name, _, _ in asked]
    requests = [(block, vector) for _, block, vector in asked]

    def each(number: int, parts: list[Tensor]) -> list[float]:
        return [_dot(part, aims[number][b]) for part, b in zip(parts, union.blocks, strict=True)]

    if isinstance(operator, ColumnsByUnit):
        make = operator.columns_by_unit
        units = of_all_processes(
            operator.ranks,
            lambda: _tabled(make(requests, union.blocks, each, summed=False)[1]),
        )
    else:
        columns = operator.columns(requests, union.blocks)
        mean = Unit(1.0, [each(number, parts) for number, parts in enumerate(columns)])
        _, units = _tabled([(0, mean)])
    found = units["values"].reshape(-1, len(asked), len(union.blocks))
    _check_finite(found, [block for block, _ in requests])
    split = np.split(found, len(directions), axis=1)
    samples = [_samples(part, couplings) for part in split]
    return dict(zip(directions, samples, strict=True)), units["terms"]


def _asked(
    union: Union, directions: Directions, couplings: bool
) -> list[tuple[str, Block, Tensor]]:
    """(name of the direction, block, vector) of every product: one a block, or one in all."""
    if couplings:
        return [(name, b, vector) for name, d in directions.items() for b, vector in d.items()]
    wholes = {name: joined(d, union.parameters) for name, d in directions.items()}
    return [(name, union.block, gather(union.block, whole)) for name, whole in wholes.items()]


def _tabled(units: Sequence[tuple[int, Unit]]) -> Numbered:
    values = np.array([np.ravel(unit.values) for _, unit in units], float)
    terms = np.array([unit.terms for _, unit in units], float)
    return [number for number, _ in units], {"values": values, "terms": terms}


def _check_finite(found: np.ndarray, blocks: Sequence[Block]) -> None:
    finite = np.isfinite(found).all((0, 2))
    if not finite.all():
        raise ValueError(
            f"a product with block {blocks[int(finite.argmin())].name!r} holds NaN or infinite "
            "values; check the checkpoint and the data, or use a wider dtype (model.double())"
        )


def _samples(part: np.ndarray, couplings: bool) -> Samples:
    if not couplings:
        return {"rows": part[:, 0]}
    matrix = (part + part.transpose(0, 2, 1)) / 2
    return {"rows": matrix.sum(2), "curvature": matrix}


def _result(
    blocks: tuple[Block, ...],
    samples: Samples,
    terms: np.ndarray,
    matrix: str,
    cost: Cost,
) -> Directional:
    names = [block.name for block in blocks]
    means = {name: values.sum(0) / terms.sum() for name, values in samples.items()}
    curvature = means.get("curvature")
    return Directional(
        blocks=blocks,
        gradient=pd.Series(means["gradient"], names, name="gradient"),
        rows=pd.Series(means["rows"], names, name="rows"),
        curvature=None if curvature is None else pd.DataFrame(curvature, names, names),
        units=len(terms),
        matrix=matrix,
        cost=cost,
        samples=samples,
        terms=terms,
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _written(estimate: Estimate) -> str:
    error = "" if estimate.data_stderr is None else f" ± {estimate.data_stderr:.2g}"
    return f"{estimate.value:.4g}{error}"
