"""What is read off spectra: densities, distribution functions, mixtures; and how they are kept."""

import dataclasses
import os
from unittest import mock

import dense_truth
import numpy as np
import pandas as pd
import pytest
import torch
from problems import problem, truth
from quadratics import decaying, matrix_of, spectra_of

from benchmarks.densities import KNOWN, peaks, spectra
from benchmarks.families import marchenko_pastur, semicircle
from blockspec import (
    Estimate,
    RitzValue,
    Spectra,
    block_diagonal,
    estimate_spectra,
    load_spectra,
    partition,
)
from blockspec.numerics.density import mixture
from blockspec.numerics.flat_tops import drawn, flat_tops, uncertain

NAME = "weights.a"


def normal(x, mean, width):
    return np.exp(-(((x - mean) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))


def one(values, *, num_probes=3, num_steps=15, **settings):
    return spectra_of(
        {"a": matrix_of(values)}, num_probes=num_probes, num_steps=num_steps, **settings
    )[NAME]


def integral(density, grid):
    return float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(grid)))


# Densities.


def test_a_density_of_a_given_width_is_a_sum_of_normal_densities():
    spectrum = one(decaying(60))
    grid = np.linspace(-1, 3, 500)
    expected = sum(
        w * normal(grid, node, 0.05)
        for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True)
        for node, w in zip(nodes, weights, strict=True)
    )
    np.testing.assert_allclose(spectrum.density(grid, 0.05), expected / 3, rtol=1e-9, atol=1e-12)


def test_the_default_density_is_a_sum_of_normal_densities_as_wide_as_what_is_not_resolved():
    spectrum = one(decaying(60))
    grid, linear = np.linspace(-1, 3, 500), 0.01
    places, shares, alone = [], [], []
    for nodes, weights, residuals in zip(
        spectrum.nodes, spectrum.weights, spectrum.residuals, strict=True
    ):
        for i, (x, w, r) in enumerate(zip(nodes, weights, residuals, strict=True)):
            near = np.delete(nodes, i)
            gaps = [abs(near[near < x] - x).min(initial=9), abs(near[near > x] - x).min(initial=9)]
            apart = np.mean([gap for gap in gaps if gap < 9])
            wider = max(1, 100 / (180 * w)) if w > 0 else np.inf  # 60 parameters, 3 probes
            floor = 0.05 * np.sqrt(x * x + linear * linear)
            width = max(floor, min((2 if r > apart else 1) * r, apart * wider))
            places, shares, alone = [*places, x], [*shares, w], [*alone, width]
    places, shares, alone = np.array(places), np.array(shares), np.array(alone)
    expected = 0.0
    for x, w, width in zip(places, shares, alone, strict=True):
        reached = abs(places - x) <= 3 * alone  # by the nodes around
        mean = 1 / np.average(1 / alone[reached], weights=shares[reached])
        expected = expected + w * normal(grid, x, max(width, mean)) / 3
    tops = spectrum.flat_tops(spectrum.widths(linear), linear)
    flat = ((grid[:, None] >= tops[:, 0]) & (grid[:, None] <= tops[:, 1])).any(1)
    assert flat.mean() < 0.5
    np.testing.assert_allclose(
        spectrum.density(grid, linear=linear)[~flat], expected[~flat], rtol=1e-6
    )


@pytest.mark.parametrize("family", KNOWN)
def test_a_density_has_the_peaks_of_the_spectrum_and_no_others(family):
    """Of the benchmark of densities; an outlier is a peak of its own."""
    known = KNOWN[family]
    for found in spectra(known, 400, "4,40", 2):
        assert peaks(found.density(found.grid())) == known.number


def test_many_probes_of_many_steps_draw_no_waves_on_a_semicircle():
    """Two peaks in 2 of 12 runs, where noise was drawn as it came."""
    for found in spectra(KNOWN["semicircle"], 1000, "10,100", 3):
        grid = found.grid()
        widths = found.widths(found.linear)
        rows = zip(found.nodes, found.weights, widths, strict=True)
        assert peaks(np.mean([mixture(*row, grid) for row in rows], axis=0)) > 1
        assert peaks(found.density(grid)) == 1


def test_few_steps_draw_no_waves_on_a_flat_bulk_of_very_many_eigenvalues():
    """There is no noise of probes to test against."""
    for found in spectra(KNOWN["uniform"], 100_000, "1,10", 8):
        assert peaks(found.density(found.grid())) == 1


