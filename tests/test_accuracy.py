"""The promised accuracy, on dense matrices whose spectra look like those of blocks."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from blockspec.accuracy import CONFIDENCE, Accuracy, probe_error, probes_needed, stands_still, steps_error, wasserstein
from blockspec.lanczos import Lanczos, tridiagonalize
from blockspec.quadrature import quadrature


def block_like(size, *, seed, kind):
    """A dense symmetric matrix: a bulk near zero and outliers, like a trained block, or a wide bulk, like a new one."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "trained":
        values = values.abs() * 10 ** (-4 * torch.rand(size, generator=generator, dtype=torch.float64)) * 0.05
        values[:8] = torch.rand(8, generator=generator, dtype=torch.float64)
    elif kind == "initial":
        values = values * 0.1
        values[0] = 1.0
    elif kind == "low rank":
        values[size // 10 :] = 0
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * values) @ q.T, values.numpy()


def rademacher(probes, size, *, seed):
    return torch.empty(probes, size, dtype=torch.float64).bernoulli_(0.5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def estimate(matrix, accuracy, *, seed):
    """What the schedule does for one block, without a model."""
    size = len(matrix)
    results, wanted = [], 1
    while len(results) < wanted:
        process = Lanczos(rademacher(1, size, seed=1000 * seed + len(results))[0], accuracy.max_steps)
        while not process.done and not (process.alphas and stands_still(process.tridiagonal(), size, accuracy)):
            process.advance(matrix @ process.vector)
        results.append(process.finish())
        wanted = min(max(wanted, probes_needed(results, size, accuracy)), accuracy.max_probes)
    rows = [quadrature(t) for t in results]
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]) / len(rows), results


@pytest.mark.parametrize("kind", ["trained", "initial", "low rank"])
def test_the_promised_accuracy_holds_in_95_of_100_seeds(kind):
    accuracy = Accuracy(None, None, 4e-2)
    matrix, values = block_like(256, seed=7, kind=kind)
    norm = np.abs(values).max()
    errors = []
    for seed in range(100):
        nodes, weights, _ = estimate(matrix, accuracy, seed=seed)
        errors.append(wasserstein_distance(nodes, values, weights) / norm)
    assert (np.array(errors) <= accuracy.tolerance).mean() >= 0.95
    assert np.max(errors) > accuracy.tolerance / 50  # it does not overdo it


@pytest.mark.parametrize("kind", ["trained", "initial", "low rank"])
def test_the_error_of_the_steps_is_estimated_from_above(kind):
    matrix, _ = block_like(300, seed=3, kind=kind)
    values, vectors = torch.linalg.eigh(matrix)
    held = []
    for seed in range(20):
        start = rademacher(1, 300, seed=seed)
        measure = ((vectors.T @ start[0]) ** 2 / 300).numpy()
        for steps in (6, 10, 20, 40):
            (tridiagonal,) = tridiagonalize(lambda rows: rows @ matrix, start, steps)
            nodes, weights, _ = quadrature(tridiagonal)
            held.append(wasserstein_distance(nodes, values.numpy(), weights, measure) <= 1.05 * steps_error(tridiagonal) + 1e-12)
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize("size", [100, 400])
def test_the_error_of_the_probes_is_bounded_in_the_mean_and_exceeded_rarely(size):
    matrix, values = block_like(size, seed=1, kind="initial")
    _, vectors = torch.linalg.eigh(matrix)
    ascending = np.sort(values)
    bound = probe_error(ascending, np.full(size, 1 / size), size)
    measures = (((rademacher(200, size, seed=5) @ vectors) ** 2) / size).numpy()
    errors = np.array([wasserstein_distance(ascending, ascending, measure, np.full(size, 1 / size)) for measure in measures])
    assert bound / 3 < errors.mean() <= bound
    assert (errors <= CONFIDENCE * bound).mean() >= 0.95


def test_wasserstein_agrees_with_scipy():
    generator = np.random.default_rng(0)
    p, q = (
        (generator.normal(size=7), generator.dirichlet(np.ones(7))),
        (generator.normal(size=5), generator.dirichlet(np.ones(5))),
    )
    assert wasserstein(p, q) == pytest.approx(wasserstein_distance(p[0], q[0], p[1], q[1]), rel=1e-12)


def test_a_probe_in_an_invariant_subspace_has_no_error_of_steps():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    (tridiagonal,) = tridiagonalize(lambda rows: rows @ matrix, torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), 4)
    assert tridiagonal.breakdown
    assert steps_error(tridiagonal) == 0
