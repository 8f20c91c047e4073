"""What stages are called, where their training steps are not known: in tables, figures, print."""

from unittest import mock

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_cli import invoke, run_arguments
from test_run import checkpoint

from blockspec.figures import plots
from blockspec.figures.stages import stage_title, step_axis
from blockspec.runs import report
from blockspec.runs.loading import load_run
from blockspec.runs.page.answer import sentences
from blockspec.runs.page.numbers import as_json
from blockspec.spectra.stages import shortened, stage_labels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two checkpoints each whose names tell no step, and one with a step."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        given = [checkpoint(folder / name / f"{part}/model.pt", i) for i, part in enumerate("ab")]
        paths = [argument for path in given for argument in ("--checkpoints", path)]
        assert invoke(*run_arguments(folder / f"of_{name}"), *paths).code == 0
    known = checkpoint(folder / "step_7.pt", 3)
    assert invoke(*run_arguments(folder / "known"), "--checkpoints", known).code == 0
    return folder


def drawn_by(function, *arguments):
    figures = {}

    def keep(figure, folder, name):
        figures[name] = figure
        return folder / name

    with mock.patch.object(plots, "save", keep):
        function(*arguments)
    return figures


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text)]


def test_tables_carry_the_label(runs):
    given = [f"{runs}/one/{part}/model.pt" for part in "ab"]
    for name in ("spectra.parquet", "heterogeneity.parquet"):
        table = pd.read_parquet(runs / "of_one" / name)
        assert table.groupby("step")["label"].unique().map(list).tolist() == [[g] for g in given]
        known = pd.read_parquet(runs / "known" / name)
        assert set(known["label"]) == {"step 7"}
    assert stage_labels(table) == dict(enumerate(given))
    assert stage_labels(known) == stage_labels(known.drop(columns="label")) == {}


@pytest.mark.slow
def test_figures_call_stages_by_their_label(runs):
    figures = drawn_by(report.draw, runs / "of_one")
    for name, figure in figures.items():
        found = " ".join(texts(figure))
        assert "b/model.pt" in found, name
        assert "step 0" not in found, name
        assert "step 1" not in found, name
        assert "training step" not in found, name
    titles = figures["tails_by_block"].get_suptitle().replace("\n", " ")
    assert titles.startswith("b/model.pt, the last of 2 ")
    ticks = [label.get_text() for label in figures["trace_by_kind"].axes[0].get_xticklabels()]
    assert ticks == ["a/model.pt", "b/model.pt"]


@pytest.mark.slow
def test_print_and_comparison_say_it(runs, tmp_path):
    shown = " ".join(invoke("show", str(runs / "of_one")).out.split())
    assert f"stage 1 ({runs}/one/b/model.pt)" in shown
    assert "a/model.pt" in shown
    folders = (str(runs / "of_one"), str(runs / "of_two"))
    result = invoke("compare", *folders, "--out", str(tmp_path))
    assert result.code == 0
    assert "one/a/model.pt" in result.out
    table = pd.read_parquet(tmp_path / "comparison.parquet")
    assert table["label"].nunique() == 4
    figures = drawn_by(report.compare, [runs / "of_one", runs / "of_two"], tmp_path)
    assert "of_one, a/model.pt" in " ".join(texts(figures["distances"]))
    ticks = [label.get_text() for label in figures["comparison"].axes[0].get_xticklabels()]
    assert ticks == ["a/model.pt", "b/model.pt"]
    refused = invoke("compare", folders[0], str(runs / "known"), "--out", str(tmp_path))
    assert refused.code == 1
    assert "there is no axis for both" in refused.err


def test_the_page_says_it(runs):
    run = load_run(runs / "of_one")
    assert as_json(run, "of_one")["called"] == ["stage a/model.pt", "stage b/model.pt"]
    said = " ".join(sentences(run, None))
    assert "from stage a/model.pt to stage b/model.pt" in said
    assert "at step" not in said


def test_labels_are_shortened_and_stay_apart():
    assert shortened(["r/x/a.pt", "r/x/b.pt"]) == {"r/x/a.pt": "a.pt", "r/x/b.pt": "b.pt"}
    assert list(shortened(["r/a/c.pt", "r/b/c.pt"]).values()) == ["a/c.pt", "b/c.pt"]
    long = [f"{'x' * 20}{i}{'y' * 20}" for i in range(2)]
    assert list(shortened(long).values()) == long
    assert all(len(text) <= 24 for text in shortened(["x" * 50, "y" * 50]).values())
    assert stage_title(0, {0: "a$b"}) == r"a\$b"
    assert stage_title(20_000, {}) == stage_title(20_000, None) == "step 20k"


def test_many_places_show_as_many_labels_as_find_room():
    axes = Figure(figsize=(4, 3)).subplots()
    places = list(range(60))
    step_axis(axes, places, width=3, labels={place: f"model {place}" for place in places})
    assert 5 <= len(axes.get_xticks()) <= 17
