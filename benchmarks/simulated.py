"""Spectra as a block with given eigenvalues would get them, thousands a minute: no model, and no
matrix but a diagonal one.

The idea. Gaussian probes look the same in every basis, so the matrix may be diagonal: a product is
a multiplication by the eigenvalues, and n equal ones are one entry whose weight is a chi-square
variable with n degrees of freedom. With fixed numbers of steps not even that is needed: what
Lanczos makes of a probe is the Jacobi matrix of the discrete measure that the probe sees, which the
algorithm of Gragg and Harwood makes for all probes of all seeds at once, an eigenvalue at a time.
The first K probes and the first m steps of them serve a smaller claim. Quadrature, exact weights,
errors and the schedule are blockspec's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.families import grouped
from blockspec.engine.accuracy import Accuracy
from blockspec.engine.results import lanczos_spectrum
from blockspec.engine.task import Probing, Task
from blockspec.model.blocks import Block
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.ranks import Ranks
from blockspec.spectra.spectrum import Spectrum

SETTINGS: dict[str, Any] = {
    "curvature": "hessian",
    "reorthogonalized": True,
    "distribution": "gaussian",
    "seed": 0,
    "dtype": torch.float64,
}
LARGEST = (
    2**16
)  # eigenvalues: of more, blocks are not deflated, and groups of them may stand as one
BROKEN = 1e-11  # of the norm: betas below are rounding, as in Lanczos in float64

Measure = tuple[np.ndarray, np.ndarray]
"""(N,) places and how many eigenvalues each stands for."""


def measure(values: np.ndarray) -> Measure:
    """The eigenvalues (P,) that are simulated; of a very large matrix, in groups."""
    return (values, np.ones(len(values), int)) if len(values) <= LARGEST else grouped(values)


def jacobi(nodes: np.ndarray, weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, B) alphas and betas of B discrete measures with nodes and weights (N, B), the weights
    of sum 1 (Gragg and Harwood 1984, as Gautschi gives it in OPQ, ``lanczos.m``); ``betas[0]`` is
    1. Nodes of weight 0 count as none.
    """
    alphas, squares = nodes[:size].copy(), np.zeros((size, weights.shape[1]))
    squares[0] = weights[0]
    for n in range(1, len(nodes)):
        mass = weights[n].copy()
        gamma, sigma, t = np.ones(mass.shape), np.zeros(mass.shape), np.zeros(mass.shape)
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
    return alphas, np.sqrt(np.maximum(squares, 0))


def fixed(
    measures: Sequence[Measure],
    claims: Sequence[tuple[int, int]],
    randoms: Sequence[np.random.Generator],
) -> Iterator[tuple[int, int, Spectrum]]:
    """(claim, seed, spectrum) for each of the claims (probes, steps), a spectrum for each measure;
    the claims share their probes.
    """
    most = max(probes for probes, _ in claims)
    places, weights = _seen(measures, most, randoms)
    size = min(max(steps for _, steps in claims) + 1, len(places))
    alphas, betas = jacobi(places, weights, size)
    for number, (probes, steps) in enumerate(claims):
        for seed, (nodes, counts) in enumerate(measures):
            block, scale = Block("a", "other", None, int(counts.sum())), np.abs(nodes).max()
            own = range(seed * most, seed * most + probes)
            found = [_tridiagonal(alphas[:, i], betas[:, i], steps, scale) for i in own]
            yield number, seed, lanczos_spectrum(block, found, num_steps=steps, **SETTINGS)


def _seen(
    measures: Sequence[Measure], probes: int, randoms: Sequence[np.random.Generator]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, S * probes) nodes and weights of what each probe sees of each of S measures."""
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for (nodes, counts), random in zip(measures, randoms, strict=True):
        gammas = random.standard_gamma(counts / 2, (probes, len(counts)))
        places, inverse = np.unique(nodes, return_inverse=True)
        merged = np.zeros((len(places), probes))
        np.add.at(merged, inverse, gammas.T)
        drawn.append((places, merged / merged.sum(0)))
    longest = max(len(places) for places, _ in drawn)
    nodes, weights = np.empty((2, longest, probes * len(drawn)))
    for seed, (places, each) in enumerate(drawn):
        own, more = slice(seed * probes, (seed + 1) * probes), longest - len(places)
        nodes[:, own] = np.pad(places, (0, more), mode="edge")[:, None]
        weights[:, own] = np.pad(each, ((0, more), (0, 0)))
    return nodes, weights


def _tridiagonal(alphas: np.ndarray, betas: np.ndarray, steps: int, scale: float) -> Tridiagonal:
    betas = np.append(betas[1:], 0.0)[:steps]
    ended = np.flatnonzero(betas <= BROKEN * scale)
    m = int(ended[0]) + 1 if len(ended) else steps
    return Tridiagonal(alphas[:m].copy(), betas[:m], len(ended) > 0, 0.0, 0.0)


def adaptive(
    places: np.ndarray, counts: np.ndarray, accuracy: Accuracy, random: np.random.Generator
) -> tuple[Spectrum | None, int]:
    """What the schedule does for that measure, and the products that it takes; None: it computes
    all eigenvalues.
    """
    matrix, numel = torch.from_numpy(places), int(counts.sum())
    task = Task(
        Block("a", "other", None, numel),
        torch.float64,
        torch.device("cpu"),
        accuracy,
        Probing(0, "gaussian", True),
    )

    def start(probe: int) -> torch.Tensor:
        signs = random.choice([-1.0, 1.0], len(counts))
        return torch.from_numpy(signs * np.sqrt(2 * random.standard_gamma(counts / 2)))

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
        return None, products + numel
    results = task.results()
    found = lanczos_spectrum(
        task.block,
        results,
        num_steps=max(len(t.alphas) for t in results),
        deflation=task.deflation,
        **SETTINGS,
    )
    return found.with_exact_weights(), products
