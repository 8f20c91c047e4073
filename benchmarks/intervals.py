"""How often intervals of other numbers hold the truth: ``python -m benchmarks.intervals``.

Traces, norms, diagonals, couplings and heterogeneity of dense matrices with the eigenvalues of
:mod:`benchmarks.families` in a random basis, cut into three blocks, where all of it is known. Each
seed has other probes. An interval is meant to hold the truth in 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from scipy.special import stdtrit

import blockspec
from benchmarks.coverage import ALL, wilson
from benchmarks.record import write

FAMILIES = (
    "semicircle",
    "projection of rank P/2",
    "half zero",
    "power law 1",
    "power law 2",
    "trained",
    "initial",
    "outliers three times",
    "random bulk and outliers",
    "log-normal",
    "one pair on top",
)
Hits = Iterator[tuple[str, bool | float]]
"""(claim, whether the interval holds the truth, or the share of many that do)."""


class Dense:
    """A matrix (P, P) in a random basis, as an operator with three blocks."""

    def __init__(self, values: np.ndarray, seed: int) -> None:
        random = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(random.standard_normal((len(values), len(values))))
        self.matrix = basis * values @ basis.T
        tensor = torch.from_numpy(self.matrix)
        self.operator = blockspec.FunctionOperator(lambda v: tensor @ v, len(values))
        ends = np.linspace(0, len(values), 4).astype(int)
        self.slices = [slice(a, b) for a, b in pairwise(ends)]
        self.blocks = [self.operator.block(s.start, s.stop) for s in self.slices]

    def part(self, row: int, column: int) -> np.ndarray:
        return self.matrix[self.slices[row], self.slices[column]]


def holds(ends: tuple[float, float], truth: float) -> bool:
    rounding = 1e-9 * abs(truth)
    return ends[0] - rounding <= truth <= ends[1] + rounding


def student(value: blockspec.Estimate, count: int) -> tuple[float, float]:
    assert value.stderr is not None
    reach = float(stdtrit(count - 1, 0.975)) * value.stderr
    return value.value - reach, value.value + reach


def of_toolbox(it: Dense, probes: int, seed: int) -> Hits:
    """Of the first block: traces, squared norms, entries of the diagonal, couplings."""
    settings = {"curvature": it.operator, "num_probes": probes, "seed": seed}
    name, own = it.blocks[0].name, it.part(0, 0)
    methods = {"hutchinson": 1, "hutch++": 6, "xtrace": 8}  # two samples at least, for an error
    for method in [m for m, fewest in methods.items() if probes >= fewest]:
        found = blockspec.trace(None, it.blocks, method, **settings)
        yield f"trace, {method}", holds(found.interval(name), float(np.trace(own)))
    squared = blockspec.squared_norms(None, it.blocks, **settings)
    yield "squared norm", holds(squared.interval(name), float((own**2).sum()))
    diagonal = blockspec.diagonal(None, it.blocks, **settings)
    assert diagonal.stderrs is not None
    values, stderrs = diagonal.values["matrix"].numpy(), diagonal.stderrs["matrix"].numpy()
    off = np.abs(values - it.matrix.diagonal())
    yield "diagonal, entries", float((off <= stdtrit(probes - 1, 0.975) * stderrs).mean())
    yield "diagonal, mean", holds(diagonal.means.interval(name), own.diagonal().mean())
    coupling = blockspec.coupling(None, it.blocks, **settings)
    other = it.blocks[1].name
    yield "coupling", holds(coupling.interval(name, other), float(np.linalg.norm(it.part(0, 1))))
    inside = sum((it.part(i, i) ** 2).sum() for i in range(3))
    share = 1 - float(inside / (it.matrix**2).sum())
    yield "share off the diagonal", holds(student(coupling.off_diagonal_share, probes), share)


def of_spectra(it: Dense, probes: int, seed: int, heterogeneity: float | None) -> Hits:
    """What is read off spectra of 20 steps; without ``js0`` where its truth is not given."""
    settings = {"curvature": it.operator, "seed": seed}
    found = blockspec.estimate_spectra(None, it.blocks, probes, 20, **settings)
    one, own = found[it.blocks[0].name], it.part(0, 0)
    yield "trace of a spectrum", holds(student(one.trace, probes), float(np.trace(own)))
    row = blockspec.norms(found).iloc[0]
    size = blockspec.Estimate(row["squared_norm"], row["squared_norm_stderr"])
    yield "squared norm of a spectrum", holds(student(size, probes), float((own**2).sum()))
    if heterogeneity is not None:
        yield "js0", holds(student(blockspec.js0(found), probes), heterogeneity)


def trials(
    family: str, size: int, probes: int, seeds: int, js0_seeds: int
) -> dict[str, list[float]]:
    """By claim, what each seed says."""
    it = Dense(ALL[family](size, np.random.default_rng(0)), 0)
    exact = blockspec.estimate_spectra(None, it.blocks, 1, size, curvature=it.operator)
    truth = blockspec.js0(exact).value
    hits: dict[str, list[float]] = {}
    for seed in range(seeds):
        known = truth if seed < js0_seeds else None
        for part in (of_toolbox(it, probes, seed), of_spectra(it, probes, seed, known)):
            for claim, hit in part:
                hits.setdefault(claim, []).append(float(hit))
    return hits


def table(
    size: int,
    numbers: tuple[int, ...],
    families: tuple[str, ...],
    seeds: int,
    js0_seeds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """A row for each claim and number of probes, over all families."""
    rows: dict[tuple[str, int, int], dict[str, float]] = {}
    for probes in numbers:
        for family in families:
            for claim, hits in trials(family, size, probes, seeds, js0_seeds).items():
                rows.setdefault((claim, probes, len(hits)), {})[family] = float(np.mean(hits))
            progress(f"{probes} probes, {family}")
    return pd.DataFrame([_row(*key, found) for key, found in rows.items()])


def _row(claim: str, probes: int, seeds: int, found: Mapping[str, float]) -> dict[str, object]:
    mean = float(np.mean(list(found.values())))
    low, high = wilson(mean, seeds * len(found))
    worst = min(found, key=lambda family: found[family])
    row = {"claim": claim, "probes": probes, "seeds a family": seeds, "mean": mean}
    return row | {"95 %": f"{low:.3f} to {high:.3f}", "least": found[worst], "of": worst}


def main(
    size: int = 120,
    numbers: tuple[int, ...] = (4, 10),
    families: tuple[str, ...] = FAMILIES,
    seeds: int = 400,
    js0_seeds: int = 100,
) -> None:
    """Measures and writes the table.

    Args:
        size: Parameters of the three blocks together.
        numbers: Of probes.
        families: From :mod:`benchmarks.families`.
        seeds: Of each family.
        js0_seeds: The first of them, that ``js0`` is computed for: it takes far more time.
    """
    found = table(size, numbers, families, seeds, js0_seeds, lambda text: print(text, flush=True))
    write("intervals", {"Intervals that hold the truth, where 95 % are meant to": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    CLI(main)
