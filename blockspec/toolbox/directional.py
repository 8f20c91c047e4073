"""Curvature along a direction: what the loss does when the weights move this way, block by block.

To second order, a move d changes the loss by ``g'd + d'Hd / 2``. Both terms split over blocks:
``g_b'd_b`` is what block b gains by itself, and the matrix ``d_b'H_bc d_c`` says how blocks help or
hinder each other. Row sums of this matrix come from one product ``H d``; all of its entries take a
product ``H_:c d_c`` for every block c, since one vector cannot tell the blocks apart. The loss's
real change stands beside, from two forward passes.

Units of data (micro-batches) give every number a second error: each number is a ratio of sums over
units, and a jackknife over the units says how far the value for the whole population may lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from blockspec.spectra.collection import Cost
from blockspec.spectra.spectrum import Estimate
from blockspec.toolbox.moves import joined, shifted

Direction = Mapping[str, Tensor]
"""Parameter name -> how it moves; parameters that are left out stay."""
Directions = Mapping[str, Mapping[Block, Tensor]]
Samples = dict[str, np.ndarray]
FEWEST_UNITS = 8  # of data, before a standard error over them is believed
AT_ONCE = 16  # products of one pass


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
        cost: What it took.
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

    def frame(self) -> pd.DataFrame:
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
            errors = [over_units(c, self.terms).data_stderr for c in self.samples[name].T]
            table[f"{name}_data_stderr"] = [np.nan if e is None else e for e in errors]
        if self.curvature is not None:
            table["within"] = np.diag(self.curvature.to_numpy())
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
            all.
        measure: Also the loss's real change, for one more forward pass.
        [settings]

    Raises:
        ValueError: Blocks overlap, the direction has an unknown name or a wrong shape, or the data
            or the weights are spread over processes.
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
    if objective.weights.elsewhere:
        raise ValueError(
            "the weights stay elsewhere (device=, dtype=, fully_shard) and cannot be moved along a "
            "direction: leave these out, or save a full checkpoint and measure that model"
        )
    if objective.sharded:
        raise ValueError(
            "a direction is measured unit of data by unit, and with Objective(..., sharded=True) "
            "each process holds a part of them: give every process all batches instead"
        )
    operator, chosen = open_operator(objective, blocks, settings)
    union = Union(operator, chosen)
    if sum(block.numel for block in chosen) > union.covered:
        raise ValueError("blocks overlap (is 'model' beside its parts?): give disjoint ones")
    directions = {name: restricted(d, operator.parameters, chosen) for name, d in given.items()}
    moves = {name: _moves(operator, d) for name, d in directions.items()}
    gradients = _gradients(objective, chosen, moves)
    products, terms = _products(operator, union, directions, couplings)
    cost = Cost(operator.gradients, operator.products)
    found = {}
    for name in directions:
        samples = products[name] | {"gradient": gradients[name]}
        if measure:
            samples["measured"] = _measured(objective, moves[name])
        found[name] = _result(chosen, samples, terms, operator.curvature, cost)
    return found


def restricted(
    direction: Direction, parameters: Mapping[str, Tensor], blocks: Sequence[Block]
) -> dict[Block, Tensor]:
    """Block -> (P_b,) the direction inside the block.

    Raises:
        ValueError: The direction has an unknown name or a wrong shape.
    """
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
        whole[name] = tensor.detach().to(parameters[name])
    held = {name for block in blocks for name in block.parameters}
    absent = {name: torch.zeros_like(parameters[name]) for name in held if name not in whole}
    return {block: gather(block, whole | absent) for block in blocks}


def _moves(operator: Operator, direction: Mapping[Block, Tensor]) -> Mapping[Block, Tensor]:
    """How the direction moves the parameters: for a preconditioned matrix by P^(-1/2) d."""
    if not isinstance(operator, Preconditioned):
        return direction
    return {block: operator.root(block, vector) for block, vector in direction.items()}


def _gradients(
    objective: Objective, blocks: Sequence[Block], directions: Directions
) -> dict[str, np.ndarray]:
    """For each direction, (U, n) the sums ``g_b'd_b`` of every unit; one gradient a unit serves all
    directions.
    """
    parameters = objective.parameters()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in directions}
    with objective.prepared():
        for batch in objective.batches():
            total, _ = objective.loss_sum(batch)
            parts = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            gradient = {
                name: torch.zeros_like(p) if part is None else part
                for (name, p), part in zip(parameters.items(), parts, strict=True)
            }
            for name, d in directions.items():
                rows[name].append(
                    np.array([_dot(gather(block, gradient), d[block]) for block in blocks])
                )
    return {name: np.array(values) for name, values in rows.items()}


def _products(
    operator: Operator, union: Union, directions: Directions, couplings: bool
) -> tuple[dict[str, Samples], np.ndarray]:
    """For each direction, ``"rows"`` (U, n) and, where wanted, ``"curvature"`` (U, n, n): sums over
    the loss terms of every unit; and the units' (U,) numbers of terms.
    """
    blocks = union.blocks
    sources = []
    for name, d in directions.items():
        if couplings:
            sources += [(name, block, vector) for block, vector in d.items()]
        else:
            whole = gather(union.block, joined(d, union.parameters))
            sources.append((name, union.block, whole))
    rows, terms = [], np.empty(0)
    for start in range(0, len(sources), AT_ONCE):
        group = sources[start : start + AT_ONCE]
        aims = [directions[name] for name, _, _ in group]

        def each(number: int, parts: list[Tensor], aims: list[Any] = aims) -> np.ndarray:
            return np.array([_dot(p, aims[number][b]) for p, b in zip(parts, blocks, strict=True)])

        units = _units(operator, [(block, vector) for _, block, vector in group], blocks, each)
        rows.append(np.array([values for _, values in units]))  # (U, sources, n)
        terms = np.array([count for count, _ in units])
    split = np.split(np.concatenate(rows, axis=1), len(directions), axis=1)
    return {n: _samples(part, couplings) for n, part in zip(directions, split, strict=True)}, terms


def _samples(part: np.ndarray, couplings: bool) -> Samples:
    if not couplings:
        return {"rows": part[:, 0]}
    matrix = (part + part.transpose(0, 2, 1)) / 2
    return {"rows": matrix.sum(2), "curvature": matrix}


def _units(
    operator: Operator,
    requests: Sequence[tuple[Block, Tensor]],
    blocks: Sequence[Block],
    each: Callable[[int, list[Tensor]], np.ndarray],
) -> Sequence[tuple[float, list[np.ndarray]]]:
    """(terms, values) of every unit; an operator that does not tell units apart is one unit."""
    by_unit = getattr(operator, "columns_by_unit", None)
    if by_unit is not None:
        return by_unit(requests, blocks, each)[1]
    found = operator.columns(requests, blocks)
    return [(1.0, [each(number, parts) for number, parts in enumerate(found)])]


def _measured(objective: Objective, direction: Mapping[Block, Tensor]) -> np.ndarray:
    """(U,) the change of every unit's loss, from one forward pass before and one behind the
    move.
    """
    parameters = objective.parameters()
    before, _ = losses_by_unit(objective)
    with shifted(parameters, joined(direction, parameters)):
        after, _ = losses_by_unit(objective)
    return after - before


def losses_by_unit(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """(U,) sums of the loss terms of the micro-batches, and (U,) their numbers of terms."""
    with objective.prepared(), torch.no_grad():
        pairs = [objective.loss_sum(batch) for batch in objective.batches()]
    return np.array([float(total) for total, _ in pairs]), np.array([count for _, count in pairs])


def over_units(sums: np.ndarray, terms: np.ndarray) -> Estimate:
    """The mean over all loss terms, exact for the given data, with its jackknife error over units.

    Args:
        sums: (U,) sums over the terms of each unit.
        terms: (U,) numbers of terms.
    """
    value = float(sums.sum() / terms.sum())
    count = len(sums)
    if count < FEWEST_UNITS:
        return Estimate(value, 0.0, None)
    left_out = (sums.sum() - sums) / (terms.sum() - terms)
    return Estimate(value, 0.0, math.sqrt((count - 1) * left_out.var()))


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
