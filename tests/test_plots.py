"""Figures: axes are named, nothing overlaps, and what is drawn is what the tables hold."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures import plots
from blockspec.figures.heatmaps import MEASURES
from blockspec.figures.page import PageSettings, drawn_for
from blockspec.figures.panels import resolved_density
from blockspec.figures.style import KINDS, look, looks_of, short_name, short_names, spread
from blockspec.figures.trends import kinds_over_training
from blockspec.model.architectures import ENDINGS
from blockspec.model.blocks import Block
from blockspec.spectra.collection import Spectra
from blockspec.spectra.heterogeneity import DEFINITIONS
from blockspec.spectra.spectrum import Spectrum

STEPS = (0, 10, 100)


@pytest.fixture(scope="module")
def by_step() -> dict[int, Spectra]:
    """A GPT-2 of two layers; and with its curvature changed, each block by another factor, as at
    later stages.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double()
    batches = [{"input_ids": torch.randint(13, (2, 8))}]
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    blocks = blockspec.partition(model) + blockspec.partition(model, "model")
    first = blockspec.estimate_spectra(objective, blocks, num_probes=3, num_steps=30)
    stages = {
        step: [scaled(s, 0.9 ** (i * n)) for i, s in enumerate(first.values())]
        for n, step in enumerate(STEPS)
    }
    return {step: Spectra(spectra) for step, spectra in stages.items()}


def scaled(spectrum: Spectrum, factor: float) -> Spectrum:
    return replace(spectrum, nodes=factor * spectrum.nodes, residuals=factor * spectrum.residuals)


@pytest.fixture(scope="module")
def table(by_step: dict[int, Spectra]) -> pd.DataFrame:
    return pd.concat(
        [spectra.to_frame(step=step) for step, spectra in by_step.items()], ignore_index=True
    )


@pytest.fixture(scope="module")
def heterogeneity(by_step: dict[int, Spectra]) -> pd.DataFrame:
    """As in a run's heterogeneity.parquet, of a few blocks; the last step was done with one probe:
    its error is unknown.
    """
    rows = []
    for step, spectra in by_step.items():
        parts = spectra.select("*mlp*weight")
        for definition in DEFINITIONS:
            value, error, _ = blockspec.js0(parts, definition)
            pairs = (
                blockspec.js_distances(parts, definition)
                .stack()
                .rename_axis(["block", "other"])
                .rename("distance")
            )
            stderr = None if step == STEPS[-1] else error
            rows.append(
                pairs.reset_index().assign(
                    step=step, definition=definition, js0=value, js0_stderr=stderr
                )
            )
    return pd.concat(rows)


@pytest.fixture(scope="module")
def figures(
    by_step: dict[int, Spectra], table: pd.DataFrame, heterogeneity: pd.DataFrame
) -> dict[str, Figure]:
    last = by_step[STEPS[-1]]
    parts = last.select(exclude="model")
    maps = {
        f"step {step}": blockspec.js_distances(s.select(exclude="model"))
        for step, s in by_step.items()
    }
    few = blockspec.js_distances(last.select("*h.0.mlp*"), "wasserstein")
    layers = deep(layers=12)
    return {
        "tails_by_block": plots.tails_by_block(parts),
        "tails_by_block of 12 layers": plots.tails_by_block(layers, columns=2),
        "tails_by_block of convolutions": plots.tails_by_block(convolutional()),
        "tails_by_block of one block": plots.tails_by_block(last.select("model")),
        "tails_of_full": plots.tails_of_full(by_step),
        "quantiles_by_block": plots.quantiles_by_block(parts),
        "quantiles_by_block of 12 layers": plots.quantiles_by_block(layers),
        "quantiles_by_block of neurons": plots.quantiles_by_block(neurons()),
        "esd_by_block": plots.esd_by_block(parts),
        "esd_by_block of 12 layers": plots.esd_by_block(layers),
        "esd_by_block of convolutions": plots.esd_by_block(convolutional()),
        "esd_by_block of one block": plots.esd_by_block(last.select("model")),
        "esd_stages": plots.esd_stages(by_step),
        "esd_stages normalised": plots.esd_stages(by_step, normalised="tenth"),
        "full_and_block_diagonal": plots.full_and_block_diagonal(last),
        "distance_heatmap": plots.distance_heatmap(maps["step 0"]),
        "distance_heatmap of 4": plots.distance_heatmap(few, "wasserstein"),
        "distance_heatmap of 8 with long numbers": plots.distance_heatmap(
            square(list(layers)[:8]) * 1e-3, "wasserstein"
        ),
        "distance_heatmap of 50": plots.distance_heatmap(square(list(layers)[:50])),
        "distance_heatmap of 194": plots.distance_heatmap(square(list(layers))),
        "distance_heatmaps": plots.distance_heatmaps(maps),
        "distance_heatmaps of 5": plots.distance_heatmaps(
            {f"run {n}": square(list(layers)[: 3 * n]) for n in range(1, 6)}
        ),
        "heterogeneity_over_training": plots.heterogeneity_over_training(heterogeneity),
        "heterogeneity_over_training at many steps": plots.heterogeneity_over_training(
            many_steps()
        ),
        "trace_by_kind_over_training": plots.trace_by_kind_over_training(table),
        "trace_by_kind_over_training of traces": plots.trace_by_kind_over_training(table, "trace"),
        "compare_runs": plots.compare_runs({"a run": table, "another": table[table["step"] == 0]}),
        "compare_runs of a few kinds": plots.compare_runs(
            {"one": convolutional().to_frame(step=0), "two": convolutional().to_frame(step=9)}
        ),
        "edges_by_block": plots.edges_by_block(last),
        "edges_by_block of 12 layers": plots.edges_by_block(layers),
    }


