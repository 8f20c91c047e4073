"""How often what is said of an error is true, on spectra that nobody chose it for: ``python -m
benchmarks.coverage``.

The matrices are diagonal, since nothing depends on the basis with Gaussian probes; eigenvalues of a
large one are put together in groups, each with the weight that its members have in a random vector
(chi-square). What remains is what every block goes
through: the schedule, Lanczos, quadrature, error bars. With fixed numbers of steps, the tridiagonal
matrices are made from the random measures by an algorithm of their own, for all seeds at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI

from benchmarks.families import FAMILIES, grouped
from benchmarks.record import write
from blockspec.engine.accuracy import Accuracy
from blockspec.engine.results import lanczos_spectrum
from blockspec.engine.task import Probing, Task
from blockspec.model.blocks import Block
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.measures import wasserstein
from blockspec.numerics.ranks import Ranks
from blockspec.spectra.spectrum import Spectrum

FIXED = ((1, 10), (2, 30), (4, 40), (10, 100))  # probes, steps
SETTINGS: dict[str, Any] = {
    "curvature": "hessian",
    "reorthogonalized": True,
    "distribution": "gaussian",
    "seed": 0,
}


@dataclass(frozen=True)
class Outcome:
    """One estimate against the truth; distances relative to the norm.

    ``error`` is what was said, ``distance`` what is true.
    """

    error: float
    distance: float
    products: int


def jacobi(nodes: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, size) alphas and betas of B discrete measures on the same nodes (N,) with weights (B, N),
    which sum to 1: the algorithm of Gragg and Harwood (1984) as Gautschi gives it (OPQ,
    ``lanczos.m``).
    """
    alphas = np.repeat(nodes[None, :size], len(weights), 0).T.copy()  # (size, B)
    squares = np.zeros_like(alphas)
    squares[0] = weights[:, 0]
    for n in range(1, len(nodes)):
        mass = weights[:, n].copy()
        gamma, sigma, t = np.ones(len(weights)), np.zeros(len(weights)), np.zeros(len(weights))
        for k in range(min(n + 1, size)):
            total, before = squares[k] + mass, sigma
            some = total > 0
            safe = np.where(some, total, 1.0)
            kept = gamma * total
            gamma = np.where(some, squares[k] / safe, 1.0)
            sigma = np.where(some, mass / safe, 0.0)
            new = sigma * (alphas[k] - nodes[n]) - gamma * t
            alphas[k] -= new - t
            t = new
            mass = np.where(sigma > 0, t * t / np.where(sigma > 0, sigma, 1.0), before * squares[k])
            squares[k] = kept
    return alphas.T, np.sqrt(np.maximum(squares.T, 0))


def fixed(
    values: np.ndarray, probes: int, steps: int, seeds: int, random: np.random.Generator
) -> Iterator[Spectrum]:
    """Spectra of a diagonal matrix with fixed numbers, one a seed."""
    places, counts = grouped(values)
    weights = 2 * random.standard_gamma(counts / 2, (seeds * probes, len(counts)))
    places, inverse = np.unique(places, return_inverse=True)
    merged = np.zeros((seeds * probes, len(places)))
    np.add.at(merged.T, inverse, weights.T)
    merged /= merged.sum(1, keepdims=True)
    alphas, betas = jacobi(places, merged, min(steps + 1, len(places)))
    block, scale = Block("a", "other", None, len(values)), np.abs(values).max()
    found = [_tridiagonal(a, b, steps, scale) for a, b in zip(alphas, betas, strict=True)]
    for seed in range(seeds):
        some = found[seed * probes : (seed + 1) * probes]
        yield lanczos_spectrum(block, some, num_steps=steps, dtype=torch.float64, **SETTINGS)


def _tridiagonal(alphas: np.ndarray, betas: np.ndarray, steps: int, scale: float) -> Tridiagonal:
    betas = np.append(betas[1:], 0.0)[:steps]
    ended = np.flatnonzero(betas <= 1e-11 * scale)
    m = int(ended[0]) + 1 if len(ended) else steps
    return Tridiagonal(alphas[:m], betas[:m], len(ended) > 0, 0.0, 0.0)


