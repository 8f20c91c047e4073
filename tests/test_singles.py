"""Exact weights after the fact: less noise where eigenvalues are single, nothing where they may be
pairs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.coverage import outcome
from benchmarks.simulated import measure
from blockspec import FunctionOperator, estimate_spectra, load_spectra
from blockspec.spectra.collection import Spectra
from blockspec.spectra.data import Sample
from blockspec.toolbox.norms import norms

SIZE = 2000


def bulk(copies=1, count=30):
    """A narrow bulk, and outliers 1, 1/2, ... of these many copies."""
    values = 1e-3 * np.linspace(-1, 1, SIZE)
    values[: count * copies] = np.repeat(1 / np.arange(1, count + 1), copies)
    return values


def drawn(values, probes, steps, seeds=40):
    """As the engine does it: with several probes, the first one is followed beside the second."""
    values = torch.from_numpy(values)
    operator = FunctionOperator(lambda v: values * v, len(values))
    settings = {"curvature": operator, "num_probes": probes, "num_steps": steps}
    return [
        estimate_spectra(None, operator.block(), **settings, seed=seed)["matrix"]
        for seed in range(seeds)
    ]


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("probes", "gain", "seeds"), [(1, 2, 24), (2, 3, 12), (4, 3, 6)])
def test_single_eigenvalues_lose_their_noise_and_the_error_says_so(probes, gain, seeds):
    """Distances, traces and norms: on a narrow bulk with outliers."""
    values = bulk()
    before = drawn(values, probes, 60, seeds)
    after = [spectrum.with_exact_weights() for spectrum in before]
    assert np.mean([spectrum.known.any() for spectrum in after]) >= 0.9
    seen = [[outcome(s, measure(values), 0) for s in some] for some in (before, after)]
    distances = [[o.distance for o in some] for some in seen]
    assert rms(distances[0]) > gain * rms(distances[1])
    assert np.mean([o.distance <= o.error for o in seen[1]]) >= 0.9
    assert np.median([o.error for o in seen[1]]) < np.median([o.error for o in seen[0]]) / 3
    traces = [
        [s.trace.value - values.sum() for s in before],
        [s.trace.value - values.sum() for s in after],
    ]
    assert rms(traces[0]) > gain * rms(traces[1])
    squares = [s.moment(2).value * SIZE - (values**2).sum() for s in before]
    named = [norms({"a": s})["squared_norm"].iloc[0] - (values**2).sum() for s in before]
    assert rms(squares) > gain * rms(named)


@pytest.mark.parametrize(("probes", "seeds"), [(1, 24), (2, 8), (4, 4)])
@pytest.mark.parametrize("copies", [2, 3])
def test_repeated_eigenvalues_are_left_alone(copies, probes, seeds):
    """A Krylov space holds one vector of each eigenspace: one weight cannot tell, two probes can,
    but for a few pairs in a hundred that agree by chance.
    """
    before = drawn(bulk(copies, count=12), probes, 40, seeds)
    after = [spectrum.with_exact_weights() for spectrum in before]
    taken = [s.known[0].sum() / 12 for s in after]
    assert np.mean(taken) <= 0.1
    assert all(a is b for a, b in zip(after, before, strict=True) if not a.known.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_probes_find_the_one_pair_among_single_eigenvalues(dtype):
    values = bulk()
    values[30] = 1.0
    matrix = torch.from_numpy(values).to(dtype)
    operator = FunctionOperator(lambda v: matrix * v, SIZE, dtype=dtype)
    for seed in range(6):
        found = estimate_spectra(None, operator.block(), 2, 60, curvature=operator, seed=seed)[
            "matrix"
        ].with_exact_weights()
        known = found.nodes[0, found.known[0]]
        assert len(known) >= 8  # 1/2, 1/3, ...
        assert known.max() < 0.6


def test_weights_and_samples_are_whole():
    (before,) = drawn(bulk(), 3, 60, seeds=1)
    nodes = np.repeat(before.nodes[None], 9, 0) * 1.01
    weights = np.repeat(before.weights[None], 9, 0)
    sampled = replace(
        before, sample=Sample.of(before.nodes, before.weights, (nodes, weights)), units=9
    )
    after = sampled.with_exact_weights()
    assert after.known.any()
    for array in (after.weights, after.left_out()[1]):
        np.testing.assert_allclose(array.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(after.weights[after.known], 1 / SIZE)
    assert (after.known.sum(1) == after.known[0].sum()).all()
    ratio = after.weights[~after.known] / np.maximum(before.weights[~after.known], 1e-300)
    assert np.ptp(ratio[before.weights[~after.known] > 0].round(6)) < 0.1
    moved = [part.trace.value / after.trace.value for part in after.without_groups()]
    np.testing.assert_allclose(moved, 1.01, rtol=1e-6)


def test_a_weight_that_a_probe_has_next_to_nothing_of_adds_no_error_of_the_data():
    """Without a group of data such a weight is many times what it was: scaled up by the same factor
    as in the whole, it would be all of the spectrum.
    """
    (before,) = drawn(bulk(), 1, 60, seeds=1)
    weights = before.weights.copy()
    largest = before.nodes.argmax()
    weights.flat[largest] = 1e-13
    nodes = np.repeat(before.nodes[None], 9, 0) * (1 + 0.01 * np.arange(-4, 5)[:, None, None])
    shares = np.repeat(weights[None], 9, 0)
    shares[3:, :, largest] = 1e-6
    sampled = replace(
        before,
        weights=weights,
        sample=Sample.of(before.nodes, weights, (nodes, shares)),
        units=9,
    )
    after = sampled.with_exact_weights()
    assert after.known.flat[largest]
    moved = 0.01 * np.std(np.arange(9)) * np.sqrt(8)  # the jackknife of nodes that move alike
    assert after.trace.data_stderr == pytest.approx(moved * after.trace.value, rel=0.01)


def test_auto_has_them_and_fixed_numbers_keep_their_moments(tmp_path):
    values = torch.from_numpy(bulk())
    operator = FunctionOperator(lambda v: values * v, SIZE)
    settings = {"curvature": operator, "num_probes": 2, "seed": 1}
    found = estimate_spectra(None, operator.block(), **settings, num_steps=50)
    assert not found["matrix"].known.any()
    later = Spectra([found["matrix"].with_exact_weights()])
    later.save(tmp_path / "s.parquet")
    found.save(tmp_path / "f.parquet")
    loaded = load_spectra(tmp_path / "f.parquet")["matrix"].with_exact_weights()
    np.testing.assert_array_equal(loaded.weights, later["matrix"].weights)
    np.testing.assert_array_equal(
        load_spectra(tmp_path / "s.parquet")["matrix"].known, later["matrix"].known
    )
    settings |= {"num_steps": "auto", "tolerance": 1e-4}
    assert estimate_spectra(None, operator.block(), **settings)["matrix"].known.any()
    settings |= {"num_probes": 1}  # likely is not enough for a promise
    assert not estimate_spectra(None, operator.block(), **settings)["matrix"].known.any()


def test_without_reorthogonalisation_copies_are_not_counted():
    (before,) = drawn(bulk(), 1, 60, seeds=1)
    plain = replace(before, reorthogonalized=False)
    assert plain.with_exact_weights() is plain