def exact(name: str, kind: str, layer: int | None, eigenvalues: np.ndarray) -> Spectrum:
    """A spectrum of which everything is known."""
    nodes = np.sort(eigenvalues)[None]
    return Spectrum(
        block=Block(name, kind, layer, nodes.size),
        nodes=nodes,
        weights=np.full(nodes.shape, 1 / nodes.size),
        residuals=np.zeros(nodes.shape),
        **dict.fromkeys(("steps", "breakdown", "orthogonality", "steps_error"), np.zeros(1)),
        reorthogonalized=True,
        exact=True,
        curvature="hessian",
        dtype="float64",
        distribution="rademacher",
        seed=0,
    )


def random_eigenvalues(seed: int, size: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 10.0 ** rng.uniform(-4, -1) * np.concatenate([rng.normal(size=size), [30, 80, 200]])


def deep(layers: int) -> Spectra:
    """The blocks of a GPT-2 with biases, by name."""
    inside = {
        "ln_1.weight": "norm", "ln_1.bias": "norm", "attn.c_attn.weight/query": "query", "attn.c_attn.weight/key": "key",
        "attn.c_attn.weight/value": "value", "attn.c_attn.bias/query": "bias", "attn.c_attn.bias/key": "bias",
        "attn.c_attn.bias/value": "bias", "attn.c_proj.weight": "attention_output", "attn.c_proj.bias": "bias",
        "ln_2.weight": "norm", "ln_2.bias": "norm", "mlp.c_fc.weight": "mlp_in", "mlp.c_fc.bias": "bias",
        "mlp.c_proj.weight": "mlp_out", "mlp.c_proj.bias": "bias",
    }  # fmt: skip
    names = [
        ("transformer.wte.weight", "embedding", None),
        ("transformer.wpe.weight", "position", None),
    ]
    names += [
        (f"transformer.h.{i}.{name}", kind, i)
        for i in range(layers)
        for name, kind in inside.items()
    ]
    return Spectra(exact(*block, random_eigenvalues(i)) for i, block in enumerate(names))


def convolutional() -> Spectra:
    names = [("conv1.weight", "conv", None)]
    names += [
        (f"layer{i}.{j}.conv{k}.weight", "conv", 2 * i + j)
        for i in range(1, 5)
        for j in range(2)
        for k in (1, 2)
    ]
    names += [
        (f"layer{i}.{j}.bn1.weight", "norm", 2 * i + j) for i in range(1, 5) for j in range(2)
    ]
    names += [(f"layer{i}.0.downsample.0.weight", "conv", 2 * i) for i in (2, 3, 4)]
    names += [("fc.weight", "head", None), ("fc.bias", "bias", None)]
    return Spectra(exact(*block, random_eigenvalues(i)) for i, block in enumerate(names))


def many_steps() -> pd.DataFrame:
    steps = [0, 1, 95, 100, 105, 1000, 1050, *range(10_000, 100_000, 10_000)]
    return pd.DataFrame(
        {"step": steps, "definition": "jensen-shannon", "js0": 0.3, "js0_stderr": 0.01}
    )


def square(names: list[str]) -> pd.DataFrame:
    values = np.random.default_rng(0).uniform(0, math.log(2), (len(names), len(names)))
    return pd.DataFrame(np.tril(values, -1) + np.tril(values, -1).T, index=names, columns=names)


def neurons() -> Spectra:
    names = [f"h.{i}.mlp.c_fc.weight/neuron_{j}" for i in (0, 1) for j in range(100)]
    return Spectra(
        exact(name, "mlp_in", int(name[2]), random_eigenvalues(i)) for i, name in enumerate(names)
    )


FIGURES = (
    "tails_by_block", "tails_by_block of 12 layers", "tails_by_block of convolutions",
    "tails_by_block of one block", "tails_of_full", "quantiles_by_block",
    "quantiles_by_block of 12 layers", "quantiles_by_block of neurons",
    "esd_by_block", "esd_by_block of 12 "
                    "layers", "esd_by_block of "
                              "convolutions", "esd_by_block of one block", "esd_stages",
    "esd_stages normalised", "full_and_block_diagonal", "distance_heatmap", "distance_heatmap of 4",
    "distance_heatmap of 8 with long "
    "numbers", "distance_heatmap of 50", "distance_heatmap of 194", "distance_heatmaps",
    "distance_heatmaps of "
    "5", "heterogeneity_over_training", "heterogeneity_over_training at many steps",
    "trace_by_kind_over_training", "trace_by_kind_over_training of "
                                   "traces", "compare_runs", "compare_runs of a few kinds",
    "edges_by_block", "edges_by_block of 12 layers",
)  # fmt: skip
HEATMAPS = tuple(name for name in FIGURES if "heatmap" in name)
OTHERS = tuple(name for name in FIGURES if "heatmap" not in name)


# --- every figure ---


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_or_leaves_the_figure(figures: dict[str, Figure], name: str) -> None:
    figure = figures[name]
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent().padded(-0.5) for text in visible_texts(figure)}
    assert len(boxes) > 4
    overlapping = [
        (a.get_text(), b.get_text())
        for a, b in combinations(boxes, 2)
        if boxes[a].overlaps(boxes[b])
    ]
    assert overlapping == []
    page = figure.bbox
    outside = [
        t.get_text()
        for t, b in boxes.items()
        if min(b.x0, b.y0) < 0 or b.x1 > page.x1 or b.y1 > page.y1
    ]
    assert outside == []


