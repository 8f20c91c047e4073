"""Just enough data: as many units as the tolerance needs for each block.

The idea. The work is the number of units times the products of the estimate. The error of the data
falls like one over the root of the units. That of the estimate falls about like one over its
products: eigenvalues that are known one by one make no noise. So the work is least where the square
of the estimate's own error is a third of the tolerance's, and the data may use what it leaves.

A first round takes ``FIRST`` units for all blocks. Its error of the data foretells how many units
each block needs. Blocks that need about as many go through the next round together, and the round
after that is only for those whose error was foretold too small. Units are taken in a random order,
each round's among those of the next: batches are often sorted, and the first ones would be no
sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from blockspec.model.objective import Objective
from blockspec.numerics.measures import CONFIDENCE
from blockspec.spectra.collection import Cost
from blockspec.spectra.spectrum import Spectrum

FIRST = 16  # units of the first round: enough to know their spread to a fifth
ESTIMATES_SHARE = 0.6  # of the tolerance: about the root of a third
LEAST = 1.25  # times the units of the round before, so that few rounds follow
MOST = 4.0  # times them: from few, up to ten times the units were foretold that were needed
FINENESS = 2**0.125  # between two numbers of units that rounds have

FORESEEN = 1.02  # how closely it is foreseen how many units will do
MOST_ABOVE = 3.0  # times the population's norm: what the norm of few data is taken to be at most
COUNTED = ("gradients", "products")

Measure = Callable[[Objective, Sequence[str], str], tuple[list[Spectrum], Cost]]
"""``measure(objective, names of blocks, name of the round)``: their spectra."""


class Round(NamedTuple):
    """What a block's latest round gave.

    Attributes:
        spectrum: Its ``units`` are those that went through the model. They are finer than the
            objective's where memory was short.
        taken: Units of the objective.
    """

    spectrum: Spectrum
    taken: int

    def needed(self, tolerance: float) -> int:
        """Units of the objective that bring the total error within the tolerance."""
        return -(-units_needed(self.spectrum, tolerance) * self.taken // self.spectrum.units)


def with_enough_data(
    objective: Objective, names: Sequence[str], tolerance: float, seed: int, measure: Measure
) -> tuple[dict[str, Spectrum], Cost]:
    """The spectra by block, each from as many units of data as it needs.

    Args:
        objective: With all of the data.
        names: Of the blocks.
        tolerance: Of the total error, relative to the block's norm.
        seed: Of the order in which units are taken.
        measure: Makes spectra from a part of the data.
    """
    available = objective.num_units()
    order = np.random.default_rng(seed).permutation(available)
    found: dict[str, Round] = {}
    costs: list[Cost] = []
    asked = dict.fromkeys(names, min(FIRST, available))
    while asked:
        for units, group in _groups(asked):
            part = objective.of_units(sorted(order[:units].tolist()))
            spectra, cost = measure(part, group, f"units_{units}_{len(costs)}")
            costs.append(cost)
            found |= {spectrum.block.name: Round(spectrum, units) for spectrum in spectra}
        asked = _still_needed(found, list(asked), tolerance, available)
    _warn_of_too_few(found, tolerance, available)
    gradients, products = (sum(getattr(c, name) for c in costs) for name in COUNTED)
    spectra_of = {name: latest.spectrum for name, latest in found.items()}
    return spectra_of, replace(costs[0], gradients=gradients, products=products)


@dataclass(frozen=True)
class Foreseen:
    """How much data a tolerance takes, as the first units foretell.

    Args:
        units: Of each block, the units that bring its total error within the tolerance.
        available: Units in all.
        terms: Loss terms of a unit on average: tokens, images or what else the loss is a mean over.
    """

    units: dict[str, int]
    available: int
    terms: float


def foreseen(
    objective: Objective, names: Sequence[str], tolerance: float, seed: int, measure: Measure
) -> Foreseen:
    """From the units of the first round alone; arguments as of :func:`with_enough_data`."""
    available = objective.num_units()
    order = np.random.default_rng(seed).permutation(available)
    part = objective.of_units(sorted(order[:FIRST].tolist()))
    spectra, _ = measure(part, names, "foreseen")
    units = {s.block.name: Round(s, FIRST).needed(tolerance) for s in spectra}
    with part.prepared(), torch.no_grad():
        terms = sum(part.loss_sum(batch)[1] for batch in part.batches())
    return Foreseen(units, available, terms / FIRST)


def _groups(asked: dict[str, int]) -> Iterator[tuple[int, list[str]]]:
    """Blocks that are given the same number of units."""
    for units in sorted(set(asked.values())):
        yield units, [name for name, number in asked.items() if number == units]


def _still_needed(
    found: dict[str, Round], names: Sequence[str], tolerance: float, available: int
) -> dict[str, int]:
    """By block, the units of its next round; without those that are done, or have all of them."""
    asked = {}
    for name in names:
        latest = found[name]
        needed = latest.needed(tolerance)
        if needed > latest.taken and latest.taken < available:
            aim = min(max(needed, LEAST * latest.taken), MOST * latest.taken)
            steps = math.ceil(math.log(aim / FIRST, FINENESS))
            asked[name] = min(available, round(FIRST * FINENESS**steps))
    return asked


def units_needed(spectrum: Spectrum, tolerance: float) -> int:
    """How many units of data, of those that the spectrum is of, bring its total error within the
    tolerance, relative to the norm of the population.

    The error of the estimate is given at least what :data:`ESTIMATES_SHARE` leaves to the data.
    """
    if spectrum.data_error is None:
        raise ValueError(
            f"block {spectrum.block.name!r}: the error of its data is not known "
            f"({spectrum.units} units)"
        )
    rounded = CONFIDENCE * spectrum.precision_error > tolerance * spectrum.norm  # as more data are
    if spectrum.is_zero or rounded:
        return spectrum.units
    error, allowed = spectrum.error, tolerance * _likely_norm(spectrum)

    def do(growth: float) -> bool:
        """Whether so many times the units would, by what is known from those of the spectrum."""
        own = error if growth == 1 else min(error, ESTIMATES_SHARE * allowed)
        data = spectrum.foretold_data_error(growth)
        return data is not None and math.hypot(own, data) <= allowed

    if do(1.0):
        return spectrum.units
    low, high = 1.0, 2.0
    while not do(high):
        low, high = high, 2 * high
    while high > low * FORESEEN and (high - low) * spectrum.units > 1:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if do(middle) else (middle, high)
    return math.ceil(spectrum.units * high)


def _likely_norm(spectrum: Spectrum) -> float:
    """The norm of the population, as the units foretell it.

    The norm of few data is too large, twice as large where one of 16 units dominates, and with it
    the error that is allowed. The jackknife tells how much of it is bias.
    """
    without = spectrum.left_out()
    assert without is not None
    norms = np.abs(without[0]).max((1, 2))
    bias = (len(norms) - 1) * (float(norms.mean()) - spectrum.norm)
    return max(spectrum.norm - max(bias, 0.0), spectrum.norm / MOST_ABOVE)


def _warn_of_too_few(found: dict[str, Round], tolerance: float, available: int) -> None:
    """Says how far the data got, and how many units would do."""
    missing = {
        name: latest.needed(tolerance)
        for name, latest in found.items()
        if latest.needed(tolerance) > latest.taken
    }
    if not missing:
        return
    worst = max(missing, key=lambda name: missing[name])
    spectrum, taken = found[worst]
    error = spectrum.data_error
    assert error is not None
    warnings.warn(
        f"the data are too few for the tolerance {tolerance:g} of {len(missing)} of {len(found)} "
        f"blocks: of {worst!r} the error of the data is {error / spectrum.norm:.1e} of the "
        f"norm with {taken} of {available} units; about {missing[worst]} units would do",
        stacklevel=4,
    )


def check_objective(objective: Objective | None) -> Objective:
    """What ``data="auto"`` needs.

    Raises:
        ValueError: There is no objective, its data cannot be divided, or too few units.
    """
    if objective is None:
        raise ValueError(
            "data='auto' needs an objective: it takes as many of its batches as the error of the "
            "data asks for"
        )
    if objective.sharded:
        raise ValueError(
            "data='auto' is not for Objective(..., sharded=True), where each process holds data of "
            "its own: give every process all batches, and leave out sharded"
        )
    if (units := objective.num_units()) < FIRST:
        raise ValueError(
            f"data='auto' needs at least {FIRST} units, and the data go through the model in "
            f"{units}: cut them finer with Objective(..., micro_batch=1), or give more"
        )
    return objective
