"""Reproductions of the papers: measured once, drawn from tables, judged."""

import dataclasses
import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from paper import all as everything
from paper import exhibit, reproduction
from paper.exhibit import Exhibit, Finding, Scale, reproduce, with_error


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 3
    values: tuple[float, ...] = (1.0, 2.0)


def toy(calls, **changes):
    """An exhibit that counts how often it is measured."""

    def measure(settings, context):
        calls.append(settings)
        return {"numbers": pd.DataFrame({"x": range(settings.size), "seed": context.seed})}

    def draw(tables):
        figure = Figure()
        figure.subplots().plot(tables["numbers"]["x"])
        return {"line": figure}

    def judge(tables):
        return [Finding("it has a|line", f"{len(tables['numbers'])} points", "agrees", "drawn")]

    scales = {name: Scale(Settings(), "A line.", "nothing") for name in ("small", "paper")}
    given = {"name": "toy", "title": "A toy", "source": "No paper", "shown": ("numbers",)}
    return Exhibit(
        **given | {"measure": measure, "draw": draw, "judge": judge, "scales": scales} | changes
    )


def test_a_second_run_uses_what_is_there(tmp_path):
    calls = []
    folder = reproduce(toy(calls), out=tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "numbers.parquet",
        "record.json",
        "findings.json",
        "figures",
    }
    assert {path.name for path in (folder / "figures").iterdir()} == {"line.png", "line.pdf"}
    (folder / "figures" / "line.png").unlink()
    assert reproduce(toy(calls), out=tmp_path) == folder
    assert (folder / "figures" / "line.png").exists()
    assert calls == [Settings()]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    calls = []
    reproduce(toy(calls), out=tmp_path)
    for changed in ({"settings": {"size": 4}}, {"seed": 1}):
        with pytest.raises(
            ValueError,
            match=r"(size is 3 there, 4 here|seed is 0 there, 1 here).*choose another --out",
        ):
            reproduce(toy(calls), out=tmp_path, **changed)
    assert reproduce(toy(calls), out=tmp_path / "other", settings={"size": 4}).is_dir()
    assert [settings.size for settings in calls] == [3, 4]


