"""Sums over the loss terms of every unit of data, from all processes.

A unit is a micro-batch as it goes through the model. A number of the whole data is a ratio of sums
over units, so a jackknife over the units says how far the value for the population may lie. Where
processes share the data, each one goes through its own units, and all of them get those of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockspec.model.objective import Objective
from blockspec.numerics.jackknife import jackknife_error, jackknife_errors
from blockspec.numerics.ranks import Ranks, everywhere
from blockspec.numerics.units import without_each
from blockspec.products.curvature import Products
from blockspec.spectra.spectrum import Estimate

Samples = dict[str, np.ndarray]
"""Name -> sums over the loss terms of every unit, (U, ...)."""
Numbered = tuple[list[int], Samples]
"""Numbers of the batches that the units were cut from, and the units' sums."""


def over_units(sums: np.ndarray, terms: np.ndarray) -> Estimate:
    """The mean over all loss terms, exact for the given data, with its jackknife error over units.

    Args:
        sums: (U,) sums over the terms of each unit.
        terms: (U,) numbers of terms.
    """
    value = float(sums.sum() / terms.sum())
    return Estimate(value, 0.0, jackknife_error(value, without_each(sums, terms)))


def errors_over_units(sums: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """The errors of :func:`over_units` for many numbers at once.

    Args:
        sums: (U, ...) sums over the terms of each unit.
        terms: (U,) numbers of terms.

    Returns:
        (...,), nan where the units are too few.
    """
    rest = (terms.sum() - terms).reshape(-1, *(1,) * (sums.ndim - 1))
    return jackknife_errors(sums.sum(0) / terms.sum(), (sums.sum(0) - sums) / rest)


def of_all_processes(ranks: Ranks, make: Callable[[], Numbered]) -> Samples:
    """The units of all processes, in the order of the batches; those of batches of the same number
    in the order of the processes. An error on one process is an error on all.
    """
    if ranks.rows == 1:
        return make()[1]
    everyone = [own for own in ranks.all_of(everywhere(make)) if own[0]]  # some may have no units
    order = np.argsort(np.concatenate([numbers for numbers, _ in everyone]), kind="stable")
    names = everyone[0][1]
    return {name: np.concatenate([own[name] for _, own in everyone])[order] for name in names}


def losses_by_unit(
    objective: Objective, *, ranks: Ranks | None = None, micro_batch: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(U,) sums of the loss terms of the micro-batches, and (U,) their numbers of terms.

    Args:
        objective: The loss and its data.
        ranks: Processes that share the passes; None: those that hold a part of the data each.
        micro_batch: Examples of a unit; None: the objective's own.
    """
    ranks = ranks or objective.shards()

    def own() -> Numbered:
        numbers, sums, terms = [], [], []
        with objective.prepared(), torch.no_grad():
            dealt = objective.batches_in_step(micro_batch, row=ranks.row, rows=ranks.rows)
            for number, batch in dealt:
                total, count = objective.loss_sum(batch)
                if number is None:
                    continue
                numbers.append(number)
                sums.append(float(total))
                terms.append(count)
        return numbers, {"sums": np.array(sums, float), "terms": np.array(terms, float)}

    found = of_all_processes(ranks, own)
    return found["sums"], found["terms"]


def gradients_by_unit(
    objective: Objective,
    each: Callable[[Mapping[str, Tensor]], Sequence[float]],
    length: int,
    *,
    ranks: Ranks,
    micro_batch: int | None = None,
) -> Samples:
    """From one gradient of every micro-batch: ``losses`` (U,), sums of the loss terms, ``terms``
    (U,), their numbers, and ``values`` (U, length), what ``each`` makes of the gradient of the sum.
    """
    products = Products(objective, ranks=ranks, guarded=False)
    gradient_of = _by_layers if objective.weights.elsewhere else _at_once

    def own() -> Numbered:
        numbers: list[int] = []
        rows: list[list[float]] = []
        with objective.prepared():
            dealt = objective.batches_in_step(micro_batch, row=ranks.row, rows=ranks.rows)
            for number, batch in dealt:
                total, count, gradient = gradient_of(products, batch)
                if number is None:
                    continue
                numbers.append(number)
                rows.append([total, count, *each(gradient)])
        table = np.array(rows, float).reshape(len(rows), 2 + length)
        return numbers, {"losses": table[:, 0], "terms": table[:, 1], "values": table[:, 2:]}

    found = of_all_processes(ranks, own)
    if objective.weights.elsewhere:
        found["losses"], _ = losses_by_unit(objective, ranks=ranks, micro_batch=micro_batch)
    return found


def _at_once(products: Products, batch: Any) -> tuple[float, float, Mapping[str, Tensor]]:
    """Sum and number of the loss terms of a batch, and the gradient of the sum."""
    parameters = products.objective.parameters()
    total, count = products.objective.loss_sum(batch)
    parts = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), parts, strict=True)
    gradient = {n: torch.zeros_like(p) if part is None else part for (n, p), part in pairs}
    return float(total.detach()), count, gradient


def _by_layers(products: Products, batch: Any) -> tuple[float, float, Mapping[str, Tensor]]:
    """The same for weights that stay elsewhere, where the graph holds copies; without the sum."""
    linearised = products.linearise(batch, products.parameters)
    gradient = {name: torch.zeros_like(p) for name, p in products.parameters.items()}
    for tensors in linearised.gradient():
        for name, part in tensors.items():
            gradient[name] = gradient[name] + part
    return math.nan, linearised.terms, gradient
