"""Tail counts: the true number of eigenvalues lies in the band, and what is certain is certain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratics import decaying, matrix_of, spectra_of

from blockspec.spectra.collection import block_diagonal
from blockspec.spectra.data import Sample
from blockspec.spectra.resolved import resolved_density
from blockspec.spectra.tails import SIDES, magnitudes_of, quantiles, tail

GRID = np.geomspace(1e-3, 4, 200)
FAMILIES = {
    "outliers and a bulk": decaying(200),
    "a power law": torch.arange(1, 201, dtype=torch.float64) ** -1.5,
    "two clusters": torch.cat([torch.full((150,), -1.0), torch.full((50,), 2.0)]).double(),
    "even": torch.linspace(-1, 3, 200, dtype=torch.float64),
}


def numbers(values, side):
    """(G,) how many there are beyond each point of the grid, counted."""
    return (SIDES[side] * np.asarray(values)[:, None] > GRID).sum(0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("probes", "steps"), [(1, 12), (4, 30)])
def test_the_true_number_lies_in_the_band(name, probes, steps):
    values = FAMILIES[name]
    outside = []
    for seed in range(10):
        spectra = spectra_of(
            {"a": matrix_of(values)}, num_probes=probes, num_steps=steps, seed=seed, check=False
        )
        for side in SIDES:
            found, truth = tail(spectra["weights.a"], GRID, side), numbers(values, side)
            outside.append(((truth < found.low - 1e-6) | (truth > found.high + 1e-6)).mean())
            assert (found.low <= found.count).all()
            assert (found.count <= found.high).all()
            assert (np.diff(found.count) <= 1e-9).all()
    assert np.mean(outside) <= 0.1  # of two clusters all points miss at once: one seed of ten may


def test_of_an_exact_spectrum_everything_is_known():
    values = np.array([-2.0, -0.5, 0.1, 0.1, 3.0])
    spectrum = spectra_of({"a": matrix_of(values)}, num_steps=5)["weights.a"]
    assert spectrum.exact
    for side in SIDES:
        found = tail(spectrum, GRID, side)
        for counts in (found.low, found.count, found.high):
            np.testing.assert_allclose(counts, numbers(spectrum.nodes[0], side), atol=1e-9)


def test_converged_eigenvalues_are_counted_whatever_weight_a_probe_gave_them():
    values = np.concatenate([np.linspace(-0.01, 0.01, 197), [1.0, 2.0, 3.0]])
    spectrum = spectra_of({"a": matrix_of(values)}, num_probes=1, num_steps=20)["weights.a"]
    hardly = replace(spectrum, weights=np.where(spectrum.nodes > 0.5, 1e-9, spectrum.weights))
    found = tail(hardly, np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(found.low, [3, 2, 1, 0])
    np.testing.assert_array_equal(found.count, [3, 2, 1, 0])


def test_copies_of_an_eigenvalue_are_one():
    """Without reorthogonalisation a converged eigenvalue appears several times."""
    spectrum = spectra_of({"a": matrix_of(decaying(200))}, num_probes=1)["weights.a"]
    copies = np.append(spectrum.nodes[0], [3.0, 3.0, 3.0])[None]
    again = replace(
        spectrum,
        nodes=copies,
        weights=np.append(spectrum.weights[0], [1e-9] * 3)[None],
        residuals=np.zeros(copies.shape),
        known=np.zeros(copies.shape, bool),
    )
    assert tail(again, np.array([2.5])).low == 1


def test_a_mixture_has_the_numbers_of_its_parts():
    parts = spectra_of({"a": matrix_of(decaying(150)), "b": matrix_of(decaying(60, seed=1))})
    counts = [tail(part, GRID).count for part in parts.values()]
    found = tail(block_diagonal(parts), GRID)
    np.testing.assert_allclose(found.count, sum(counts), atol=1.0)
    truth = numbers(np.concatenate([decaying(150), decaying(60, seed=1)]), "positive")
    assert ((found.low <= truth + 1e-6) & (truth <= found.high + 1e-6)).mean() > 0.95


def test_quantiles_of_known_eigenvalues():
    values = np.array([-8.0, 1.0, 2.0, 3.0])
    spectrum = spectra_of({"a": matrix_of(values)}, num_steps=4)["weights.a"]
    found = quantiles(spectrum, [0.5, 0.75, 1.0])
    for column in found:
        np.testing.assert_allclose(found[column], [2, 3, 8], rtol=0.02)  # the grid is that fine
    assert (quantiles(zero(), [0.5, 1.0]) == 0).all(axis=None)


def test_quantiles_lie_between_points_of_a_grid_of_many_decades():
    values = np.geomspace(1e-8, 1, 8)
    spectrum = spectra_of({"a": matrix_of(values)}, num_steps=8)["weights.a"]
    found = quantiles(spectrum, (np.arange(8) + 0.5) / 8)
    truth = values[found["low"].to_numpy() > 0]
    found = found[found["low"] > 0]
    assert len(truth) >= 6
    assert (found["low"] <= truth * (1 + 1e-6)).all()
    assert (truth * (1 - 1e-6) <= found["high"]).all()
    assert (found["high"] <= found["low"] * 1.05).all()


def test_the_band_holds_the_population_where_the_error_of_the_data_is_known():
    """Eight groups of data, each of which moves the outlier by a known amount."""
    spectrum = spectra_of({"a": matrix_of([-0.5, 0.1, 3.0])}, num_steps=3)["weights.a"]
    shifts = np.linspace(-0.01, 0.01, 8)[:, None, None] * np.array([0, 0, 1])
    sample = Sample(shifts, np.zeros((8, *spectrum.weights.shape)))
    moved = replace(spectrum, sample=sample)
    stderr = np.sqrt(7 / 8 * (shifts[:, 0, 2] ** 2).sum())
    inside, outside = 3 - 2.3 * stderr, 3 - 2.4 * stderr  # Student's t of 7 degrees: 2.36
    found = tail(moved, np.array([outside, inside, 3 + 2.3 * stderr, 3 + 2.4 * stderr]))
    assert found.of_population
    np.testing.assert_allclose(found.low, [1, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(found.high, [1, 1, 1, 0], atol=1e-9)
    given = tail(moved, np.array([inside]), data=False)
    assert (given.low == given.high) & (not given.of_population)


def test_the_band_and_the_density_know_the_bias_of_the_data():
    """Every group, left out, moves the outlier outwards: more data would move it inwards."""
    spectrum = spectra_of({"a": matrix_of([-0.5, 0.1, 3.0])}, num_steps=3)["weights.a"]
    shifts = np.full((8, 1, 1), 0.01) * np.array([0, 0, 1])
    sample = Sample(shifts, np.zeros((8, *spectrum.weights.shape)))
    biased = replace(spectrum, sample=sample)
    bias = 7 * 0.01
    found = tail(biased, np.array([3 - 2.4 * bias, 3 - 2.3 * bias, 3 + 2.3 * bias]))
    np.testing.assert_allclose(found.low, [1, 0, 0], atol=1e-9)
    grid = np.array([2.5, 3.2])
    width = spectrum.widths(1.0)[0, -1]
    at = (grid - 3) / width, (grid - 3.01) / width
    before, after = (np.exp(-(x**2) / 2) / (3 * width * np.sqrt(2 * np.pi)) for x in at)
    np.testing.assert_allclose(
        resolved_density(biased, grid, 1.0)[1], 7 * np.abs(after - before), rtol=1e-4
    )


def zero():
    return spectra_of({"a": torch.zeros(5, 5)}, num_steps=5)["weights.a"]


def test_what_is_asked_for_must_make_sense():
    spectrum = spectra_of({"a": matrix_of(decaying(50))})["weights.a"]
    with pytest.raises(ValueError, match=r"side is one of .*, got 'left'"):
        tail(spectrum, GRID, "left")
    with pytest.raises(ValueError, match="positive numbers, got -1"):
        tail(spectrum, np.array([-1.0, 2.0]))
    with pytest.raises(ValueError, match=r"shares from 0 to 1, got \[50\]"):
        quantiles(spectrum, [50])


def test_magnitudes_reach_from_what_is_resolved_to_beyond_the_largest():
    spectrum = spectra_of({"a": matrix_of(decaying(200))})["weights.a"]
    grid = magnitudes_of([spectrum, zero()])
    assert grid[0] <= np.abs(spectrum.nodes).min() * 10
    assert grid[-1] > spectrum.norm
    assert len(magnitudes_of([zero()])) == len(grid)