def adaptive(
    values: np.ndarray, accuracy: Accuracy, random: np.random.Generator
) -> tuple[Spectrum | None, int]:
    """What the schedule does for a diagonal matrix, and the products that it takes; None: it
    computes all eigenvalues.
    """
    places, counts = grouped(values) if len(values) > 2**16 else (values, np.ones(len(values), int))
    matrix = torch.from_numpy(places)
    task = Task(
        Block("a", "other", None, len(values)),
        torch.float64,
        torch.device("cpu"),
        accuracy,
        Probing(0, "gaussian", True),
    )

    def start(probe: int) -> torch.Tensor:
        return torch.from_numpy(np.sqrt(random.standard_gamma(counts / 2)))

    task.probe = start  # type: ignore[method-assign]
    products = 0
    while not task.exact and (jobs := list(task.pending())):
        for job in jobs:
            done = False
            while not done:
                Ranks().together([job.recurrence.step(matrix * job.recurrence.vector)])
                products, done = products + 1, task.is_done(job)
            task.collect(job)
    if task.exact:
        return None, products + len(values)
    results = task.results()
    steps = max(len(t.alphas) for t in results)
    found = lanczos_spectrum(
        task.block,
        results,
        num_steps=steps,
        deflation=task.deflation,
        dtype=torch.float64,
        **SETTINGS,
    )
    return found.with_exact_weights(), products


def outcome(spectrum: Spectrum | None, values: np.ndarray, products: int) -> Outcome:
    if spectrum is None:
        return Outcome(0.0, 0.0, products)
    estimated = spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes
    places, counts = np.unique(values, return_counts=True)
    distance = wasserstein(estimated, (places, counts / len(values)))
    norm = np.abs(values).max()
    return Outcome(spectrum.error / norm, distance / norm, products)


def row(outcomes: Sequence[Outcome], tolerance: float | None) -> dict[str, float]:
    error, distance = (np.array([getattr(o, n) for o in outcomes]) for n in ("error", "distance"))
    estimated = distance > 1e-12
    loose = np.median(error[estimated] / distance[estimated]) if estimated.any() else np.nan
    return {
        "within the error": float((distance <= error + 1e-12).mean()),
        "worst": float(np.max(distance / np.maximum(error, 1e-12))),
        "looseness": float(loose),
        "within the tolerance": np.nan
        if tolerance is None
        else float((distance <= tolerance).mean()),
        "products": float(np.median([o.products for o in outcomes])),
    }


def trials(family: str, size: int, claim: str, seeds: int, *, start: int = 0) -> list[Outcome]:
    """Outcomes of one cell; adversarial families have another spectrum each seed."""
    drawn = [
        (FAMILIES[family](size, random), random)
        for random in (np.random.default_rng([seed, size]) for seed in range(start, start + seeds))
    ]
    if claim.startswith("auto"):
        accuracy = Accuracy(None, None, float(claim.split()[1]))
        return [outcome(*_swapped(adaptive(v, accuracy, r), v)) for v, r in drawn]
    probes, steps = map(int, claim.split(","))
    same = all((values == drawn[0][0]).all() for values, _ in drawn)
    found: list[tuple[Spectrum, np.ndarray]] = []
    for values, random in drawn[:1] if same else drawn:
        found += [(s, values) for s in fixed(values, probes, steps, seeds if same else 1, random)]
    return [outcome(s, v, probes * steps) for s, v in found]


def _swapped(
    result: tuple[Spectrum | None, int], values: np.ndarray
) -> tuple[Spectrum | None, np.ndarray, int]:
    return result[0], values, result[1]


def table(
    families: Sequence[str],
    sizes: Sequence[int],
    claims: Sequence[str],
    seeds: int,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """A row for each family, size and claim."""
    rows = []
    for family in families:
        for size in sizes:
            for claim in claims:
                tolerance = float(claim.split()[1]) if claim.startswith("auto") else None
                rows.append(
                    {"family": family, "P": size, "claim": claim}
                    | row(trials(family, size, claim, seeds), tolerance)
                )
                progress(
                    " ".join(
                        f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()
                    )
                )
    return pd.DataFrame(rows)


def main(
    seeds: int = 200,
    sizes: tuple[int, ...] = (100, 1000, 100_000),
    tolerances: tuple[float, ...] = (1e-2, 2e-3, 5e-4),
    families: tuple[str, ...] = tuple(FAMILIES),
) -> None:
    """Measures and writes the tables."""
    claims = [f"{probes},{steps}" for probes, steps in FIXED] + [f"auto {t:g}" for t in tolerances]
    found = table(families, sizes, claims, seeds, progress=lambda text: print(text, flush=True))
    write("coverage", {"All cells": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    CLI(main)