def visible_texts(figure: Figure) -> list[Text]:
    """Texts that are drawn: a tick beyond the end of its axis has a label that is not."""
    hidden = {
        label
        for axes in figure.findobj(matplotlib.axes.Axes)
        for axis in (axes.xaxis, axes.yaxis)
        for label in unseen(axis)
    }
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


def unseen(axis: Axis) -> set[Text]:
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    drawn = axis._update_ticks() if axis.get_visible() and axis.axes.axison else []
    shown = {id(tick.label1) for tick in drawn if tick.label1.get_visible()}
    return {
        label for tick in ticks for label in (tick.label1, tick.label2) if id(label) not in shown
    }


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_large_enough_to_be_read(figures: dict[str, Figure], name: str) -> None:
    assert min(text.get_fontsize() for text in visible_texts(figures[name])) >= 4.5  # points


@pytest.mark.parametrize("name", OTHERS)
def test_axes_are_named_with_their_units(figures: dict[str, Figure], name: str) -> None:
    texts = {text.get_text() for text in visible_texts(figures[name])}
    units = [text for text in texts if text.endswith((")", "training step", "block"))]
    assert len(units) >= 2, texts


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("distance_heatmap", "(nats; at most ln 2)"),
        ("distance_heatmap of 4", "(loss / parameter²)"),
    ],
)
def test_colour_bar_names_measure_and_unit(
    figures: dict[str, Figure], name: str, unit: str
) -> None:
    assert any(text.get_text().endswith(unit) for text in visible_texts(figures[name]))


def test_matplotlib_is_left_as_it_was(by_step: dict[int, Spectra]) -> None:
    with matplotlib.rc_context({"font.size": 13}):
        before = dict(matplotlib.rcParams)
        plots.esd_stages(by_step)
        with pytest.raises(ValueError, match="normalised is None or 'tenth', got 'first'"):
            plots.esd_stages(by_step, normalised="first")
        assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []


