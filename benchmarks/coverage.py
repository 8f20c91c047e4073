"""How often what is said of an error is true, on spectra that nobody chose it for: ``python -m
benchmarks.coverage``.

A cell of the table is a family of spectra, a size and a claim: ``auto`` with a tolerance, or fixed
numbers of probes and steps. Each seed has other probes, and those families that are random another
spectrum. :mod:`benchmarks.simulated` says how. A run of hours is done in pieces: cells that are in
the file of ``--rows`` are not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from scipy.special import ndtri

from benchmarks.families import FAMILIES, HELD_OUT
from benchmarks.record import write
from benchmarks.simulated import LARGEST, Measure, adaptive, fixed, measure
from blockspec.engine.accuracy import Accuracy
from blockspec.engine.estimate import SLACK
from blockspec.numerics.measures import wasserstein
from blockspec.spectra.spectrum import Spectrum

FIXED = ("1,10", "2,30", "4,40", "10,100")  # probes, steps
LEAST = 0.93  # of the seeds, where 95 % are claimed
FEWEST = 4  # seeds of a cell, however long they take
ROUNDING = 1e-12
ALL = FAMILIES | HELD_OUT


@dataclass(frozen=True)
class Outcome:
    """One estimate against the truth; distances relative to the norm.

    ``error`` is what was said, ``distance`` what is true.
    """

    error: float
    distance: float
    products: int


def tolerance_of(claim: str) -> float | None:
    return float(claim.split()[1]) if claim.startswith("auto") else None


def drawn(family: str, size: int, seed: int) -> tuple[Measure, np.random.Generator]:
    """The eigenvalues of one seed, and the random numbers for its probes."""
    random = np.random.default_rng([seed, size])
    return measure(ALL[family](size, random)), random


def outcome(spectrum: Spectrum | None, truth: Measure, products: int) -> Outcome:
    """None: all eigenvalues were computed."""
    if spectrum is None:
        return Outcome(0.0, 0.0, products)
    places, counts = truth
    estimated = spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes
    distance = wasserstein(estimated, (places, counts / counts.sum()))
    norm = np.abs(places).max()
    return Outcome(spectrum.error / norm, distance / norm, products)


def trials(
    family: str, size: int, claim: str, seeds: int, *, seconds: float = np.inf
) -> list[Outcome]:
    """Outcomes of one cell with ``auto``, as many as the processor makes in that time."""
    tolerance, start = tolerance_of(claim), time.process_time()
    if tolerance is None:
        return trials_fixed(family, size, [claim], seeds)[claim]
    found: list[Outcome] = []
    for seed in range(seeds):
        truth, random = drawn(family, size, seed)
        result = adaptive(*truth, Accuracy(None, None, tolerance), random)
        found.append(outcome(result[0], truth, result[1]))
        if len(found) >= FEWEST and time.process_time() - start > seconds:
            break
    return found


def trials_fixed(
    family: str, size: int, claims: Sequence[str], seeds: int
) -> dict[str, list[Outcome]]:
    """Outcomes of several cells with fixed numbers. A matrix with no more eigenvalues than steps is
    done exactly.
    """
    numbers = {claim: tuple(map(int, claim.split(","))) for claim in claims}
    found = {claim: [Outcome(0.0, 0.0, size)] * seeds for claim in claims}
    estimated = [claim for claim in claims if numbers[claim][1] < size]
    if not estimated:
        return found
    measures, randoms = zip(*(drawn(family, size, seed) for seed in range(seeds)), strict=True)
    pairs = [(numbers[claim][0], numbers[claim][1]) for claim in estimated]
    found |= {claim: [] for claim in estimated}
    for number, seed, spectrum in fixed(measures, pairs, randoms):
        products = pairs[number][0] * pairs[number][1]
        found[estimated[number]].append(outcome(spectrum, measures[seed], products))
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share of so many (Wilson 1927)."""
    z = float(ndtri(0.975))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return middle - reach, middle + reach


