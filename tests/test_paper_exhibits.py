"""The exhibits: numbers against theory, and each command on sizes that take seconds."""

from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from paper import (
    EXHIBITS,
    adahessian_functions,
    figure_5,
    figure_5_mixer,
    figure_8,
    pyhessian_landscapes,
    pyhessian_traces,
)
from paper.block_diagonality import finding, off_blocks, shares, square, tidy
from paper.exhibit import Context, command, find, read_findings, read_tables, reproduce
from training import comparison
from training.comparison import ComparisonSettings
from vision_models import ablation


class Here(Executor):
    """Runs what is submitted at once, in this process."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, /, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_exhibit_says_what_it_takes(name, capsys):
    found = find(name)
    assert found.name == name
    assert set(found.scales) == {"small", "paper"}
    assert set(found.needs) <= set(EXHIBITS)
    with pytest.raises(SystemExit, match="0"):
        command(found, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert found.scales["small"].cost in shown


def problems(case, count=6):
    blocks = figure_8.CASES[case]
    return blocks, figure_8.draw_problems(blocks, count, np.random.default_rng(0))


@pytest.mark.parametrize("case", figure_8.CASES)
def test_the_quadratics_are_block_diagonal_with_the_eigenvalues_of_the_case(case):
    blocks, drawn = problems(case)
    assert blocks.max() / blocks.min() == pytest.approx(5000)
    for matrix in drawn.matrices:
        np.testing.assert_allclose(np.linalg.eigvalsh(matrix), np.sort(blocks.ravel()), rtol=1e-9)
        size = blocks.shape[1]
        for l, eigenvalues in enumerate(blocks):
            place = slice(l * size, (l + 1) * size)
            np.testing.assert_allclose(
                np.linalg.eigvalsh(matrix[place, place]), eigenvalues, rtol=1e-9
            )
        assert np.count_nonzero(matrix) == blocks.size * size


@pytest.mark.parametrize("case", figure_8.CASES)
def test_measured_rates_of_gd_are_within_5_percent_of_theory(case):
    _, drawn = problems(case)
    lr, factor = figure_8.rule(drawn, figure_8.GD)
    np.testing.assert_allclose(lr, 2 / 5001, rtol=1e-9)
    np.testing.assert_allclose(factor, (1 - 2 / 5001) ** 2, rtol=1e-9)
    losses, _ = figure_8.descend(drawn, figure_8.GD, lr, 30_000)
    np.testing.assert_allclose(
        figure_8.measured_rate(losses), -np.log(factor), rtol=figure_8.TOLERANCE
    )


@pytest.mark.parametrize("case", figure_8.CASES)
def test_adam_falls_by_its_bound_in_every_step(case):
    blocks, drawn = problems(case)
    lr, bound = figure_8.adam_bound(drawn, blocks)
    losses, _ = figure_8.descend(drawn, figure_8.ADAM, lr, 300)
    assert (losses[1:] <= losses[:-1] * bound * (1 + 1e-9)).all()
    too_large = 2.5 * figure_8.rule(drawn, figure_8.ADAM)[0]
    losses, _ = figure_8.descend(drawn, figure_8.ADAM, too_large, 60)
    assert (losses[-1] > losses[0]).all()


def test_adam_divides_by_the_first_gradient():
    _, drawn = problems("3: heterogeneous, clusters", count=1)
    losses, norms = figure_8.descend(drawn, figure_8.ADAM, np.array([1e-3]), 2)
    matrix, w = drawn.matrices[0], drawn.starts[0]
    first = matrix @ w
    for loss, norm in zip(losses[:, 0], norms[:, 0], strict=True):
        gradient = matrix @ w
        assert loss == pytest.approx(w @ gradient / 2)
        assert norm == pytest.approx(np.linalg.norm(gradient))
        w = w - 1e-3 * gradient / np.sqrt(
            first**2
        )  # beta1 = 0; beta2 = 1: v stays the first squared gradient


def test_shares_off_the_blocks():
    block = np.array([0, 0, 1, 1, 1])
    matrix = np.diag([1.0, 2, 3, 4, 5])
    assert off_blocks(matrix, block) == 0
    matrix[0, 4] = matrix[4, 0] = 3
    assert off_blocks(matrix, block) == pytest.approx(18 / (55 + 18))
    assert shares(matrix, block)["entries_off_blocks"] == pytest.approx(12 / 25)
    np.testing.assert_array_equal(square(tidy(matrix)), matrix)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([0.1, 0.11, 0.12], "agrees"),
        ([0.6, 0.61, 0.62], "disagrees"),
        ([0.1, 0.2, 0.6], "not comparable"),
    ],
)
def test_a_verdict_on_block_diagonality_heeds_the_error(found, verdict):
    judged = finding("near", pd.DataFrame({"off_blocks": found, "entries_off_blocks": 0.9}))
    assert judged.verdict == verdict
    assert judged.why.startswith("undecided") == (verdict == "not comparable")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("figure_2", {"num_steps": 10, "runs": 1, "stages": (1.0,)}),
        ("figure_8", {"starts": 4, "rate_steps": 40, "steps": 20, "multiples": (0.5, 1.0)}),
        ("adam_mini_blocks", {"steps": 2, "runs": 1, "batch": 1, "kinds": ("query", "embedding")}),
        ("adahessian_functions", {"steps": 20, "seeds": 2, "rates": (0.15, 0.5)}),
        (
            "optimizers_blocks",
            {
                "models": ("vit",),
                "seeds": 2,
                "steps": 4,
                "stages": (1.0,),
                "rates": 1,
                "probes": 2,
                "lanczos": 2,
            },
        ),
    ],
)
def test_an_exhibit_on_small_sizes(name, settings, tmp_path):
    folder = reproduce(find(name), out=tmp_path, settings=settings, device="cpu")
    assert read_findings(folder)
    assert list((folder / "figures").glob("*.png"))
    assert all(len(table) for table in read_tables(folder).values())


@pytest.mark.slow
def test_residual_networks_on_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Here)
    traces = {
        "depths": (8,),
        "variants": ("all", "no batch norm", "no residual"),
        "model": {"channels": 1, "width": 4},
        "training": replace(
            pyhessian_traces.SHORT, num_steps=3, checkpoints=(0.0, 1.0), device="cpu"
        ),
        "seeds": 2,
        "num_probes": 2,
        "count": 8,
        "measuring": replace(pyhessian_traces.FEW_STEPS, count=8, num_steps=3),
    }
    folder = reproduce(pyhessian_traces.EXHIBIT, out=tmp_path, settings=traces, device="cpu")
    tables = read_tables(folder)
    parts = tables["traces"].assign(whole=tables["traces"]["block"] == "model")
    sums = parts.groupby(["depth", "variant", "seed", "whole"])["trace"].sum().unstack()
    np.testing.assert_allclose(sums[True], sums[False], rtol=1e-3, atol=1e-3)
    assert len(read_findings(folder)) == 4
    context = Context(0, tmp_path / "small" / "runs", {"pyhessian_traces": tables}, device="cpu")
    found = pyhessian_landscapes.measure(pyhessian_landscapes.Settings(points=3, count=8), context)
    assert len(found["landscapes"]) == 3 * 2 * 9
    assert (pyhessian_landscapes.rises(found["landscapes"]).index.nlevels) == 3
    assert len(pyhessian_landscapes.judge(found)) == 2
    assert pyhessian_landscapes.draw(found)


def test_the_rise_of_a_landscape_is_from_the_centre_to_the_edge():
    axis = np.array([-1.0, 0.0, 1.0])
    first, second = (values.ravel() for values in np.meshgrid(axis, axis, indexing="ij"))
    plane = pd.DataFrame({"first": first, "second": second, "loss": 5 + first**2 + 2 * second**2})
    rise = pyhessian_landscapes.rises(plane.assign(depth=20, variant="all", seed=0))
    assert rise.loc[20, "all", 0] == pytest.approx((4 * 3 + 2 * 1 + 2 * 2) / 8)


@pytest.mark.slow
def test_perceptrons_on_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_pool", lambda settings: Here())
    settings = figure_5.Settings(
        sizes=(64, 8, 8, 10),
        scales=(1.0, 4.0),
        comparison=ComparisonSettings(
            rates={"adam": (0.01,), "sgd": (0.1,)}, num_steps=5, warmup=1, measure_every=5, clip=0.0
        ),
    )
    tables = figure_5.measure(settings, Context(0, tmp_path, device="cpu"))
    assert tables["perceptrons"].groupby("scale")["js0"].first().is_monotonic_increasing
    assert figure_5.draw(tables)
    assert figure_5.judge(tables)[0].measured.count("c = ") == 2


def test_the_mixer_is_that_of_figure_4_and_table_1(tmp_path):
    names = [f"blocks.{i}" for i in range(3)]
    distances = pd.DataFrame(
        [(a, b, float(a != b)) for a in names for b in names],
        columns=["block", "other", "distance"],
    )
    runs = pd.DataFrame(
        [
            (name, seed, 2.0, loss)
            for seed in (1, 2)
            for name, loss in (("adam", 0.1), ("sgd", 0.3))
        ],
        columns=["optimizer", "seed", "first", "held_out"],
    )
    curves = runs.rename(columns={"held_out": "held_out_loss"}).assign(step=1)
    other = runs.assign(model="ViT", held_out=9.0)
    needed = {
        "figure_4": {
            "distances": distances.assign(model="mixer", definition=figure_5_mixer.RESOLVED, seed=0)
        },
        "table_1": {
            "runs": pd.concat([other, runs.assign(model="mixer")]),
            "curves": curves.assign(model="mixer"),
        },
    }
    tables = figure_5_mixer.measure(figure_5_mixer.Settings(), Context(0, tmp_path, needed))
    assert len(figure_5_mixer.draw(tables)) == 2
    (found,) = figure_5_mixer.judge(tables)
    assert found.verdict == "agrees"
    assert found.measured.startswith(
        "share of Adam's decrease of the held-out loss that SGD does not reach: 0.1053"
    )


def test_the_edge_of_the_grid_is_said():
    table = pd.DataFrame(
        {"scale": [1.0, 8.0], "optimizer": ["adam", "sgd"], "at_edge_of_grid": [False, True]}
    )
    assert figure_5._edges(table) == "; best rate at the edge of the grid: sgd at c = 8"
    assert figure_5._edges(table[:1]) == ""


def test_ratios_of_final_losses():
    table = pd.DataFrame(
        {
            "scale": [1.0, 1.0],
            "optimizer": ["adam", "sgd"],
            "mean": [0.1, 1.0],
            "std": [0.01, 0.2],
            "count": [4, 4],
        }
    )
    found = figure_5.log_ratios(table).loc[1.0]
    assert found["ratio"] == pytest.approx(1)
    assert found["stderr"] == pytest.approx(np.hypot(0.05, 0.1) / np.log(10))


def test_adahessian_needs_one_step_on_a_bowl():
    table = adahessian_functions.path(
        adahessian_functions.BOWL, betas=(0.0, 0.0), lr=1.0, seed=3, steps=1
    )
    assert table["value"].tolist() == [9.0, 0.0]