# --- what is drawn is what the tables hold ---


@pytest.mark.parametrize(("columns", "width"), [(1, 3.35), (2, 6.95)])
def test_figures_are_as_wide_as_columns(
    by_step: dict[int, Spectra], columns: int, width: float
) -> None:
    parts = by_step[0].select("*h.0*")
    for draw in (plots.tails_by_block, plots.quantiles_by_block):
        assert draw(parts, columns=columns).get_figwidth() == pytest.approx(width)
    full = plots.tails_of_full(by_step, columns=columns)
    assert full.get_figwidth() == pytest.approx(width)


def test_tails_as_drawn_are_the_counts_of_the_eigenvalues() -> None:
    values = np.array([-3.0, -0.2, -0.1, 0.05, 0.4, 0.5, 7.0])
    negative, positive = plots.tails_by_block(Spectra([exact("a", "query", 0, values)])).axes[:2]
    for axes, signed in ((negative, -values), (positive, values)):
        x, count = axes.lines[0].get_data()
        np.testing.assert_allclose(count, (signed[:, None] > x).sum(0))
        assert axes.lines[1].get_xdata() == [signed.max()]  # the marker at the last eigenvalue
    assert negative.get_xlim()[0] > negative.get_xlim()[1]  # as on the line of numbers
    labels = [label.get_text() for label in negative.get_xticklabels()]
    assert all(text.startswith("$-10^") for text in labels)


def test_a_positive_matrix_has_no_negative_side() -> None:
    spectra = Spectra([exact("a", "query", 0, np.array([-1e-9, 0.1, 1.0]))])
    axes = [place for place in plots.tails_by_block(spectra).axes if place.lines]
    assert len(axes) == 1


def test_heads_are_curves_of_their_own() -> None:
    names = [f"h.0.attn.c_attn.weight/query/head_{i}" for i in range(4)]
    heads = Spectra(exact(n, "query", 0, random_eigenvalues(i)) for i, n in enumerate(names))
    axes = plots.tails_by_block(heads).axes[1]
    assert len([line for line in axes.lines if len(line.get_xdata()) > 1]) == 4
    title = plots.tails_by_block(neurons()).get_suptitle().replace("\n", " ")
    assert "at most 12 pieces of a matrix" in title


def test_heads_have_densities_of_their_own() -> None:
    names = [f"h.0.attn.c_attn.weight/query/head_{i}" for i in range(4)]
    heads = Spectra(exact(n, "query", 0, random_eigenvalues(i)) for i, n in enumerate(names))
    others = {
        kind: exact(kind, kind, 0, random_eigenvalues(i)) for i, kind in enumerate(("key", "value"))
    }
    first, *_ = plots.esd_by_block({**heads, **others}).axes
    assert first.get_title() == "query (4 blocks)"
    assert len(first.lines) == 4


NARROW = ("esd_by_block", "edges_by_block", "esd_stages", "full_and_block_diagonal")
NARROW += ("distances", "heterogeneity", "trace_by_kind", "tails_by_block", "quantiles_by_block")


@pytest.fixture(scope="module")
def narrow(
    by_step: dict[int, Spectra], table: pd.DataFrame, heterogeneity: pd.DataFrame
) -> dict[str, Figure]:
    """As blockspec plot --columns 1 draws them."""
    last = by_step[STEPS[-1]]
    maps = {f"step {n}": blockspec.js_distances(s.select("*h.0*")) for n, s in by_step.items()}
    with drawn_for(PageSettings(columns=1, font_size=7)):
        return {
            "esd_by_block": plots.esd_by_block(last.parts),
            "edges_by_block": plots.edges_by_block(last.parts),
            "esd_stages": plots.esd_stages(by_step),
            "full_and_block_diagonal": plots.full_and_block_diagonal(last),
            "distances": plots.distance_heatmaps(maps),
            "heterogeneity": plots.heterogeneity_over_training(
                heterogeneity[heterogeneity["definition"] == "jensen-shannon"]
            ),
            "trace_by_kind": plots.trace_by_kind_over_training(table),
            "tails_by_block": plots.tails_by_block(last.parts),
            "quantiles_by_block": plots.quantiles_by_block(last.parts),
        }


