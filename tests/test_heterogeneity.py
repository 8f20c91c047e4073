"""Distances between spectra against formulas written out, their invariances and their error
bars.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from quadratics import decaying, matrix_of, spectra_of

from blockspec import js0, js_distances
from blockspec.spectra.heterogeneity import DEFINITIONS

VALUES = {"a": decaying(40), "b": 3 * decaying(60, seed=1), "c": decaying(9, seed=2) - 0.5}
INVARIANT = {
    "jensen-shannon": 0,
    "wasserstein": 1,
}  # the power of the loss's scale that a distance goes with


def made(values=None, *, scale=1.0, num_probes=3, num_steps=12, **settings):
    matrices = {name: matrix_of(v) for name, v in (values or VALUES).items()}
    return spectra_of(matrices, num_probes=num_probes, num_steps=num_steps, scale=scale, **settings)


def normal(x, mean, width):
    return np.exp(-(((x - mean) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))


def merged(spectrum):
    return spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes


def integral(values, grid):
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(grid)))


def jensen_shannon(p, q, linear):
    """In nats, by integration on a grid of its own on the scale asinh(x / linear)."""
    nodes = np.arcsinh(np.concatenate([merged(p)[0], merged(q)[0]]) / linear)
    grid = np.linspace(nodes.min() - 2, nodes.max() + 2, 30_001)
    densities = []
    for spectrum in (p, q):
        density = np.zeros_like(grid)
        for x, w in zip(*merged(spectrum), strict=True):
            density += w * normal(grid, np.arcsinh(x / linear), 0.2)
        densities.append(density + 1e-300)
    mixture = sum(densities) / 2
    return sum(integral(d * np.log(d / mixture), grid) for d in densities) / 2


def symmetrised_kl(p, q, all_nodes, width, points, floor):
    """(KL(p||q) + KL(q||p)) / 2 of densities on an even grid, raised to a floor, normalised."""
    grid = np.linspace(all_nodes.min() - 5 * width, all_nodes.max() + 5 * width, points)
    masses = []
    for spectrum in (p, q):
        density = sum(w * normal(grid, x, width) for x, w in zip(*merged(spectrum), strict=True))
        density = np.maximum(density, floor)
        masses.append(density / density.sum())
    a, b = masses
    return float(np.sum(a * np.log(a / b)) + np.sum(b * np.log(b / a))) / 2


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_a_table_of_distances_is_symmetric_with_zeros_on_its_diagonal(definition):
    table = js_distances(made(), definition)
    assert list(table.index) == list(table.columns) == ["weights.a", "weights.b", "weights.c"]
    values = table.to_numpy()
    np.testing.assert_array_equal(values, values.T)
    np.testing.assert_array_equal(np.diag(values), 0)
    assert (values[np.triu_indices(3, 1)] > 0).all()
    one = made(num_probes=1)  # nothing to correct its bias with
    assert js0(one, definition).value == pytest.approx(
        js_distances(one, definition).to_numpy()[np.triu_indices(3, 1)].mean(), rel=1e-12
    )


@pytest.mark.parametrize("linear", [None, 0.02, 1.0])
def test_jensen_shannon_is_its_formula(linear):
    spectra = made()
    table = js_distances(spectra, linear=linear)
    if linear is None:  # the median over blocks of the root mean square eigenvalue
        linear = float(np.median([math.sqrt(s.moment(2).value) for s in spectra.values()]))
    for i, j in (("a", "b"), ("a", "c"), ("b", "c")):
        p, q = spectra[f"weights.{i}"], spectra[f"weights.{j}"]
        assert table.loc[f"weights.{i}", f"weights.{j}"] == pytest.approx(
            jensen_shannon(p, q, linear), rel=1e-4
        )


@pytest.mark.parametrize(
    ("width", "points", "floor"),
    [(0.1, 1500, 1e-20), (0.02, 3000, 1e-258), (math.sqrt(1e-5), 4000, 1e-10)],
)
def test_symmetrised_kl_is_its_formula(width, points, floor):
    spectra = made()
    table = js_distances(spectra, "symmetrised-kl", width=width, points=points, floor=floor)
    everything = np.concatenate([s.nodes.ravel() for s in spectra.values()])
    for i, j in (("a", "b"), ("a", "c"), ("b", "c")):
        p, q = spectra[f"weights.{i}"], spectra[f"weights.{j}"]
        expected = symmetrised_kl(p, q, everything, width, points, floor)
        assert table.loc[f"weights.{i}", f"weights.{j}"] == pytest.approx(expected, rel=1e-5)


def test_wasserstein_is_the_mean_distance_of_sorted_eigenvalues():
    first, second = torch.randn(
        2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    table = js_distances(made({"a": first, "b": second}), "wasserstein")
    expected = (first.sort().values - second.sort().values).abs().mean()
    assert table.loc["weights.a", "weights.b"] == pytest.approx(expected.item(), rel=1e-9)


def test_wasserstein_of_estimates_is_the_area_between_distribution_functions():
    spectra = made()
    p, q = spectra["weights.a"], spectra["weights.b"]
    points = np.sort(np.concatenate([p.nodes.ravel(), q.nodes.ravel()]))
    expected = np.abs(p.cdf(points[:-1]) - q.cdf(points[:-1])) @ np.diff(points)
    assert js_distances(spectra, "wasserstein").loc["weights.a", "weights.b"] == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e7])
@pytest.mark.parametrize("definition", INVARIANT)
def test_what_the_scale_of_the_loss_does(definition, scale):
    one, other = js_distances(made(), definition), js_distances(made(scale=scale), definition)
    np.testing.assert_allclose(other, one * scale ** INVARIANT[definition], rtol=1e-6)


def test_scaling_one_block_alone_is_seen():
    values = {"a": VALUES["b"], "b": VALUES["b"]}
    spectra = made(values, num_probes=6)
    scaled = made(values | {"b": 10 * VALUES["b"]}, num_probes=6)
    assert js0(scaled).value > 5 * js0(spectra).value


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_equal_spectra_are_at_no_distance(definition):
    values = torch.linspace(-1, 3, 9, dtype=torch.float64)
    spectra = spectra_of(
        {"a": matrix_of(values), "b": matrix_of(values, seed=1)}, num_probes=2, num_steps=10
    )
    assert js0(spectra, definition).value == pytest.approx(0, abs=1e-9)
    assert js0(spectra, definition).stderr == 0


def test_jensen_shannon_ends_at_the_logarithm_of_two():
    apart = {"a": torch.linspace(1, 2, 30), "b": -torch.linspace(1, 2, 30)}
    assert js0(made(apart), linear=1e-3).value == pytest.approx(math.log(2), rel=1e-9)
    for seed in range(3):
        table = js_distances(
            made({"a": decaying(30, seed=seed), "b": decaying(50, seed=seed + 10) * 100})
        ).to_numpy()
        assert (table >= 0).all()
        assert (table <= math.log(2)).all()


def test_symmetrised_kl_is_not_bounded_by_it():
    apart = {"a": torch.linspace(1, 2, 30), "b": -torch.linspace(1, 2, 30)}
    assert js0(made(apart), "symmetrised-kl").value > 100


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_order_of_blocks_and_of_probes_does_not_matter(definition):
    spectra = made()
    table = js_distances(spectra, definition)
    reordered = js_distances(dict(reversed(list(spectra.items()))), definition)
    np.testing.assert_allclose(
        reordered.loc[table.index, table.columns], table, rtol=1e-9, atol=1e-12
    )
    turned = {name: kept(s, list(range(s.num_probes))[::-1]) for name, s in spectra.items()}
    np.testing.assert_allclose(js_distances(turned, definition), table, rtol=1e-9, atol=1e-12)


def test_a_block_of_zeros_is_at_a_finite_distance():
    values = {"a": decaying(30), "zero": torch.zeros(30, dtype=torch.float64)}
    for definition in DEFINITIONS:
        assert math.isfinite(js0(made(values), definition).value)
    zeros = {"a": torch.zeros(30, dtype=torch.float64), "b": torch.zeros(20, dtype=torch.float64)}
    for definition in DEFINITIONS:
        assert js0(made(zeros), definition).value == 0


def kept(spectrum, probes):
    """The spectrum with some of its probes."""
    arrays = {
        field.name: getattr(spectrum, field.name)[probes]
        for field in dataclasses.fields(spectrum)
        if isinstance(getattr(spectrum, field.name), np.ndarray)
    }
    return dataclasses.replace(spectrum, **arrays)


def mean_of(spectra, definition):
    return js_distances(spectra, definition).to_numpy()[np.triu_indices(len(spectra), 1)].mean()


@pytest.mark.parametrize("definition", ["jensen-shannon", "resolved", "wasserstein"])
@pytest.mark.parametrize("num_probes", [2, 5])
def test_value_and_standard_error_are_those_of_the_jackknife_over_probes(definition, num_probes):
    """Every block leaves out the same probe, and the scale is that of the rest; a block that was
    done exactly stays whole.
    """
    spectra = made(num_probes=num_probes)
    result = js0(spectra, definition)
    values = []
    for left_out in range(num_probes):
        probes = [k for k in range(num_probes) if k != left_out]
        rest = {name: s if s.exact else kept(s, probes) for name, s in spectra.items()}
        values.append(mean_of(rest, definition))
    variance = (num_probes - 1) / num_probes * np.sum((np.array(values) - np.mean(values)) ** 2)
    assert result.stderr == pytest.approx(math.sqrt(variance), rel=1e-6)
    assert result.stderr > 0
    corrected = num_probes * mean_of(spectra, definition) - (num_probes - 1) * np.mean(values)
    assert result.value == pytest.approx(max(corrected, 0), rel=1e-9)


def test_blocks_with_different_numbers_of_probes_leave_out_all_of_them_in_turn():
    few, many = made(num_probes=2), made(num_probes=5)
    spectra = {"weights.a": few["weights.a"], "weights.b": many["weights.b"]}
    values = [
        mean_of(
            {
                "weights.a": kept(few["weights.a"], [1 - group]),
                "weights.b": kept(many["weights.b"], [k for k in range(5) if k % 2 != group]),
            },
            "jensen-shannon",
        )
        for group in (0, 1)
    ]
    assert js0(spectra).stderr == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-9)


@pytest.mark.slow
def test_intervals_of_js0_hold_the_truth():
    sizes = {"a": decaying(60), "b": 1.3 * decaying(60, seed=1), "c": decaying(50, seed=2)}
    truth = js0(made(sizes, num_probes=1, num_steps=60)).value
    held = []
    for seed in range(60):
        result = js0(made(sizes, num_probes=6, num_steps=30, seed=seed))
        held.append(abs(result.value - truth) <= 2.571 * result.stderr)
    assert np.mean(held) >= 0.88


@pytest.mark.slow
def test_the_standard_error_is_as_large_as_the_spread_over_seeds():
    results = [js0(made(num_probes=4, num_steps=6, seed=seed), "wasserstein") for seed in range(60)]
    stated = math.sqrt(np.mean([result.stderr**2 for result in results]))
    assert np.std([result.value for result in results]) == pytest.approx(stated, rel=0.35)


def test_the_error_of_one_probe_is_unknown_and_of_exact_spectra_zero():
    assert js0(made(num_probes=1)).stderr is None
    small = {"a": decaying(9), "b": decaying(9, seed=1)}
    assert js0(made(small)).stderr == 0


def test_unusual_requests_are_errors():
    spectra = made()
    with pytest.raises(
        ValueError, match=r"definition is one of \('jensen-shannon', .*\), got 'euclid'"
    ):
        js_distances(spectra, "euclid")
    with pytest.raises(ValueError, match="at least 2 blocks, got 1"):
        js0(spectra.select("*a"))
    with pytest.raises(ValueError, match="no spectra to compare"):
        js_distances({})
    for wrong, told in ((next(iter(spectra.values())), "Spectrum"), ({"a": 1.0}, "one with float")):
        with pytest.raises(TypeError, match=f"a mapping .*; got {told}"):
            js_distances(wrong)
