"""How many peaks a density is drawn with, and how much of its mass lies where it should: ``python
-m benchmarks.densities``.

Spectra whose number of peaks is known, as a block with these eigenvalues would get them
(:mod:`benchmarks.simulated`), drawn at default settings. A peak rises by a twentieth of its own
height from the valleys on both sides, so that a single outlier of a million eigenvalues counts as
one, and a wave in a tail too. Total variation is that of the masses of 40 cells, which are even on
the scale of the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI

from benchmarks.families import marchenko_pastur, semicircle
from benchmarks.record import write
from benchmarks.simulated import Measure, adaptive, fixed
from blockspec.engine.accuracy import Accuracy
from blockspec.spectra.spectrum import Spectrum

SCHEDULES = ("1,10", "2,30", "4,40", "auto 0.01", "10,100")
RISE = 0.05  # of a peak's own height
CELLS = 40
PLACES = 1000  # of a bulk; where there are more eigenvalues, each place has as many of them
POINTS = 2000


@dataclass(frozen=True)
class Known:
    """Eigenvalues of a bulk (n,), how many peaks it has, and outliers, each a peak of its own."""

    bulk: Callable[[int], np.ndarray]
    peaks: int
    outliers: tuple[float, ...] = ()

    @property
    def number(self) -> int:
        return self.peaks + len(self.outliers)

    def measure(self, size: int) -> Measure:
        bulk = self.bulk(min(size, PLACES) - len(self.outliers))
        counts = np.full(len(bulk), (size - len(self.outliers)) // len(bulk))
        return (
            np.concatenate([bulk, self.outliers]),
            np.concatenate([counts, np.ones(len(self.outliers), int)]),
        )


def middles(size: int) -> np.ndarray:
    return (np.arange(size) + 0.5) / size


def semicircles(*parts: tuple[float, float, float]) -> Callable[[int], np.ndarray]:
    """Share, centre and radius of each."""

    def bulk(size: int) -> np.ndarray:
        counts = [round(size * share) for share, _, _ in parts[1:]]
        pieces = zip([size - sum(counts), *counts], parts, strict=True)
        return np.concatenate([centre + semicircle(n, radius) for n, (_, centre, radius) in pieces])

    return bulk


def half_zero(size: int) -> np.ndarray:
    return np.where(np.arange(size) % 2, marchenko_pastur(size), 0.0)


def signs(size: int) -> np.ndarray:
    return np.where(np.arange(size) % 2, 1.0, -1.0)


KNOWN = {
    "semicircle": Known(semicircles((1, 0, 1)), 1),
    "Marchenko-Pastur": Known(marchenko_pastur, 1),
    "uniform": Known(lambda n: 2 * middles(n) - 1, 1),
    "triangle": Known(lambda n: np.sqrt(middles(n)), 1),
    "two": Known(semicircles((0.5, -1, 0.3), (0.5, 1, 0.3)), 2),
    "two that touch": Known(semicircles((0.5, -1, 0.9), (0.5, 1, 0.9)), 2),
    "two unequal": Known(semicircles((0.9, 0, 0.1), (0.1, 1, 0.2)), 2),
    "three": Known(semicircles((0.4, -1, 0.2), (0.3, 0.3, 0.2), (0.3, 1, 0.2)), 3),
    "narrow clusters": Known(semicircles((0.7, 1, 0.01), (0.3, -0.5, 0.01)), 2),
    "plus and minus one": Known(signs, 2),
    "half zero": Known(half_zero, 2),
    "semicircle, one outlier": Known(semicircles((1, 0, 0.3)), 1, (1.0,)),
    "narrow, four outliers": Known(semicircles((1, 0, 0.01)), 1, (1.0, 0.7, 0.5, 0.35)),
    "outliers of both signs": Known(
        semicircles((1, 0, 0.05)), 1, (-1.0, -0.7, -0.4, 0.4, 0.55, 0.75, 1.0)
    ),
}


def peaks(density: np.ndarray, rise: float = RISE) -> int:
    """Maxima that rise from the higher of the minima beside them by a part of their height."""
    found, low, high = 0, density[0], density[0]
    for value in density[1:]:
        high = max(high, value)
        if min(high - value, high - low) > rise * high:
            found, low, high = found + 1, value, value
        if value < low:
            low = high = value
    return found


def spectra(known: Known, size: int, schedule: str, seeds: int) -> Iterator[Spectrum]:
    """One for each seed, but for those of which all eigenvalues were computed."""
    truth = known.measure(size)
    randoms = [np.random.default_rng([seed, size]) for seed in range(seeds)]
    if schedule.startswith("auto"):
        accuracy = Accuracy(None, None, float(schedule.split()[1]))
        for random in randoms:
            found, _ = adaptive(*truth, accuracy, random)
            if found is not None:
                yield found
        return
    probes, steps = map(int, schedule.split(","))
    for _, _, found in fixed([truth] * seeds, [(probes, steps)], randoms):
        yield found


def variation(grid: np.ndarray, density: np.ndarray, linear: float, truth: Measure) -> float:
    """Total variation between the masses of cells."""
    places, counts = truth
    low, high = np.arcsinh(np.array([grid[0], grid[-1]]) / linear)
    ends = linear * np.sinh(np.linspace(low, high, CELLS + 1))
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    masses = np.diff(np.interp(ends, grid, below))
    return float(
        np.abs(masses - np.histogram(places, ends, weights=counts / counts.sum())[0]).sum() / 2
    )


def row(known: Known, size: int, found: Sequence[Spectrum]) -> dict[str, object]:
    """Of one family and schedule: the number of peaks that there are and that are drawn."""
    numbers, variations = [], []
    for spectrum in found:
        grid = spectrum.grid(POINTS)
        density = spectrum.density(grid)
        numbers.append(peaks(density))
        variations.append(variation(grid, density, spectrum.linear, known.measure(size)))
    return {
        "peaks": known.number,
        "drawn": float(np.mean(numbers)),
        "right": float(np.mean(np.equal(numbers, known.number))),
        "too many": float(np.mean(np.greater(numbers, known.number))),
        "total variation": float(np.mean(variations)),
        "seeds": len(found),
    }


def main(
    sizes: tuple[int, ...] = (1000, 100_000),
    schedules: tuple[str, ...] = SCHEDULES,
    families: tuple[str, ...] = tuple(KNOWN),
    seeds: int = 8,
) -> None:
    """Measures and writes the table.

    Args:
        sizes: Parameters of the block.
        schedules: Probes and steps, or ``auto`` with a tolerance.
        families: Some of those known here.
        seeds: Of each family, size and schedule.
    """
    rows = []
    for schedule in schedules:
        for size in sizes:
            for family in families:
                found = list(spectra(KNOWN[family], size, schedule, seeds))
                if found:
                    head = {"family": family, "P": size, "schedule": schedule}
                    rows.append(head | row(KNOWN[family], size, found))
            print(schedule, size, flush=True)
    every = pd.DataFrame(rows)
    numbers = ["right", "too many", "total variation"]
    means = every.groupby("schedule", sort=False)[numbers].mean()
    note = (
        "Clusters narrower than a twentieth of their place, zeros and single points are drawn as "
        "wide as that, so that outliers can be seen: most of the total variation is theirs."
    )
    write("densities", {"By schedule": means, "Each family": every}, notes=note)


if __name__ == "__main__":
    torch.set_num_threads(1)
    CLI(main)