def test_a_peak_is_flattened_where_it_may_be_noise_and_nowhere_else():
    """Two equal bumps of given noise; all of the mass stays."""
    nodes, weights, widths = np.array([0.0, 1.0]), np.array([0.6, 0.4]), np.full(2, 0.35)
    grid = np.linspace(-2, 3, 4001)
    before = mixture(nodes, weights, widths, grid)
    for deviation, number in ((0.01, 2), (0.2, 1)):
        tops = flat_tops(nodes, weights, widths, np.full(2, deviation**2), 1.0)
        after = drawn(nodes, weights, widths, tops, grid)
        assert peaks(after, 1e-3) == number
        assert integral(after, grid) == pytest.approx(1, abs=1e-4)
        apart = np.abs(after - before) > 1e-9
        assert apart.any() == (number == 1)
    assert len(tops) == 1
    low, high = tops[0]
    assert 0 < low < 1 < high < 1.6
    assert np.ptp(after[(grid > low) & (grid < high)]) == 0
    assert np.abs(np.diff(after)).max() < 0.02 * after.max()  # both ends meet the curve


def test_a_resolved_eigenvalue_is_drawn_however_little_weight_it_has():
    nodes, residuals = np.array([0.0, 1.0]), np.array([0.0, 1e-3])
    assert uncertain(nodes, np.array([0.9, 0.1]), residuals, 0.5, 10).tolist() == [0, 0]
    unsure = uncertain(nodes, np.array([0.9, 0.1]), 100 * residuals, 0.5, 10)
    np.testing.assert_allclose(unsure, [0, 2 * 0.1 / 10 + 0.01**2])


@pytest.mark.parametrize(
    "values", [semicircle(1000), marchenko_pastur(1000), np.linspace(-1, 1, 1000)]
)
def test_total_variation_is_small_where_steps_resolve_the_bulk(values):
    """Eigenvalues are counted in 40 cells."""
    found = one(values, num_probes=4, num_steps=40)
    grid = np.linspace(values.min() - 0.3, values.max() + 0.3, 2000)
    ends = np.linspace(grid[0], grid[-1], 41)
    masses = np.histogram(grid, ends, weights=found.density(grid) * np.gradient(grid))[0]
    truth = np.histogram(values, ends)[0] / len(values)
    assert np.abs(masses - truth).sum() / 2 <= 0.1


def test_the_density_of_a_mixture_is_no_finer_than_those_of_its_parts():
    """Nodes of other blocks that happen to lie between make no gap smaller."""
    matrices = {"a": matrix_of(semicircle(300)), "b": matrix_of(semicircle(300), seed=1)}
    parts = spectra_of(matrices, num_probes=2, num_steps=20)
    for k in range(2):
        own = [np.gradient(s.nodes[k])[1:-1] for s in parts.values()]
        mixed = np.sort(block_diagonal(parts).apart[k])
        assert np.isin(np.round(np.concatenate(own), 12), np.round(mixed, 12)).all()


def test_the_default_scale_does_not_jump_where_half_of_the_eigenvalues_are_zero():
    values = np.where(np.arange(400) % 2, marchenko_pastur(400), 0.0)
    scales = [one(values, num_probes=4, num_steps=30, seed=s).linear for s in range(8)]
    assert max(scales) < 10 * min(scales)


@pytest.mark.parametrize("width", [None, 0.003, 0.1])
@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e6])
def test_densities_integrate_to_one_over_their_own_grid(width, factor):
    spectrum = one(factor * decaying(80))
    width = width and width * factor
    grid = spectrum.grid(20_000)
    if width is not None:
        grid = np.linspace(
            spectrum.smallest.value - 6 * width, spectrum.largest.value + 6 * width, 20_000
        )
    assert integral(spectrum.density(grid, width), grid) == pytest.approx(1, abs=1e-4)


def test_a_grid_in_any_order_gives_the_same_density():
    spectrum, generator = one(decaying(60)), np.random.default_rng(0)
    grid = spectrum.grid(300)
    shuffled = generator.permutation(300)
    np.testing.assert_array_equal(
        spectrum.density(grid[shuffled]), spectrum.density(grid)[shuffled]
    )


def test_densities_of_probes_average_to_the_density():
    spectrum = one(decaying(60))
    grid = spectrum.grid(200)
    probes = spectrum.densities(grid)
    assert probes.shape == (3, 200)
    np.testing.assert_allclose(probes.mean(0), spectrum.density(grid), rtol=1e-12)
    assert probes.std(0).max() > 0


