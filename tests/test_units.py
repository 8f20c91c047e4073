"""What a matrix would be without each unit of data, against the matrices themselves."""

import numpy as np
import pytest
import torch
from populations import SampledOperator, population

from blockspec.numerics.jackknife import MOST_GROUPS, jackknife_error, jackknife_stderr
from blockspec.numerics.lanczos import Lanczos
from blockspec.numerics.units import Layout, Projections, changes, left_out

TERMS = torch.arange(1.0, 13.0, dtype=torch.float64)


def projected(operator, steps, *, seed=0):
    """The tridiagonal matrix of one probe, what it changes by, and its Krylov vectors (m, P)."""
    start = torch.randn(
        operator.matrices.shape[1],
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    run, projections, basis = Lanczos(start, steps), Projections(), []
    while not run.done:
        q = run.vector
        basis.append(q.clone())
        sums = operator.terms[:, None] * (operator.matrices @ q)
        projections.rows.append(torch.stack([run.along(part) for part in sums]))
        run.advance(operator.mean @ q)
    return (
        run.tridiagonal(),
        changes(projections.matrices(), operator.terms.numpy()),
        torch.stack(basis).numpy(),
    )


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_small_matrix_without_a_unit_is_the_projection_of_the_matrix_without_it(steps):
    operator = SampledOperator(population(12, 20), TERMS)
    tridiagonal, changed, basis = projected(operator, steps)
    found = left_out(tridiagonal, changed)
    for unit in range(12):
        small = basis @ operator.without(unit) @ basis.T
        np.testing.assert_allclose(found.nodes[unit], np.linalg.eigvalsh(small), atol=1e-12)
        # the first Krylov vector's spectral measure: its moments
        first = np.eye(steps)[0]
        for k in range(4):
            moment = first @ np.linalg.matrix_power(small, k) @ first
            assert found.weights[unit] @ found.nodes[unit] ** k == pytest.approx(moment, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_moments_up_to_the_steps_change_as_those_of_the_whole_matrix_to_first_order(k):
    def errors(spread):
        operator = SampledOperator(population(12, 40, spread=spread), TERMS)
        tridiagonal, changed, basis = projected(operator, 6)
        found = left_out(tridiagonal, changed)
        start = basis[0]
        power = [start @ np.linalg.matrix_power(operator.without(u), k) @ start for u in range(12)]
        return np.abs((found.weights * found.nodes**k).sum(1) - power).max()

    assert errors(1e-3) <= 2e-2 * errors(1e-2) + 1e-14  # a hundred times less: second order


def test_neighbours_share_a_group_where_there_are_many_units():
    layout = Layout.of([2.0] * 100)
    assert len(layout.terms) == MOST_GROUPS
    assert layout.terms.sum() == 200
    assert set(layout.terms) == {6.0, 8.0}
    groups = layout.groups([2.0] * 100)
    assert sorted(groups) == list(groups)
    np.testing.assert_array_equal(np.bincount(groups, [2.0] * 100), layout.terms)


@pytest.mark.parametrize("count", [5, 32, 50])
def test_units_cut_finer_on_the_way_stay_in_their_groups(count):
    layout = Layout.of([4.0] * count)
    finer = layout.groups([1.0] * 4 * count)
    np.testing.assert_array_equal(finer, np.repeat(layout.groups([4.0] * count), 4))


def test_what_was_projected_is_kept_and_restored():
    operator = SampledOperator(population(9, 15))
    run, kept = Lanczos(torch.ones(15, dtype=torch.float64), 4), Projections()
    while not run.done:
        kept.rows.append(torch.stack([run.along(m @ run.vector) for m in operator.matrices]))
        run.advance(operator.mean @ run.vector)
    again = Projections()
    again.restore(kept.state())
    np.testing.assert_array_equal(again.matrices(), kept.matrices())


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    without = (values.sum() - values) / 19
    stderr = values.std(ddof=1) / np.sqrt(20)
    assert jackknife_stderr(without) == pytest.approx(stderr)
    assert jackknife_error(values.mean(), without) == pytest.approx(stderr)


def test_the_jackknife_knows_the_bias_of_a_square():
    values = np.random.default_rng(0).normal(size=20)
    without = ((values.sum() - values) / 19) ** 2
    bias = values.var(ddof=1) / 20  # of the squared mean, as an estimate of the squared expectation
    error = jackknife_error(values.mean() ** 2, without)
    assert error**2 - jackknife_stderr(without) ** 2 == pytest.approx(bias**2)


def test_seven_units_are_too_few():
    assert jackknife_stderr(np.arange(7.0)) is None
    assert jackknife_error(3.0, np.arange(7.0)) is None
    assert jackknife_stderr(np.arange(8.0)) is not None
