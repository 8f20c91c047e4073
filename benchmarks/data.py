"""Do errors of the data hold, and does ``data="auto"`` take as little as it may? ``python -m
benchmarks.data``

Data sets are drawn from populations whose matrices are known, see
:mod:`benchmarks.data_populations`; they go through the estimate as it is.
"""

from __future__ import annotations

import math
import multiprocessing
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from scipy.special import stdtrit

import blockspec
from benchmarks.data_populations import POPULATIONS, Population
from benchmarks.record import write
from blockspec.engine.enough import ESTIMATES_SHARE, with_enough_data
from blockspec.numerics.jackknife import MOST_GROUPS
from blockspec.numerics.measures import wasserstein
from blockspec.spectra.collection import Cost
from blockspec.spectra.intervals import total_interval
from blockspec.spectra.spectrum import Estimate, RitzValue, Spectrum

PROBES, STEPS = 4, 16
CASES = {
    "GPT-2 block": ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
    "full GPT-2": ("gpt2", None),
    "ResNet block": ("resnet", "first.weight"),
    "heavy-tailed block": ("heavy", "piece_0"),
}
AVAILABLE = 8192  # units that data="auto" may take
SHARE = 20  # data sets that one process does at a time
BY = {"best fixed, by the truth": False, "best fixed, by its error": True}


@cache
def made(model: str) -> Population:
    """Each process makes a population once."""
    torch.set_num_threads(1)
    return POPULATIONS[model]()


def estimated(
    population: Population, chosen: np.ndarray, *, whole: bool = True, **settings: Any
) -> dict[str, Spectrum]:
    """The spectra of the pieces and, if wanted, of the whole matrix, from these units."""
    operator = population.drawn(chosen)
    blocks = population.blocks(operator) + ([operator.block()] if whole else [])
    found = blockspec.estimate_spectra(
        None, blocks, curvature=operator, check=False, progress=False, **settings
    )
    return {n: replace(s, units=len(chosen)) for n, s in found.items()}


def root_mean_square(spectrum: Spectrum) -> Estimate:
    """Of the eigenvalues."""
    square = spectrum.moment(2)
    root = math.sqrt(square.value)
    return Estimate(root, *(None if e is None else e / (2 * root) for e in square[1:]))


def numbers(spectra: dict[str, Spectrum], name: str | None) -> dict[str, Estimate | RitzValue]:
    """What is asked for: of the block, and of all pieces together."""
    spectrum = spectra[name or "matrix"]
    pieces = {n: s for n, s in spectra.items() if n != "matrix"}
    return {
        "trace": spectrum.trace,
        "root_mean_square": root_mean_square(spectrum),
        "largest": spectrum.largest,
        "js0": blockspec.js0(pieces),
    }


def plain(found: Estimate | RitzValue, units: int) -> tuple[float, float]:
    """The symmetric interval that was stated before: both errors by their own Student's t."""
    data = stdtrit(min(units, MOST_GROUPS) - 1, 0.975) * (found.data_stderr or 0.0)
    own = found.residual if isinstance(found, RitzValue) else found.stderr or 0.0
    if isinstance(found, Estimate):
        own *= stdtrit(PROBES - 1, 0.975)
    half = math.hypot(data, own)
    return found.value - half, found.value + half


def intervals(model: str, cases: dict[str, str | None], units: int, seeds: range) -> list[dict]:
    """A row a case, number and data set: whether the interval holds the population's."""
    population = made(model)
    everyone = np.arange(len(population.matrices))
    whole = None in cases.values()
    exact = estimated(
        population, everyone, whole=whole, num_probes=16, num_steps=500, data_errors=False
    )
    truth = {case: numbers(exact, name) for case, name in cases.items()}
    rows = []
    for seed in seeds:
        chosen = np.random.default_rng(seed).choice(everyone, units)
        settings = {"num_probes": PROBES, "num_steps": STEPS, "seed": seed}
        found = estimated(population, chosen, whole=whole, **settings)
        for case, name in cases.items():
            for number, value in numbers(found, name).items():
                right = truth[case][number].value
                ends = (
                    total_interval(value, PROBES, units)  # type: ignore[arg-type]
                    if number == "js0"
                    else found[name or "matrix"].interval(number)
                )
                before = plain(value, units)
                rows.append(
                    {
                        "case": case,
                        "number": number,
                        "units": units,
                        "held before": before[0] <= right <= before[1],
                        "held": ends[0] <= right <= ends[1],
                        "is below": right < ends[0],
                        "is above": right > ends[1],
                        "width before": (before[1] - before[0]) / abs(right),
                        "width": (ends[1] - ends[0]) / abs(right),
                    }
                )
    return rows