def test_the_default_width_keeps_the_mass_near_zero_that_a_linear_one_hides():
    """45 % of the eigenvalues within 0.05 of zero, outliers at 20."""
    generator = np.random.default_rng(0)
    near, far = generator.uniform(-0.05, 0.05, 180), 0.05 * 60 ** generator.uniform(0, 1, 216)
    spectrum = one(np.concatenate([near, far, [-5, 12, 17, 20]]), num_probes=8, num_steps=60)
    grid = np.linspace(-0.05, 0.05, 2001)
    assert np.diff(spectrum.cdf(np.array([-0.05, 0.05]))).item() == pytest.approx(0.45, abs=0.05)
    assert integral(spectrum.density(grid), grid) == pytest.approx(0.45, abs=0.1)
    assert integral(spectrum.density(grid, width=0.05 * 25), grid) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_densities_of_a_model_are_those_of_its_exact_eigenvalues(name):
    """Smoothed as the paper's figures are, and on the default scale; whole model and a block."""
    it, matrix = problem(name), truth(name)
    blocks = [
        *partition(it.model, "model"),
        max(partition(it.model, "tensor"), key=lambda block: block.numel),
    ]
    spectra = estimate_spectra(it.objective(), blocks, num_probes=6, num_steps=50)
    for block in blocks:
        values = dense_truth.eigenvalues(matrix, dense_truth.positions(it.model, block)).numpy()
        spectrum = spectra[block.name]
        width = 0.03 * spectrum.norm
        grid = np.linspace(values[0] - 4 * width, values[-1] + 4 * width, 3000)
        exact = normal(grid[:, None], values, width).mean(1)
        assert (
            integral(np.abs(spectrum.density(grid, width) - exact), grid) < 0.06
        )  # 2 would be no overlap
        distance = np.abs(spectrum.cdf(grid) - (values[None] <= grid[:, None]).mean(1))
        assert integral(distance, grid) < 0.01 * spectrum.norm
        assert integral(distance, grid) < spectrum.error
        assert spectrum.largest.value == pytest.approx(values[-1], rel=1e-6)
        assert spectrum.smallest.value == pytest.approx(values[0], rel=1e-6)


def test_far_points_cost_nothing():
    """50,000 points for 160 nodes: only those within reach of a node are evaluated."""
    spectrum = one(decaying(200), num_probes=4, num_steps=40)
    points = np.linspace(-1, 3, 50_000)
    evaluated = []

    def counted(x, *args, **kwargs):
        evaluated.append(np.size(x))
        return exp(x, *args, **kwargs)

    exp = np.exp
    with mock.patch.object(np, "exp", counted):
        spectrum.density(points, width=np.sqrt(1e-5))
    assert 0 < sum(evaluated) < 0.05 * spectrum.nodes.size * len(points)


@pytest.mark.parametrize("width", [0, -1.0])
def test_a_width_must_be_positive(width):
    with pytest.raises(ValueError, match=r"width is a positive number.*got"):
        one(decaying(40)).density(np.zeros(3), width)


# Values.


def test_the_distribution_function_steps_at_the_eigenvalues():
    spectrum = one([-1.0, 0.5, 2.0, 2.0], num_steps=4)
    points = np.array([-2, -1 - 1e-9, -1 + 1e-9, 0.4, 0.6, 1.9, 2 + 1e-9, 50])
    np.testing.assert_allclose(spectrum.cdf(points), [0, 0, 0.25, 0.25, 0.5, 0.5, 1, 1])


def test_the_default_scale_turns_at_the_median_size_of_an_eigenvalue():
    assert one([0.1, -0.2, 0.3, -5.0, 7.0], num_steps=5).linear == pytest.approx(0.3)
    assert one([1e-9] * 6 + [1.0], num_steps=7).linear == pytest.approx(
        1e-4
    )  # but not below the resolution
    assert one([0.0] * 6, num_steps=6).linear == 1


def test_extremes_are_over_all_probes_and_signed():
    spectrum = one(-decaying(50))
    assert isinstance(spectrum.largest, RitzValue)
    assert spectrum.largest.value == spectrum.nodes.max()
    assert spectrum.smallest.value == spectrum.nodes.min()
    assert spectrum.norm == -spectrum.smallest.value
    assert float(spectrum.smallest) == spectrum.smallest.value