@pytest.mark.parametrize("name", NARROW)
def test_figures_of_one_column(narrow: dict[str, Figure], name: str) -> None:
    figure = narrow[name]
    assert figure.get_figwidth() == pytest.approx(3.35)
    test_no_text_overlaps_or_leaves_the_figure(narrow, name)
    test_text_is_large_enough_to_be_read(narrow, name)
    assert max(text.get_fontsize() for text in visible_texts(figure)) == pytest.approx(7)


@pytest.mark.parametrize(("axis", "scale"), [("linear", "linear"), ("log", "log")])
def test_the_axis_of_densities(by_step: dict[int, Spectra], axis: str, scale: str) -> None:
    with drawn_for(PageSettings(axis=axis)):
        figure = plots.esd_stages(by_step)
    assert {place.get_xscale() for place in figure.axes} == {scale}
    assert (figure.axes[0].get_xlim()[0] > 0) == (axis == "log")
    assert plots.esd_stages(by_step).axes[0].get_xscale() == "asinh"  # settings end with the block


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": 3}, "columns is 1 or 2, or left out, got 3"),
        ({"font_size": 40}, "between 5 and 14 points, got 40"),
    ],
)
def test_pages_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageSettings(**settings)


def test_text_in_a_pdf_is_text(narrow: dict[str, Figure], tmp_path: Path) -> None:
    pdf = plots.save(narrow["heterogeneity"], tmp_path, "h").with_suffix(".pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType
    assert b"/Type3" not in pdf


def test_quantiles_as_drawn() -> None:
    values = np.arange(1.0, 101.0)
    spectra = Spectra([exact("a", "query", 0, values), exact("b", "key", 0, -2 * values)])
    drawn = plots.quantiles_by_block(spectra).axes[0].collections[0].get_array()
    np.testing.assert_allclose(drawn[0], [51, 76, 91, 100, 100], rtol=0.03)
    np.testing.assert_allclose(drawn[1], 2 * drawn[0], rtol=0.03)


def test_what_is_not_known_is_crossed_out(by_step: dict[int, Spectra]) -> None:
    known = exact("a", "query", 0, np.linspace(1, 2, 40))
    unknown = replace(known, residuals=np.full((1, 40), 5.0), exact=False)
    unknown = replace(unknown, known=np.zeros((1, 40), bool), nodes=np.geomspace(1e-9, 1, 40)[None])
    axes = plots.quantiles_by_block({"a": known, "b": unknown}).axes[0]
    crossed = ~np.ma.getmaskarray(axes.collections[1].get_array())
    assert not crossed[0].any()
    assert crossed[1, 0]


def test_density_as_drawn_integrates_to_one(
    figures: dict[str, Figure], by_step: dict[int, Spectra]
) -> None:
    axes = [a for a in figures["esd_stages"].axes if a.lines]
    assert len(axes) == len(STEPS)
    for place in axes:
        grid, density = place.lines[0].get_data()
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.01)


