"""Intervals of both errors together, against populations that are drawn from."""

import math

import numpy as np
import pytest
import torch
from populations import SampledOperator, population
from scipy.stats import gamma

import blockspec
from blockspec.spectra.estimates import interval, signs_of
from blockspec.spectra.intervals import of_data, of_probes, total_interval
from blockspec.spectra.spectrum import Estimate, estimate

NUMBERS = {
    "trace": np.sum,
    "root_mean_square": lambda v: math.sqrt((v**2).mean()),
    "largest": np.max,
    "smallest": np.min,
}


def test_intervals_hold_the_numbers_of_the_population():
    """Sizes of units are log-normal. Plain intervals, of two standard errors each, hold the trace
    less often.
    """
    everyone = population(400, 24, spread=0.7, heavy=0.8)
    truth = np.linalg.eigvalsh(everyone.mean(0).numpy())
    held, plain, runs = dict.fromkeys(NUMBERS, 0), 0, 60
    for seed in range(runs):
        chosen = np.random.default_rng(seed).integers(0, 400, 12)
        operator = SampledOperator(everyone[chosen])
        found = blockspec.estimate_spectra(
            None,
            operator.block(),
            curvature=operator,
            num_probes=3,
            num_steps=8,
            seed=seed,
            check=False,
        )["matrix"]
        for name, number in NUMBERS.items():
            low, high = found.interval(name)
            held[name] += low <= number(truth) <= high
        plain += abs(found.trace.value - truth.sum()) <= 1.96 * found.trace.total_stderr
    assert min(held[name] for name in ("trace", "root_mean_square", "largest")) >= 0.88 * runs
    assert plain < held["trace"]


def test_a_single_eigenvalue_that_a_few_probes_have_seen_is_a_gamma_variable():
    """Of K probes of a matrix of rank one, the mean is K times a chi-square variable."""
    operator = blockspec.FunctionOperator(lambda v: v * (v.new_tensor(range(400)) == 7), 400)
    (spectrum,) = blockspec.estimate_spectra(
        None,
        operator.block(),
        curvature=operator,
        num_probes=4,
        num_steps=2,
        distribution="gaussian",
        check=False,
    ).values()
    value = spectrum.moment(1).value
    low, high = of_probes(spectrum, lambda nodes: nodes, 0.95)
    shape = value * 400 * 4 / 2  # the eigenvalue is known: so much of it the probes have seen
    assert low == pytest.approx(value * shape / gamma.ppf(0.975, shape), rel=0.02)
    assert high == pytest.approx(value * shape / gamma.ppf(0.025, shape), rel=0.02)


def test_the_end_on_the_side_of_a_heavy_tail_and_of_the_bias_is_further_away():
    values = np.exp(np.random.default_rng(0).standard_normal(16))
    without = (values.sum() - values) / 15
    right, left = of_data(values.mean(), without, 0.95), of_data(-values.mean(), -without, 0.95)
    assert right.above > 1.2 * right.below
    assert (left.below, left.above) == pytest.approx((right.above, right.below))
    plain = 2.1314 * values.std(ddof=1) / 4
    assert right.below == pytest.approx(plain, rel=1e-4)
    biased = of_data(values.mean() - 1.0, without, 0.95)
    assert biased.below == pytest.approx(plain + 15, rel=1e-4)
    assert biased.above == pytest.approx(right.above)


def test_degrees_of_freedom_are_those_of_the_error_that_dominates():
    few, many = Estimate(1.0, 0.1, 0.0), Estimate(1.0, 0.0, 0.1)
    assert total_interval(few, 4, 64)[1] == pytest.approx(1 + 0.1 * 3.1824, rel=1e-4)
    assert total_interval(many, 4, 64)[1] == pytest.approx(1 + 0.1 * 2.0395, rel=1e-4)  # 32 groups
    both = total_interval(Estimate(1.0, 0.1, 0.1), 4, 16)
    assert 0.1 * math.sqrt(2) * 2.1314 < both[1] - 1 < 0.1 * math.hypot(3.1824, 2.1314)
    assert all(map(math.isnan, total_interval(Estimate(1.0, 0.1), 4, 16)))


def test_estimates_of_the_toolbox_have_intervals_of_both_errors():
    operator = SampledOperator(population(10, 30))
    traces = blockspec.trace(
        None, operator.block(), num_probes=5, curvature=operator, check=False, progress=False
    )
    low, high = traces.total_interval("matrix")
    assert (low, high) == total_interval(traces["matrix"], 5, 10)
    assert low < traces["matrix"].value < high


def test_numbers_that_have_no_interval():
    operator = SampledOperator(population(5, 10))
    spectrum = blockspec.estimate_spectra(None, operator.block(), curvature=operator)["matrix"]
    assert all(map(math.isnan, spectrum.interval("trace")))
    with pytest.raises(ValueError, match=r"number is one of .*'largest'.* got 'median'"):
        spectrum.interval("median")
    with pytest.raises(ValueError, match="confidence is between 0 and 1"):
        spectrum.interval("trace", 95)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda random: random.standard_normal(4), 0.0),  # of one sign in one case of eight
        (lambda random: random.standard_normal(12), 0.0),
        (lambda random: random.chisquare(1, 3), 1.0),
        (lambda random: random.chisquare(1, 10) - 0.02 * random.chisquare(1, 10), 0.98),
    ],
)
def test_intervals_of_samples_of_one_sign_by_chance_or_nearly(draw, truth):
    random, runs = np.random.default_rng(0), 1000
    held = 0
    for _ in range(runs):
        samples = draw(random)
        low, high = interval(estimate(samples), len(samples), signs=signs_of(samples))
        held += low <= truth <= high
    assert 0.93 <= held / runs <= 0.995


def test_what_is_known_exactly_beside_samples_moves_their_interval_and_no_more():
    samples = np.random.default_rng(0).chisquare(1, 12)
    own = interval(estimate(samples), 12, signs=signs_of(samples))
    moved = interval(estimate(5 + samples), 12, signs=signs_of(samples, beside=5.0))
    assert moved == pytest.approx((5 + own[0], 5 + own[1]))
    assert own[0] > 0
    assert own[1] - samples.mean() > 1.2 * (samples.mean() - own[0])


def test_the_interval_of_hutch_plus_plus_is_skewed_as_the_rest_is_that_it_samples():
    """The rest of a positive matrix is positive, and three samples of it may be too small."""
    matrix = torch.diag(1.0 / torch.arange(1.0, 61) ** 2).double()
    operator = blockspec.FunctionOperator(lambda v: matrix @ v, 60)
    found = blockspec.trace(None, operator.block(), "hutch++", num_probes=24, curvature=operator)
    low, high = found.interval("matrix")
    value = found["matrix"].value
    assert low < float(matrix.trace()) < high
    assert high - value > 1.1 * (value - low)
