"""Exact weights after the fact: less noise where eigenvalues are single, nothing where they may be
pairs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.coverage import outcome
from benchmarks.simulated import fixed, measure
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
    randoms = [np.random.default_rng([3, seed]) for seed in range(seeds)]
    found = fixed([measure(values)] * seeds, [(probes, steps)], randoms)
    return [spectrum for _, _, spectrum in found]


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("probes", "gain"), [(1, 1.2), (4, 1.6)])
def test_single_eigenvalues_lose_their_noise_and_the_error_says_so(probes, gain):
    values = bulk()
    before = drawn(values, probes, 60)
    after = [spectrum.with_exact_weights() for spectrum in before]
    used = np.mean([spectrum.known.any() for spectrum in after])
    assert used > 0.5
    seen = [[outcome(s, measure(values), 0) for s in some] for some in (before, after)]
    distances = [[o.distance for o in some] for some in seen]
    assert rms(distances[0]) > gain * rms(distances[1])
    assert np.mean([o.distance <= o.error for o in seen[1]]) >= 0.93
    assert np.median([o.error for o in seen[1]]) < np.median([o.error for o in seen[0]])
    median = [np.median([o.distance for o in some]) for some in seen]
    assert median[0] > 3 * median[1]  # where the weights were not too large by chance
    traces = [[s.trace.value - values.sum() for s in some] for some in (before, after)]
    assert np.median(np.abs(traces[0])) > 3 * np.median(np.abs(traces[1]))
    squares = [s.moment(2).value * SIZE - (values**2).sum() for s in before]
    named = [norms({"a": s})["squared_norm"].iloc[0] - (values**2).sum() for s in before]
    assert np.median(np.abs(squares)) > 3 * np.median(np.abs(named))


@pytest.mark.parametrize("probes", [1, 2, 4])
@pytest.mark.parametrize("copies", [2, 3])
def test_what_may_be_pairs_is_left_alone(copies, probes):
    """A Krylov space holds one vector of each eigenspace: one weight cannot tell."""
    values = bulk(copies, count=12)
    before = drawn(values, probes, 40)
    after = [spectrum.with_exact_weights() for spectrum in before]
    assert np.mean([spectrum.known.any() for spectrum in after]) <= 0.1
    untouched = [a is b for a, b in zip(after, before, strict=True) if not a.known.any()]
    assert all(untouched)
    seen = [outcome(s, measure(values), 0) for s in after]
    assert np.mean([o.distance <= o.error for o in seen]) >= 0.9


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
    auto = estimate_spectra(
        None, operator.block(), curvature=operator, num_probes=4, num_steps="auto", tolerance=1e-4
    )["matrix"]
    assert auto.known.any()


def test_without_reorthogonalisation_copies_are_not_counted():
    (before,) = drawn(bulk(), 1, 60, seeds=1)
    plain = replace(before, reorthogonalized=False)
    assert plain.with_exact_weights() is plain