def test_a_node_is_as_wide_as_its_residual() -> None:
    spectrum = replace(
        exact("b", "other", None, np.array([0.5])), residuals=np.array([[0.2]]), exact=False
    )
    density, error = resolved_density(spectrum, np.array([0.5, 0.7]), 1e-3)
    peak = 1 / (0.2 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(density, [peak, peak * math.exp(-0.5)], rtol=1e-12)
    assert not error.any()


def test_a_density_is_drawn_no_finer_than_the_one_beside_it() -> None:
    sharp = exact("b", "other", None, np.array([0.5]))
    coarse = replace(sharp, residuals=np.array([[0.3]]))
    grid = np.linspace(-1, 2, 7)
    expected, _ = resolved_density(coarse, grid, 1e-3)
    np.testing.assert_allclose(
        resolved_density(sharp, grid, 1e-3, like=coarse)[0], expected, rtol=1e-12
    )


def test_a_spectrum_that_is_all_narrower_than_the_axis_shows_is_drawn() -> None:
    spectra = Spectra(
        [
            exact("a", "query", 0, np.linspace(-1, 1, 9)),
            exact("b", "key", 0, 1e-9 * np.linspace(-1, 1, 9)),
        ]
    )
    for axes in plots.esd_by_block(spectra).axes:
        grid, density = axes.lines[0].get_data()
        drawn = np.where(density > density.min(), density, 0)  # the least is off the axis
        assert np.trapezoid(drawn, grid) == pytest.approx(1, abs=0.01)


def test_band_is_the_standard_error_over_probes(by_step: dict[int, Spectra]) -> None:
    spectrum = by_step[0]["model"]
    grid = np.linspace(-0.1, 0.1, 5)
    _, error = resolved_density(spectrum, grid, 1e-3)
    probes = spectrum.densities(grid, linear=1e-3)
    np.testing.assert_allclose(error, pd.DataFrame(probes).sem(), rtol=1e-9)


def test_panels_share_their_axes(figures: dict[str, Figure]) -> None:
    limits = {(a.get_xlim(), a.get_ylim()) for a in figures["esd_by_block"].axes if a.axison}
    assert len(limits) == 1


def test_blocks_of_one_kind_in_one_layer_have_names_of_their_own() -> None:
    names = [
        f"blocks.{layer}.mlp_{what}.fc{i}.weight"
        for layer in (0, 1)
        for what in ("tokens", "channels")
        for i in (1, 2)
    ]
    kinds = ["mlp_in", "mlp_out"] * 4
    spectra = Spectra(
        exact(name, kind, i // 4, random_eigenvalues(i))
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    )
    expected = {name.removesuffix(".weight").replace("blocks.", "blocks") for name in names}
    assert {axes.get_title() for axes in plots.esd_by_block(spectra).axes} - {""} == expected
    assert {
        label.get_text() for label in plots.edges_by_block(spectra).axes[0].get_yticklabels()
    } == expected


def test_chosen_layers_are_named(figures: dict[str, Figure]) -> None:
    assert "(layers 0, 4, 7, 11 of 12)" in figures["esd_by_block of 12 layers"].get_suptitle()
    rows = [text.get_text() for text in visible_texts(figures["esd_by_block of 12 layers"])]
    assert [row for row in rows if row.startswith("layer ")] == [
        "layer 0",
        "layer 4",
        "layer 7",
        "layer 11",
    ]


@pytest.mark.parametrize(
    "name", ["distance_heatmap", "distance_heatmap of 4", "distance_heatmap of 50"]
)
def test_heat_map_holds_the_lower_triangle(
    figures: dict[str, Figure], by_step: dict[int, Spectra], name: str
) -> None:
    distances = {
        "distance_heatmap": blockspec.js_distances(by_step[0].select(exclude="model")),
        "distance_heatmap of 4": blockspec.js_distances(
            by_step[STEPS[-1]].select("*h.0.mlp*"), "wasserstein"
        ),
        "distance_heatmap of 50": square(list(deep(layers=12))[:50]),
    }[name].to_numpy()
    axes = figures[name].axes[0]
    drawn = axes.collections[0].get_array()
    below = np.tril_indices(len(distances), -1)
    np.testing.assert_array_equal(
        np.ma.getmaskarray(drawn), np.triu(np.ones_like(distances), 1) > 0
    )
    np.testing.assert_allclose(drawn[below], distances[below], rtol=1e-12)
    assert f"{distances[below].mean():.3g}" in axes.texts[0].get_text()


def test_heat_maps_share_their_colours() -> None:
    bounded = plots.distance_heatmaps({"a": square(["a", "b", "c"]), "b": square(["a", "b"]) / 2})
    assert {axes.collections[0].norm.vmax for axes in bounded.axes[:2]} == {math.log(2)}
    largest = square(["a", "b", "c"]).to_numpy().max()
    unbounded = plots.distance_heatmaps(
        {"a": square(["a", "b", "c"]), "b": square(["a", "b"]) / 2}, "symmetrised-kl"
    )
    assert {axes.collections[0].norm.vmax for axes in unbounded.axes[:2]} == {largest}


def test_heat_map_says_what_its_colours_leave_out() -> None:
    figure = plots.distance_heatmap(square(["a", "b", "c"]) * 100, "symmetrised-kl", top=3)
    assert figure.axes[0].collections[0].colorbar.extend == "max"
    with pytest.raises(ValueError, match=r"definition is one of .* got 'kl'"):
        plots.distance_heatmap(square(["a", "b"]), "kl")
    assert set(MEASURES) == set(DEFINITIONS)


def test_heterogeneity_as_drawn(figures: dict[str, Figure], heterogeneity: pd.DataFrame) -> None:
    rows = heterogeneity[heterogeneity["definition"] == "jensen-shannon"].drop_duplicates("step")
    axes = figures["heterogeneity_over_training"].axes[0]
    np.testing.assert_allclose(axes.lines[-1].get_xydata(), rows[["step", "js0"]])
    ends = np.array([bar[:, 1] for bar in axes.containers[0].lines[2][0].get_segments()])
    np.testing.assert_allclose(
        ends[:, 1] - ends[:, 0], 2 * rows["js0_stderr"].fillna(0).to_numpy(float), rtol=1e-9
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "100", "10"]


def test_mean_eigenvalue_of_a_kind(table: pd.DataFrame, by_step: dict[int, Spectra]) -> None:
    rows = kinds_over_training(table).set_index(["step", "kind"])
    for kind, pattern in {
        "mlp_in": "*c_fc.weight",
        "full": "model",
        "query": "*c_attn.weight/query",
    }.items():
        parts = by_step[10].select(pattern).values()
        size = sum(part.block.numel for part in parts)
        assert rows.loc[(10, kind), "value"] == pytest.approx(
            sum(part.trace.value for part in parts) / size
        )
        stderr = math.sqrt(sum(part.trace.stderr**2 for part in parts)) / size
        assert rows.loc[(10, kind), "stderr"] == pytest.approx(stderr)


def test_an_unknown_error_is_not_zero(table: pd.DataFrame) -> None:
    rows = kinds_over_training(table[(table["probe"] == 0) & ~table["exact"]], "trace")
    assert rows["stderr"].isna().all()
    assert (kinds_over_training(table[table["exact"]])["stderr"] == 0).all()


def test_edges_as_drawn(figures: dict[str, Figure], by_step: dict[int, Spectra]) -> None:
    summary = by_step[STEPS[-1]].summary()
    axes = figures["edges_by_block"].axes[0]
    points = {
        (line.get_marker(), int(line.get_ydata()[0])): line.get_xdata()[0]
        for line in axes.lines
        if line.get_marker() in "<o>" and len(line.get_xdata()) == 1
    }
    for marker, column in (("<", "smallest"), (">", "largest")):
        np.testing.assert_array_equal(
            [points[marker, row] for row in range(len(summary))], summary[column]
        )
    np.testing.assert_allclose(
        [points["o", row] for row in range(len(summary))], summary["trace"] / summary["numel"]
    )


def test_normalised_by_the_tenth_largest() -> None:
    spectrum = exact("model", "full", None, np.arange(-3.0, 21.0))
    assert plots.tenth_largest(spectrum) == 11
    axes = plots.esd_stages({0: Spectra([spectrum])}, normalised="tenth").axes[0]
    grid, density = axes.lines[0].get_data()
    assert np.trapezoid(grid * density, grid) == pytest.approx(
        spectrum.moment(1).value / 11, rel=0.04
    )


def test_normalised_residuals() -> None:
    coarse = replace(
        exact("model", "full", None, np.arange(-3.0, 21.0)), residuals=np.full((1, 24), 4.0)
    )
    peaks = [
        plots.esd_stages({0: Spectra([coarse])}, normalised=normalised)
        .axes[0]
        .lines[0]
        .get_ydata()
        .max()
        for normalised in (None, "tenth")
    ]
    assert peaks[1] == pytest.approx(11 * peaks[0], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reorthogonalized": False}, "reorthogonalize=True"),
        (
            {"nodes": np.arange(9.0)[None], "weights": np.full((1, 9), 1 / 9)},
            "at least 10 Lanczos steps, got 9",
        ),
        ({"nodes": -np.arange(24.0)[None]}, "is -9, not positive"),
    ],
)
def test_tenth_largest_that_cannot_be_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.tenth_largest(replace(exact("model", "full", None, np.arange(24.0)), **changes))


@pytest.mark.parametrize(
    "draw",
    [
        plots.tails_by_block,
        plots.tails_of_full,
        plots.quantiles_by_block,
        plots.esd_by_block,
        plots.edges_by_block,
        plots.esd_stages,
        plots.distance_heatmaps,
    ],
)
def test_nothing_to_draw(draw: object) -> None:
    with pytest.raises(ValueError, match=r"no .* to draw: the mapping is empty"):
        draw({})


def test_zero_blocks_are_drawn() -> None:
    spectra = Spectra([exact("a", "query", 0, np.zeros(5)), exact("b", "key", 0, np.zeros(5))])
    drawn = (plots.tails_by_block, plots.quantiles_by_block, plots.esd_by_block)
    for draw in (*drawn, plots.edges_by_block):
        figure = draw(spectra)
        figure.draw_without_rendering()


def test_too_many_runs(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"between 1 and 6 runs .* got 7"):
        plots.compare_runs(dict.fromkeys("abcdefg", table))


# --- names and files ---


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("transformer.h.0.attn.c_attn.weight/query", "h0.query"),
        ("transformer.h.11.attn.c_attn.bias/query", "h11.query.bias"),
        ("transformer.h.0.attn.c_attn.weight/query/head_3", "h0.query.head3"),
        ("transformer.h.0.attn.c_proj.weight", "h0.attn_out"),
        ("transformer.h.0.mlp.c_fc.weight/neuron_5", "h0.mlp_in.neuron5"),
        ("transformer.h.0.ln_1.bias", "h0.ln_1.bias"),
        ("transformer.wte.weight", "wte"),
        ("transformer.wte.weight/token_17", "wte.token17"),
        ("model.layers.3.self_attn.q_proj.weight", "layers3.query"),
        ("vit.encoder.layer.2.attention.attention.key.weight", "layer2.key"),
        ("layer1.0.conv1.weight", "layer1.0.conv1"),
        ("layer2.0.downsample.0.weight", "layer2.0.downsample0"),
        ("layer2.0.downsample.1.bias", "layer2.0.downsample1.bias"),
        ("features.5.weight", "features5"),
        ("classifier.0.bias", "classifier0.bias"),
        ("layers.1.blocks.0.attn.qkv.weight/key", "layers1.blocks0.key"),
        ("denseblock1.denselayer2.conv1.weight", "denseblock1.denselayer2.conv1"),
        ("blocks.0.qkv", "blocks0.qkv"),
        ("stage 1", "stage 1"),
        ("weight", "weight"),
        ("lm_head.weight", "lm_head"),
        ("model", "model"),
        ("vit.embeddings.cls_token", "cls_token"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert short_name(name) == short


def test_short_names_stay_different() -> None:
    names = ["a.fc.weight", "b.fc.weight", "a.fc.bias", "c.norm", "c.norm.weight", *deep(layers=3)]
    short = short_names(names)
    assert len(set(short.values())) == len(names)
    assert short["a.fc.weight"] == "a.fc"
    assert short["transformer.h.2.mlp.c_proj.weight"] == "h2.mlp_out"
    mixer = [f"blocks.0.mlp_{part}.fc{i}.weight" for part in ("tokens", "channels") for i in (1, 2)]
    assert short_names(mixer)[mixer[3]] == "blocks0.mlp_channels.fc2"
    resnet = [
        f"resnet.encoder.stages.{i}.layers.0.layer.{j}.convolution.weight"
        for i in (0, 1)
        for j in (0, 1)
    ]
    assert short_names(resnet)[resnet[2]] == "stages1.layers0.layer0.convolution"


def test_every_kind_has_a_look_of_its_own() -> None:
    assert set(KINDS) == {*ENDINGS, "adapter", "norm", "conv", "bias", "other", "full", "layer"}
    assert len({(look.colour, look.marker) for look in KINDS.values()}) == len(KINDS)


def test_a_kind_of_ones_own_is_drawn() -> None:
    """It comes after the known kinds, with a look that does not depend on what else there is."""
    both = looks_of(["my_expert", "bias", "full", "query", "bias"])
    assert list(both) == ["full", "query", "bias", "my_expert"]
    assert both["my_expert"] == looks_of(["my_expert"])["my_expert"] == look("my_expert")
    assert both["my_expert"].label == "my expert"


def test_spread_keeps_both_ends() -> None:
    assert spread(range(12), 4) == [0, 4, 7, 11]
    assert spread([1, 2], 4) == [1, 2]


def test_save_writes_png_and_pdf(figures: dict[str, Figure], tmp_path) -> None:
    path = plots.save(figures["full_and_block_diagonal"], tmp_path / "figures", "full")
    assert sorted(file.name for file in path.parent.iterdir()) == ["full.pdf", "full.png"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_save_leaves_the_old_file_when_it_fails(
    figures: dict[str, Figure], tmp_path, monkeypatch
) -> None:
    (tmp_path / "full.pdf").write_text("old")

    def half(self: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figures["full_and_block_diagonal"], tmp_path, "full")
    assert [file.name for file in tmp_path.iterdir()] == ["full.pdf"]
    assert (tmp_path / "full.pdf").read_text() == "old"