def row(outcomes: Sequence[Outcome], tolerance: float | None) -> dict[str, object]:
    """One cell. ``says within the tolerance``: no warning tells of another error; ``and is``: share
    of these.
    """
    error, distance = (np.array([getattr(o, n) for o in outcomes]) for n in ("error", "distance"))
    some = distance > ROUNDING
    inside = float((distance <= error + ROUNDING).mean())
    low, high = wilson(inside, len(outcomes))
    cell: dict[str, object] = {
        "seeds": len(outcomes),
        "within the error": inside,
        "of 95 %": f"{low:.3f} to {high:.3f}",
        "worst": float(np.max(distance / np.maximum(error, ROUNDING))),
        "looseness": float(np.median(error[some] / distance[some])) if some.any() else np.nan,
        "products": float(np.median([o.products for o in outcomes])),
        "exact": float(1 - some.mean()),
    }
    if tolerance is not None:
        said = error <= SLACK * tolerance
        held = float((distance[said] <= tolerance).mean()) if said.any() else np.nan
        cell |= {"says within the tolerance": float(said.mean()), "and is": held}
    return cell


def cells(
    family: str, size: int, claims: Sequence[str], seeds: int, seconds: float
) -> Iterator[dict[str, object]]:
    """A row for each claim."""
    held_out = "yes" if family in HELD_OUT else ""
    head: dict[str, object] = {"family": family, "held out": held_out, "P": size}
    shared = [claim for claim in claims if tolerance_of(claim) is None]
    of_fixed = trials_fixed(family, size, shared, seeds)
    for claim in claims:
        found = of_fixed.get(claim) or trials(family, size, claim, seeds, seconds=seconds)
        yield head | {"claim": claim} | row(found, tolerance_of(claim))


def table(
    families: Sequence[str],
    sizes: Sequence[int],
    claims: Sequence[str],
    seeds: int,
    *,
    seconds: float = np.inf,
    done: pd.DataFrame | None = None,
    keep: Callable[[dict[str, object]], None] = lambda cell: None,
) -> pd.DataFrame:
    """A row for each family, size and claim; those that are ``done`` as they are."""
    rows: list[dict[str, object]] = []
    if done is not None:
        rows += [dict(zip(done.columns, cell, strict=True)) for cell in done.to_numpy()]
    have = {(r["family"], r["P"], r["claim"]) for r in rows}
    for family in families:
        for size in sizes:
            missing = [claim for claim in claims if (family, size, claim) not in have]
            for cell in cells(family, size, missing, seeds, seconds):
                rows.append(cell)
                keep(cell)
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Claim, measured, looseness: over all families and sizes."""
    rows = {}
    for claim, part in found.groupby("claim", sort=False):
        estimated = part[part["exact"] < 1]
        many = estimated[estimated["seeds"] >= 100]
        rows[claim] = {
            "cells": len(part),
            "not exact": len(estimated),
            "least of 100 seeds": many["within the error"].min(),
            f"below {LEAST}": int((many["within the error"] < LEAST).sum()),
            "mean": float(np.average(estimated["within the error"], weights=estimated["seeds"])),
            "worst": estimated["worst"].max(),
            "median looseness": estimated["looseness"].median(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim")


def main(
    seeds: int = 200,
    sizes: tuple[int, ...] = (100, 1000, 100_000),
    tolerances: tuple[float, ...] = (1e-2, 2e-3, 5e-4),
    numbers: tuple[str, ...] = FIXED,
    families: tuple[str, ...] = tuple(ALL),
    seconds: float = 20.0,
    rows: Path | None = None,
) -> None:
    """Measures and writes the tables.

    Args:
        seeds: Of a cell, at most.
        sizes: Parameters of the block.
        tolerances: Of ``auto``.
        numbers: Fixed ones, probes and steps.
        families: From :mod:`benchmarks.families`.
        seconds: Of the processor, after which a cell with ``auto`` takes no more seeds.
        rows: CSV file of the cells that are done; more are added to it.
    """
    claims = [*numbers, *(f"auto {t:g}" for t in tolerances)]
    done = pd.read_csv(rows, keep_default_na=False) if rows and rows.exists() else None

    def keep(cell: dict[str, object]) -> None:
        print(" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in cell.values()))
        if rows is not None:
            columns = [*cell, *(c for c in TOLERANCE_COLUMNS if c not in cell)]
            frame = pd.DataFrame([cell]).reindex(columns=columns)
            frame.to_csv(rows, mode="a", header=not rows.exists(), index=False)

    found = table(families, sizes, claims, seeds, seconds=seconds, done=done, keep=keep)
    note = (
        f"Of more than {LARGEST} eigenvalues, groups stand as one place, in the truth as well. "
        f"Looseness: the error that was said over the distance that is true, at the median."
    )
    write("coverage", {"Claims": summary(found), "All cells": found}, notes=note)


TOLERANCE_COLUMNS = ("says within the tolerance", "and is")

if __name__ == "__main__":
    torch.set_num_threads(1)
    CLI(main)