def test_an_unfinished_measurement_is_no_result(tmp_path):
    def measure(settings, context):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        reproduce(toy([], measure=measure), out=tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
    calls = []
    reproduce(toy(calls), out=tmp_path)
    assert len(calls) == 1


def test_unknown_settings_and_verdicts_are_named(tmp_path):
    with pytest.raises(ValueError, match="no setting 'siez': there are size, values"):
        reproduce(toy([]), out=tmp_path, settings={"siez": 4})
    with pytest.raises(ValueError, match=r"verdict is one of .* got 'perhaps'"):
        Finding("", "", "perhaps", "")


def test_what_is_needed_comes_first(tmp_path, monkeypatch):
    calls = []
    first = toy(calls, name="first")
    monkeypatch.setattr(exhibit, "find", {"first": first}.__getitem__)

    def measure(settings, context):
        return {"numbers": 2 * context.needed["first"]["numbers"]}

    folder = reproduce(toy([], name="second", needs=("first",), measure=measure), out=tmp_path)
    assert pd.read_parquet(folder / "numbers.parquet")["x"].tolist() == [0, 2, 4]
    assert len(calls) == 1


def test_what_is_needed_is_taken_with_the_settings_that_it_has(tmp_path, monkeypatch):
    first = toy([], name="first")
    monkeypatch.setattr(exhibit, "find", {"first": first}.__getitem__)
    reproduce(first, out=tmp_path, settings={"size": 1})

    def measure(settings, context):
        return dict(context.needed["first"])

    second = toy([], name="second", needs=("first",), measure=measure)
    assert len(pd.read_parquet(reproduce(second, out=tmp_path) / "numbers.parquet")) == 1
    with pytest.raises(ValueError, match=r"first holds other settings \(seed is 0 there, 1 here\)"):
        reproduce(toy([], name="third", needs=("first",), measure=measure), out=tmp_path, seed=1)


def test_the_document_has_figures_findings_and_tables(tmp_path, monkeypatch):
    calls = []
    folder = reproduce(toy(calls), out=tmp_path)
    monkeypatch.setattr(reproduction, "find", {"toy": toy(calls)}.__getitem__)
    path = reproduction.write(folder.parent, ["toy"], tmp_path / "document")
    text = path.read_text()
    assert "![A toy](docs/paper/toy_line.png)" in text
    assert (path.parent / "docs" / "paper" / "toy_line.png").exists()
    assert "- 1 of 1 claims agree with what we measured, and 0 do not; 0 more" in text
    assert "**1 of 1 claims agree:** “it has a|line” agrees. No paper. " in text
    assert "Not measured yet: `figure_1`, " in text
    assert "[Claims, errors and tables](docs/paper/toy.md)" in text
    page = (path.parent / "docs" / "paper" / "toy.md").read_text()
    assert "![A toy](toy_line.png)" in page
    assert "| it has a\\|line | 3 points | agrees | drawn |" in page
    assert "| 2 | 0 |" in page
    assert "`python -m paper.toy`: " in page


def test_the_summary_says_whether_heterogeneity_predicts_the_gap():
    def found(*verdicts):
        return [
            Finding("it predicts", "rank correlation -0.4", verdict, "") for verdict in verdicts
        ]

    lines = list(reproduction.summary("small", {"figure_7": found("disagrees", "disagrees")}))
    assert len(lines) == 3
    assert "0 of 2 claims agree" in lines[0]
    assert "did not predict the gap between Adam and SGD, in any of 2" in lines[1]
    lines = list(reproduction.summary("small", {"figure_7": found("agrees", "disagrees")}))
    assert "predicted the gap between Adam and SGD, in 1 of 2" in lines[1]


def test_the_verdict_is_a_sentence():
    findings = [Finding("a", "", verdict, "") for verdict in ("agrees", "disagrees")]
    findings += [Finding("b", "", "not comparable", ""), Finding("c", "", "disagrees", "")]
    assert reproduction.verdict(findings) == (
        "**1 of 3 claims agree:** “a” agrees in 1 of 2 ways to measure it; “b” cannot be compared; "
        "“c” disagrees."
    )


def test_the_document_says_what_is_not_the_default(tmp_path, monkeypatch):
    folder = reproduce(toy([]), out=tmp_path, seed=2, settings={"values": (1.5,)})
    monkeypatch.setattr(reproduction, "find", {"toy": toy([])}.__getitem__)
    reproduction.write(folder.parent, ["toy"], tmp_path)
    text = (tmp_path / "docs" / "paper" / "toy.md").read_text()
    assert "`python -m paper.toy --settings.values='[1.5]' --seed=2`: " in text


def test_all_goes_on_when_one_fails(tmp_path, monkeypatch, capsys):
    needs = {"good": (), "bad": (), "after_bad": ("bad",), "after_good": ("good",)}
    monkeypatch.setattr(everything, "find", lambda name: toy([], name=name, needs=needs[name]))
    order = []

    def run(name, options):
        order.append(name)
        return "exit code 1" if name == "bad" else None

    monkeypatch.setattr(everything, "_run", run)
    with pytest.raises(SystemExit, match="1"):
        everything.run_all(out=str(tmp_path), names=[*needs, "missing"])
    assert "after_bad" not in order
    assert order.index("good") < order.index("after_good")
    error = capsys.readouterr().err
    assert "bad (exit code 1)" in error
    assert "after_bad (needs bad)" in error
    assert "missing (KeyError: 'missing')" in error


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (3.14159, 0.0423, "3.142 ± 0.042"),
        (1234.5, 67.0, "1234 ± 67"),
        (0.5, None, "0.5 (error unknown)"),
        (0.5, float("nan"), "0.5 (error unknown)"),
        (2.0, 0.0, "2"),
        (1.4084507, 7e-15, "1.408"),
    ],
)
def test_a_number_is_written_with_its_error(value, error, text):
    assert with_error(value, error) == text


def test_the_command_line_explains_the_cost(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        exhibit.command(toy([]), ["--help"])
    shown = capsys.readouterr().out
    assert "A toy (No paper). small: A line. nothing" in " ".join(shown.split())
    exhibit.command(toy([]), ["--out", str(tmp_path), "--settings.size", "5"])
    record = json.loads((tmp_path / "small" / "toy" / "record.json").read_text())
    assert record["settings"] == {"seed": 0, "size": 5, "values": [1.0, 2.0]}
    assert "agrees: it has a|line\n    5 points" in capsys.readouterr().out