def test_a_mean_of_any_function_of_the_eigenvalues():
    values = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    spectrum = one(values, num_steps=9)
    assert spectrum.mean(np.log)[:2] == (pytest.approx(values.log().mean().item()), 0)
    assert isinstance(spectrum.mean(np.log), Estimate)


# The mapping.


def small(**settings):
    matrices = {
        name: matrix_of(decaying(size, seed=size))
        for name, size in {"a": 30, "b": 50, "c": 5}.items()
    }
    return spectra_of(matrices, **{"num_probes": 2, "num_steps": 8} | settings)


def test_spectra_are_a_read_only_mapping_in_order():
    spectra = small()
    assert list(spectra) == ["weights.a", "weights.b", "weights.c"]
    assert len(spectra) == 3
    assert "weights.a" in spectra
    assert "nothing" not in spectra
    with pytest.raises(TypeError):
        spectra["weights.a"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectra["weights.a"].nodes = None
    assert "3 blocks" in repr(spectra)


def test_an_unknown_block_is_answered_with_the_nearest_names():
    with pytest.raises(KeyError, match=r"no spectrum of a block 'weight\.a'.*weights\.a"):
        small()["weight.a"]


def test_selection_by_patterns():
    spectra = small()
    assert list(spectra.select("*.[ab]")) == ["weights.a", "weights.b"]
    assert list(spectra.select(exclude=["*b", "*c"])) == ["weights.a"]
    assert list(spectra.select("*", "*a")) == ["weights.b", "weights.c"]


def test_a_summary_has_a_row_a_block():
    spectra = small()
    table = spectra.summary()
    assert list(table.index) == list(spectra)
    assert table.loc["weights.a", "largest"] == spectra["weights.a"].largest.value
    assert table.loc["weights.a", "trace_stderr"] == spectra["weights.a"].trace.stderr
    assert table["exact"].tolist() == [False, False, True]


# Mixtures.


def test_the_block_diagonal_spectrum_is_that_of_the_block_diagonal_matrix():
    matrices = {
        name: matrix_of(decaying(size, seed=size))
        for name, size in {"a": 8, "b": 5, "c": 2}.items()
    }
    mixed = block_diagonal(spectra_of(matrices, num_probes=3, num_steps=10))
    values = np.sort(np.concatenate([torch.linalg.eigvalsh(m).numpy() for m in matrices.values()]))
    assert mixed.block.numel == 15
    assert mixed.exact
    np.testing.assert_allclose(mixed.weights.sum(1), 1)
    points = np.linspace(-1, 3, 77)
    np.testing.assert_allclose(mixed.cdf(points), (values <= points[:, None]).mean(1), atol=1e-12)
    assert mixed.trace[:2] == (pytest.approx(values.sum()), 0)


def test_estimates_in_a_mixture_are_weighted_by_size():
    spectra = small(num_probes=4)
    mixed = block_diagonal(spectra)
    assert mixed.num_probes == 4
    for k in (1, 2, 5):
        expected = sum(s.block.numel * s.moment(k).value for s in spectra.values()) / 85
        assert mixed.moment(k).value == pytest.approx(expected, rel=1e-12)
    variance = sum(s.trace.stderr**2 for s in spectra.values())  # blocks' probes are independent
    assert mixed.trace.stderr == pytest.approx(np.sqrt(variance), rel=0.9)
    assert np.all(np.diff(mixed.nodes) >= 0)
    assert mixed.largest.value == max(s.largest.value for s in spectra.values())


@pytest.mark.slow
def test_standard_errors_of_mixtures_are_as_large_as_the_errors():
    matrices = {
        name: matrix_of(decaying(size, seed=size)) for name, size in {"a": 20, "b": 30}.items()
    }
    exact = sum(m.trace().item() for m in matrices.values())
    traces = [
        block_diagonal(spectra_of(matrices, num_probes=4, num_steps=2, seed=seed)).trace
        for seed in range(100)
    ]
    stated = np.sqrt(np.mean([trace.stderr**2 for trace in traces]))
    assert np.std([trace.value - exact for trace in traces]) == pytest.approx(stated, rel=0.25)


def test_different_numbers_of_probes_are_mixed_without_an_error_bar():
    two, five = small(num_probes=2), small(num_probes=5)
    mixed = block_diagonal({"weights.a": two["weights.a"], "weights.b": five["weights.b"]})
    expected = (30 * two["weights.a"].moment(2).value + 50 * five["weights.b"].moment(2).value) / 80
    assert mixed.moment(2)[:2] == (pytest.approx(expected, rel=1e-12), None)


@pytest.mark.slow
def test_a_mixture_of_a_real_model_has_the_trace_of_its_hessian():
    it, matrix = problem("nanogpt"), truth("nanogpt")
    spectra = estimate_spectra(it.objective(), partition(it.model), num_probes=8, num_steps=4)
    trace = block_diagonal(spectra).trace
    assert abs(trace.value - matrix.trace().item()) < 4 * trace.stderr


def test_mixtures_of_nothing_or_of_overlapping_blocks_are_errors():
    with pytest.raises(ValueError, match="no spectra to mix"):
        block_diagonal({})
    it = problem("nanogpt")
    blocks = [*partition(it.model, include="*c_fc.bias"), *partition(it.model, "model")]
    spectra = estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=2)
    with pytest.raises(ValueError, match=r"'model'\) overlaps.*spectra.parts"):
        block_diagonal(spectra)