def coverage(rows: Sequence[dict]) -> pd.DataFrame:
    """A row a case and number: how often the interval holds the population's."""
    groups = pd.DataFrame(rows).groupby(["case", "number", "units"], sort=False)
    means = groups[["held before", "held", "is below", "is above"]].mean()
    return means.join(groups[["width before", "width"]].median()).reset_index()


class DataSet:
    """What :func:`with_enough_data` asks of an objective.

    Args:
        units: Of the population, in the order of the data.
    """

    def __init__(self, units: np.ndarray) -> None:
        self.units = units

    def num_units(self) -> int:
        """All that may be taken."""
        return len(self.units)

    def of_units(self, numbers: Collection[int]) -> DataSet:
        """Some of them."""
        return DataSet(self.units[list(numbers)])


def enough(
    population: Population, name: str | None, tolerance: float, seed: int
) -> tuple[Spectrum, int, list[int]]:
    """The spectrum with ``data="auto"``, the products that it took times units, and the units of
    each round.
    """
    everyone = len(population.matrices)
    data = DataSet(np.random.default_rng(seed).integers(0, everyone, AVAILABLE))
    products, rounds = 0, []

    def measure(part: Any, names: Sequence[str], _: str) -> tuple[list[Spectrum], Cost]:
        nonlocal products
        operator = population.drawn(part.units)
        block = {b.name: b for b in [*population.blocks(operator), operator.block()]}[names[0]]
        found = blockspec.estimate_spectra(
            None,
            block,
            curvature=operator,
            check=False,
            progress=False,
            seed=seed,
            num_probes="auto",
            num_steps="auto",
            tolerance=ESTIMATES_SHARE * tolerance,
        )
        products += operator.products * len(part.units)
        rounds.append(len(part.units))
        return [replace(s, units=len(part.units)) for s in found.values()], Cost(0, 0)

    found, _ = with_enough_data(data, [name or "matrix"], tolerance, seed, measure)  # type: ignore[arg-type]
    return found[name or "matrix"], products, rounds


def fixed(model: str, name: str | None, tolerance: float, sets: int, *, stated: bool) -> int:
    """The fewest products times units of a fixed choice that is good in 95 % of data sets; 0 where
    none of the grid is.

    Args:
        stated: Good means that the stated total error is within the tolerance, as a user sees it.
            Else that the distance to the population's spectrum is, which nobody knows who does not
            know the population.
    """
    population, best = made(model), None
    for units, probes, steps in grid():
        work = units * probes * steps
        if best is not None and work >= best:
            continue
        misses = 0
        for seed in range(sets):
            spectrum = chosen(population, name, units, probes, steps, seed, errors=stated)
            misses += not (
                (spectrum.total_error or math.inf) <= tolerance * spectrum.norm
                if stated
                else distance(population, name, spectrum) <= tolerance
            )
            if misses > 0.05 * sets:
                break
        else:
            best = work
    return best or 0


def chosen(
    population: Population,
    name: str | None,
    units: int,
    probes: int,
    steps: int,
    seed: int,
    *,
    errors: bool,
) -> Spectrum:
    """A fixed choice on the data set of a seed."""
    drawn = np.random.default_rng(seed).integers(0, len(population.matrices), units)
    operator = population.drawn(drawn)
    blocks = {b.name: b for b in [*population.blocks(operator), operator.block()]}
    found = blockspec.estimate_spectra(
        None,
        blocks[name or "matrix"],
        curvature=operator,
        check=False,
        progress=False,
        seed=seed,
        num_probes=probes,
        num_steps=steps,
        data_errors=errors,
    )
    (spectrum,) = found.values()
    return replace(spectrum, units=units)


def grid() -> Iterator[tuple[int, int, int]]:
    """Units, probes and steps, in ascending order of the work."""
    units = [16 * 2**k for k in range(10)]
    choices = [(n, k, m) for n in units for k in (1, 2, 4, 8) for m in (4, 8, 12, 16, 24)]
    return iter(sorted(choices, key=math.prod))


