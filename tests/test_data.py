"""Errors of the data: spectra without each unit, against the matrices of the units, and against
populations that the tests make.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_gpt2
from populations import SampledOperator, population
from problems import tokens
from torch.utils._python_dispatch import TorchDispatchMode

import blockspec
import blockspec.spectra.heterogeneity
from blockspec.numerics.measures import wasserstein
from blockspec.spectra.data import Sample

ADAPTIVE = {"num_probes": "auto", "num_steps": "auto", "tolerance": 1e-2}


def spectrum_of(operator, **settings):
    settings = {"num_probes": 3, "num_steps": 12} | settings
    return blockspec.estimate_spectra(None, operator.block(), curvature=operator, **settings)[
        "matrix"
    ]


def jackknife(values):
    return np.sqrt((len(values) - 1) * np.var(values))


def test_the_error_of_the_trace_is_the_jackknife_of_the_probes_products():
    operator = SampledOperator(population(10, 50), torch.arange(1.0, 11, dtype=torch.float64))
    found = spectrum_of(operator)
    probes = [
        blockspec.draw_probe("matrix", 50, seed=0, probe=k, distribution="gaussian").double()
        for k in range(3)
    ]
    values = []
    for unit in range(10):
        matrix = torch.from_numpy(operator.without(unit))
        values.append(50 * np.mean([float(v @ matrix @ v / (v @ v)) for v in probes]))
    bias = 9 * (np.mean(values) - found.trace.value)
    assert found.trace.data_stderr == pytest.approx(np.hypot(jackknife(values), bias), rel=1e-6)
    assert found.trace.total_stderr == pytest.approx(
        np.hypot(found.trace.stderr, found.trace.data_stderr)
    )


@pytest.mark.parametrize("settings", [{"num_steps": 40}, ADAPTIVE | {"tolerance": 1e-6}])
def test_an_exact_block_has_every_eigenvalue_without_each_unit(settings):
    operator = SampledOperator(population(10, 40))
    found = spectrum_of(operator, **settings)
    assert found.exact
    without = [np.linalg.eigvalsh(operator.without(unit)) for unit in range(10)]
    nodes, weights = found.left_out()
    np.testing.assert_allclose(nodes[:, 0, :40], without, atol=1e-7 * found.norm)
    np.testing.assert_allclose(weights[:, 0, :40], 1 / 40, atol=1e-9)
    largest = [values[-1] for values in without]
    bias = 9 * (np.mean(largest) - found.largest.value)
    assert found.largest.data_stderr == pytest.approx(np.hypot(jackknife(largest), bias))


@pytest.mark.parametrize(("tolerance", "low", "high"), [(1e-3, 0.8, 1.25), (1e-5, 0.7, 2.5)])
def test_deflated_and_large_exact_blocks_tell_of_the_data_too(tolerance, low, high):
    """To 1e-3 the first probe's vectors are deflated; to 1e-5 all columns are cheaper in the end,
    and what the first probe has told of the units stands for them.
    """
    operator = SampledOperator(population(12, 300, heavy=0.5))
    found = spectrum_of(operator, **ADAPTIVE | {"tolerance": tolerance})
    assert found.exact == (tolerance == 1e-5)
    assert found.known.any()
    values = [np.linalg.eigvalsh(operator.without(unit)) for unit in range(12)]
    for read, exact in (
        (found.largest, [v[-1] for v in values]),
        (found.trace, [v.sum() for v in values]),
        (found.moment(2), [np.mean(v**2) for v in values]),
    ):
        assert low <= read.data_stderr / jackknife(exact) <= high


def test_units_that_are_all_the_same_leave_no_error():
    same = population(1, 60).expand(9, 60, 60)
    found = spectrum_of(SampledOperator(same))
    assert found.trace.data_stderr == pytest.approx(0, abs=1e-12)
    assert found.largest.data_stderr == pytest.approx(0, abs=1e-12)
    assert found.data_error == pytest.approx(0, abs=1e-12)
    assert found.total_error == pytest.approx(found.error)


def objective(count=10, micro_batch=None, dtype=torch.float32):
    ids = tokens(count, 8)
    return blockspec.Objective(
        tiny_gpt2(dtype=dtype, layers=1),
        [{"input_ids": ids, "labels": ids}],
        blockspec.losses.next_token,
        micro_batch=micro_batch,
    )


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


CHOSEN = "*mlp.c_fc.weight"


def estimated(objective, **settings):
    blocks = blockspec.partition(objective.model, "matrix", include=(CHOSEN, "*c_fc.bias"))
    return blockspec.estimate_spectra(objective, blocks, **{"num_steps": 5} | settings)


def test_nothing_is_spent_where_errors_of_the_data_are_not_wanted_or_cannot_be_known(monkeypatch):
    def operations(**settings):
        with Operations() as counted:
            estimated(objective(), check=False, **settings)
        return counted.count

    operations()  # what is prepared once
    whole = operations(data_errors=False)
    assert operations() <= 1.03 * whole  # its batch is one unit
    monkeypatch.setattr("blockspec.engine.estimate.Sampling", None)  # keeps what units have
    estimated(objective(micro_batch=1), data_errors=False)
    with pytest.raises(TypeError):
        estimated(objective(micro_batch=1))


@pytest.mark.parametrize("settings", [{}, ADAPTIVE | {"tolerance": 0.3}])
def test_numbers_are_the_same_to_the_bit_with_and_without_errors_of_the_data(settings):
    with_errors = estimated(objective(micro_batch=1), **settings)
    without = estimated(objective(micro_batch=1), data_errors=False, **settings)
    for name, found in with_errors.items():
        np.testing.assert_array_equal(found.nodes, without[name].nodes)
        np.testing.assert_array_equal(found.weights, without[name].weights)
        np.testing.assert_array_equal(found.residuals, without[name].residuals)
        assert found.error == without[name].error
        assert found.sample is not None
        assert without[name].sample is None
        assert without[name].trace.data_stderr is None
        assert without[name].data_error is None
        assert without[name].total_error is None
    assert with_errors.cost == without.cost


@pytest.mark.parametrize("preconditioned", [False, True])
def test_an_exact_block_without_a_unit_is_that_of_the_other_batches(preconditioned):
    whole = objective(8, micro_batch=1, dtype=torch.float64)
    settings = {"num_probes": 1, "num_steps": 16}
    if preconditioned:
        optimizer = torch.optim.AdamW(whole.model.parameters())
        whole.model(**next(whole.batches())).loss.backward()
        optimizer.step()
        whole.model.zero_grad()
        settings["precondition"] = blockspec.Preconditioner.from_optimizer(optimizer, whole.model)
    blocks = blockspec.partition(whole.model, "matrix", include="*h.0.ln_2.bias")
    ((_, found),) = blockspec.estimate_spectra(whole, blocks, **settings).items()
    assert found.exact
    batches = list(whole.batches())
    for unit in (0, 5):
        rest = blockspec.Objective(
            whole.model, batches[:unit] + batches[unit + 1 :], blockspec.losses.next_token
        )
        ((_, other),) = blockspec.estimate_spectra(rest, blocks, **settings).items()
        np.testing.assert_allclose(
            found.left_out()[0][unit, 0], other.nodes[0], atol=1e-7 * other.norm
        )


def test_few_units_have_no_error_and_the_result_says_so():
    found = estimated(objective())
    assert all(s.trace.data_stderr is None and s.data_error is None for s in found.values())
    assert "in 1 units, and 8 are needed" in repr(found)
    assert "micro_batch=1" in repr(found)
    assert "errors of the data from 10 units" in repr(estimated(objective(micro_batch=1)))
    lean = estimated(objective(micro_batch=1), reorthogonalize=False)
    assert "not told apart" in repr(lean)


class Stop(Exception):
    pass


@pytest.mark.parametrize("settings", [{"num_probes": 2}, {"num_probes": "auto", "tolerance": 0.3}])
def test_a_resumed_estimate_has_the_same_errors_to_the_bit(tmp_path, settings):
    def stop(done, total):
        if done > 11:
            raise Stop

    whole = estimated(objective(micro_batch=1), **settings)
    saved = settings | {"state": tmp_path, "state_every": 0.0}
    with pytest.raises(Stop):
        estimated(objective(micro_batch=1), progress=stop, **saved)
    assert list(tmp_path.iterdir())
    again = estimated(objective(micro_batch=1), **saved)
    for name, found in whole.items():
        np.testing.assert_array_equal(found.sample.nodes, again[name].sample.nodes)
        np.testing.assert_array_equal(found.sample.weights, again[name].sample.weights)


def test_a_mixture_and_the_heterogeneity_have_errors_of_the_data():
    parts = estimated(objective(micro_batch=1))
    mixture = blockspec.block_diagonal(parts)
    for k in (1, 2):
        mean = [
            sum(s.without_groups()[g].moment(k).value * s.block.numel for s in parts.values())
            for g in range(10)
        ]
        mean = np.array(mean) / mixture.block.numel
        error = np.hypot(jackknife(mean), 9 * (mean.mean() - mixture.moment(k).value))
        assert mixture.moment(k).data_stderr == pytest.approx(error)
    values = [
        blockspec.js_distances({n: s.without_groups()[g] for n, s in parts.items()}).iloc[0, 1]
        for g in range(10)
    ]
    whole = blockspec.js_distances(parts).iloc[0, 1]
    error = np.hypot(jackknife(values), 9 * (np.mean(values) - whole))
    assert blockspec.js0(parts).data_stderr == pytest.approx(error)
    errors = blockspec.spectra.heterogeneity.js_distance_errors(parts)
    assert errors.iloc[0, 1] == pytest.approx(error)
    assert errors.iloc[0, 0] == 0


def test_files_keep_the_errors_to_the_bit(tmp_path):
    both = [estimated(objective(micro_batch=1)), estimated(objective())]  # one without errors
    for step, spectra in enumerate(both):
        spectra.save(tmp_path / f"{step}.parquet", step=step)
    tables = [pd.read_parquet(tmp_path / f"{step}.parquet") for step in (0, 1)]
    pd.concat(tables).to_parquet(tmp_path / "both.parquet")
    for step, spectra in enumerate(both):
        again = blockspec.load_spectra(tmp_path / "both.parquet", step=step)
        assert again.data == spectra.data
        for name, found in spectra.items():
            assert again[name].trace == found.trace
            assert again[name].largest == found.largest
            assert again[name].total_error == found.total_error
        pd.testing.assert_frame_equal(again.summary(), spectra.summary())
    dominant = both[0].summary()["dominant"]
    assert set(dominant) <= {"data", "estimate"}
    assert set(both[1].summary()["dominant"]) == {"unknown"}


def test_an_outlier_that_goes_with_its_unit_moves_no_more_mass_than_it_has():
    """All nodes behind it take the place of the next one, with most of the weight at one of
    them.
    """
    nodes = np.array([[-1, -0.53, -0.26, -0.19, -0.08, 0.001, 0.09, 0.34, 0.61]])
    weights = np.array([[3e-4, 3e-4, 2e-3, 6e-3, 0.05, 0.84, 0.08, 0.02, 1.4e-3]])
    without = np.array([[-0.52, -0.25, -0.18, -0.07, 0.0, 0.01, 0.09, 0.33, 0.61]])
    shares = np.array([[1e-3, 3e-3, 7e-3, 0.05, 0.75, 0.0876, 0.08, 0.02, 1.4e-3]])
    nearly = 1e-4 * np.random.default_rng(0).standard_normal((16, 1, 9))
    changed = nodes + nearly, np.repeat(weights[None], 16, 0)
    changed[0][3], changed[1][3] = without, shares
    sample = Sample.of(nodes, weights, changed)

    moved = wasserstein((nodes[0], weights[0]), (without[0], shares[0]))
    others = float(np.abs(nearly).mean())
    found = sample.distance(nodes, weights)
    assert moved < found < 10 * (moved + others)


@pytest.mark.slow
def test_the_distance_to_the_population_is_within_the_total_error():
    """Of 40 samples of 16 units: binomially, 35 of 40 or more with probability 0.99 where it is
    0.95 in truth.
    """
    everyone = population(600, 60, heavy=0.5)
    truth = np.linalg.eigvalsh(everyone.mean(0).numpy())
    rng = np.random.default_rng(0)
    held = {"distance": 0, "trace": 0, "largest": 0}
    for seed in range(40):
        chosen = everyone[rng.choice(600, 16)]
        found = spectrum_of(SampledOperator(chosen), num_probes=8, seed=seed)
        measure = found.nodes.ravel(), found.weights.ravel() / 8
        distance = wasserstein(measure, (truth, np.full(60, 1 / 60)))
        held["distance"] += distance <= found.total_error
        trace, largest = found.trace, found.largest
        held["trace"] += abs(trace.value - truth.sum()) <= 2.13 * np.hypot(
            trace.data_stderr, trace.stderr
        )
        held["largest"] += abs(largest.value - truth[-1]) <= 2.13 * largest.data_stderr
    assert all(count >= 35 for count in held.values()), held