# Files.


def assert_same_spectrum(a, b):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert (type(left), left) == (type(right), right), field.name


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_spectra_come_back_from_a_file_as_they_were(tmp_path, reorthogonalize):
    it = problem("gpt2")
    blocks = partition(it.model, include=["*wte*", "*h.0*query*", "*ln_f*"])
    spectra = estimate_spectra(
        it.objective(),
        blocks,
        3,
        9,
        seed=5,
        distribution="gaussian",
        reorthogonalize=reorthogonalize,
    )
    path = tmp_path / "new folder" / "spectra.parquet"
    spectra.save(path)
    loaded = load_spectra(path)
    assert isinstance(loaded, Spectra)
    assert list(loaded) == list(spectra)
    assert {spectrum.block.layer for spectrum in loaded.values()} == {None, 0}
    for name in spectra:
        assert_same_spectrum(loaded[name], spectra[name])
    assert os.listdir(path.parent) == ["spectra.parquet"]


def test_blocks_of_different_numbers_of_steps_and_probes_share_a_file(tmp_path):
    spectra = Spectra(
        [
            small(num_probes=2, num_steps=8)["weights.a"],
            small(num_probes=3, num_steps=5)["weights.b"],
        ]
    )
    spectra.save(tmp_path / "s.parquet")
    for name, spectrum in load_spectra(tmp_path / "s.parquet").items():
        assert_same_spectrum(spectrum, spectra[name])


def test_the_file_is_a_tidy_table(tmp_path):
    spectra = small()
    spectra.save(tmp_path / "s.parquet", step=300)
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert list(table.columns[:9]) == [
        "step",
        "block",
        "kind",
        "layer",
        "numel",
        "probe",
        "index",
        "node",
        "weight",
    ]
    assert set(table["step"]) == {300}
    rows = table[(table["block"] == "weights.a") & (table["probe"] == 1)].sort_values("index")
    np.testing.assert_array_equal(rows["node"], spectra["weights.a"].nodes[1])
    np.testing.assert_array_equal(rows["weight"], spectra["weights.a"].weights[1])


def test_a_step_is_chosen_where_a_file_holds_several(tmp_path):
    path = tmp_path / "s.parquet"
    first, last = small(seed=0), small(seed=1)
    pd.concat([first.to_frame(step=0), last.to_frame(step=100)]).to_parquet(path)
    assert_same_spectrum(load_spectra(path, step=100)["weights.a"], last["weights.a"])
    with pytest.raises(ValueError, match=r"holds the steps \[0, 100\]: choose one"):
        load_spectra(path)
    with pytest.raises(ValueError, match=r"has no step 7; it holds \[0, 100\]"):
        load_spectra(path, step=7)


def test_what_is_no_file_of_spectra_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_spectra(tmp_path / "nothing.parquet")
    damaged = tmp_path / "damaged.parquet"
    small().save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"damaged\.parquet is not a parquet file of spectra"):
        load_spectra(damaged)
    other = tmp_path / "other.parquet"
    pd.DataFrame({"step": [1]}).to_parquet(other)
    with pytest.raises(
        ValueError, match=r"is not a table of spectra: it lacks the columns \['block'"
    ):
        load_spectra(other)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "s.parquet"
    spectra = small()
    spectra.save(path)
    before = path.read_bytes()

    def failing(self, target, **settings):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    with (
        mock.patch.object(pd.DataFrame, "to_parquet", failing),
        pytest.raises(OSError, match="disk full"),
    ):
        small(seed=1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s.parquet"]