def distance(population: Population, name: str | None, spectrum: Spectrum) -> float:
    """Wasserstein distance to the population's spectrum, relative to that one's norm."""
    values = truth(population, name)
    measure = spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes
    whole = values, np.full(len(values), 1 / len(values))
    return wasserstein(measure, whole) / float(np.abs(values).max())


def truth(population: Population, name: str | None) -> np.ndarray:
    """(P,) the population's eigenvalues."""
    rows = slice(None) if name is None else population.pieces[name]
    return np.linalg.eigvalsh(population.matrices.mean(0).double().numpy()[rows, rows])


def runs(model: str, name: str | None, tolerance: float, seeds: range) -> list[dict]:
    """What ``data="auto"`` gives for each data set, and what it took."""
    population, outcomes = made(model), []
    norm = float(np.abs(truth(population, name)).max())
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spectrum, work, rounds = enough(population, name, tolerance, seed)
        total = spectrum.total_error or math.nan
        outcomes.append(
            {
                "within": distance(population, name, spectrum) <= tolerance,
                "total error holds": distance(population, name, spectrum) * norm <= total,
                "said": total / spectrum.norm,
                "distance": distance(population, name, spectrum),
                "norm": spectrum.norm / norm,
                "units": rounds[-1],
                "rounds": len(rounds),
                "work": work,
            }
        )
    return outcomes


def auto(outcomes: Sequence[dict]) -> dict[str, float]:
    """How often the spectrum is within the tolerance, and what that took."""
    table = pd.DataFrame(outcomes)
    medians = {str(name): float(value) for name, value in table.median().items()}
    shares = {name: float(table[name].mean()) for name in ("within", "total error holds")}
    return medians | shares | {"mean work": float(table["work"].mean())}


def main(
    parts: Sequence[str] = ("coverage", "auto"),
    models: Sequence[str] = tuple(POPULATIONS),
    cases: Sequence[str] = tuple(CASES),
    sets: int = 100,
    choices: int = 40,
    first: int = 0,
    tolerances: Sequence[float] = (5e-2, 2e-2),
    processes: int = 1,
) -> None:
    """Measures and writes a table of each part.

    Args:
        parts: What to measure.
        models: Populations; see ``POPULATIONS``.
        cases: Of the populations; see ``CASES``.
        sets: Data sets of each case.
        choices: Data sets that each fixed choice is tried on.
        first: Seed of the first data set. The intervals were made with those from 30000 on, the
            errors of spectra with those from 50000 on.
        tolerances: Of ``data="auto"``.
        processes: That share the work.
    """
    shares = [range(first + sets)[k : k + SHARE] for k in range(first, first + sets, SHARE)]
    tables: dict[str, pd.DataFrame] = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        held = [
            pool.submit(intervals, model, cases_of(model, cases), units, seeds)
            for model in models
            for units in (16, 64)
            for seeds in shares
            if "coverage" in parts
        ]
        asked = {
            (case, tolerance): (
                [
                    pool.submit(fixed, model, name, tolerance, choices, stated=s)
                    for s in BY.values()
                ],
                [pool.submit(runs, model, name, tolerance, seeds) for seeds in shares],
            )
            for model in models
            for case, name in cases_of(model, cases).items()
            for tolerance in tolerances
            if "auto" in parts
        }
        if held:
            rows = [row for future in held for row in future.result()]
            tables["how often 95 % intervals of the total error hold"] = coverage(rows)
        if asked:
            tables["data='auto' against the best fixed choice"] = pd.DataFrame(
                {"case": case, "tolerance": tolerance}
                | auto([row for future in outcomes for row in future.result()])
                | {by: future.result() for by, future in zip(BY, choice, strict=True)}
                for (case, tolerance), (choice, outcomes) in asked.items()
            )
    name = "_".join(["data", *parts, *models])
    write(name, tables, notes=f"{sets} data sets a case; {choices} for fixed choices.")


def cases_of(model: str, cases: Sequence[str]) -> dict[str, str | None]:
    """Case -> the name of its block, or None for the whole matrix."""
    return {case: name for case, (own, name) in CASES.items() if own == model and case in cases}


if __name__ == "__main__":
    CLI(main, as_positional=False)
