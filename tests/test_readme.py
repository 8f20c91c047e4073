"""README and the pages of docs/: their Python runs, README prints what it says, and links lead
somewhere.
"""

import contextlib
import copy
import io
import itertools
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_cli import invoke
from transformers import Trainer, TrainingArguments

from blockspec import js0, load_run, load_spectra
from blockspec.runs.factories import explained
from blockspec.runs.hugging_face import hugging_face

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
HOW_TO = sorted((ROOT / "docs/how_to").glob("*.md"))
# these pages go on with the names of README
CONTINUED = (
    "toolbox",
    "directions",
    "optimizer",
    "first_spectrum",
    "training",
    "preconditioned",
    "scale",
)


def blocks_of(page, language="python"):
    """Its fenced blocks of a language; of none: what is printed."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [code for kind, code in fenced if kind == language]


def numbers_of(text):
    """The words of a text, numbers as numbers."""
    words = text.replace("±", " ").split()
    return [float(word) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) else word for word in words]


def run(page, names):
    """Runs the Python of a page; what begins with the name of a file is written to it first."""
    for code in blocks_of(page):
        if named := re.match(r"# (\w+)\.py\n", code):
            Path(f"{named[1]}.py").write_text(code)
            sys.modules.pop(named[1], None)
        exec(compile(code, str(page), "exec"), names)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What README's Python leaves behind, in a folder of its own, and what it printed."""
    folder, found = tmp_path_factory.mktemp("readme"), {}
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()) as out,
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
    ):
        run(README, found)
    return {**found, "folder": folder, "printed": out.getvalue()}


@pytest.mark.slow
def test_the_command_of_readme_gives_the_numbers_of_its_python(names, monkeypatch):
    monkeypatch.chdir(names["folder"])
    monkeypatch.syspath_prepend(str(names["folder"]))
    commands = blocks_of(README, language="bash")
    lines = [line for block in commands for line in block.splitlines()]
    (line,) = [line for line in lines if "first:tiny" in line]
    _, *arguments = shlex.split(line)
    done = invoke(*arguments, "--plots", "false")
    assert done.code == 0, done.err
    found = load_run("runs/first").last
    assert list(found) == list(names["spectra"])
    for name, spectrum in names["spectra"].items():
        np.testing.assert_array_equal(found[name].nodes, spectrum.nodes)
    assert js0(found) == js0(load_spectra("spectra.parquet"))


def test_the_table_of_arguments_is_the_one_that_help_prints():
    page = (ROOT / "docs/your_model.md").read_text(encoding="utf-8")
    rows = [(name, default, text) for name, default, text in explained(hugging_face)]
    assert len(rows) >= 7
    for name, default, text in rows:
        assert f"| `{name}` | {default} | {text} |" in page
    for command in ("run", "plan"):
        printed = invoke(command, "--help").out
        for name, _, text in rows:
            assert f"--model_args.{name}" in printed
            assert text.split(".")[0] in " ".join(printed.split())


def test_readme_prints_what_it_says(names):
    (printed,) = blocks_of(README, language="")
    said, found = numbers_of(printed), numbers_of(names["printed"])
    assert len(said) == len(found)
    for a, b in zip(said, found, strict=True):
        if isinstance(a, float) and abs(a) < 1e-5:  # residuals of converged values: rounding
            assert 0 <= b < 1e-5
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=0.15)  # two digits, on another machine
        else:
            assert a == b
    assert (names["folder"] / "spectra.parquet").exists()


def test_the_page_of_directions_goes_on_with_readme(names, monkeypatch, capsys):
    monkeypatch.chdir(names["folder"])
    run(ROOT / "docs/directions.md", dict(names))
    assert capsys.readouterr().out.split() == ["True", "True"]
    assert Path("step.png").exists()


def test_the_page_of_preconditioners_goes_on_with_readme(names, monkeypatch, capsys):
    monkeypatch.chdir(names["folder"])
    weights = {name: value.clone() for name, value in names["model"].state_dict().items()}
    run(ROOT / "docs/preconditioned.md", dict(names))
    names["model"].load_state_dict(weights)  # the page trains for three steps
    names["model"].zero_grad()
    assert capsys.readouterr().out.split() == ["True", "True"]
    assert Path("edges.png").exists()


@pytest.mark.slow
def test_the_toolbox_page_goes_on_with_readme(names, monkeypatch, capsys):
    monkeypatch.chdir(names["folder"])
    run(ROOT / "docs/toolbox.md", names)
    assert names["pairs"].converged.all()
    blocks = {block.name for block in names["blocks"]}
    assert set(names["traces"]) == blocks == set(names["spectra"])
    assert {"coupling.png", "landscape.png"} <= {path.name for path in names["folder"].iterdir()}
    assert capsys.readouterr().out.splitlines()[-1] == "50"  # the largest of 1 ... 50


def test_the_optimizer_page_trains_every_parameter(names):
    """For 60 steps: with single entries of D, its rate once made losses of 1e7."""
    names = {**names, "training_batches": names["batches"] * 30}
    before = [parameter.clone() for parameter in names["model"].parameters()]
    loss = names["objective"].value()
    run(ROOT / "docs/optimizer.md", names)
    assert names["loss"] < loss - 1
    after = names["model"].parameters()
    assert all((new != old).any() for new, old in zip(after, before, strict=True))
    with torch.no_grad():  # other tests use the model
        for new, old in zip(names["model"].parameters(), before, strict=True):
            new.copy_(old)


@pytest.fixture
def model_as_it_was(names):
    """Other tests use the model."""
    before = copy.deepcopy(names["model"].state_dict())
    yield
    names["model"].load_state_dict(before)
    names["model"].zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [ROOT / "docs/first_spectrum.md", *HOW_TO], ids=lambda page: page.stem
)
@pytest.mark.usefixtures("model_as_it_was")
def test_a_how_to_goes_on_with_readme(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, dict(names))


@pytest.mark.slow
def test_the_page_of_a_training_follows_eigenvalues(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments("trained", report_to=[], save_strategy="no", use_cpu=True)
    training = {"held_out": names["batches"][0], "num_steps": 20, "lr": 1e-3}
    training["held_out_batches"] = names["batches"]
    training["trainer"] = Trainer(names["model"], arguments)
    run(ROOT / "docs/training.md", names | training)
    assert (tmp_path / "runs/mine/tracking.parquet").exists()


@pytest.mark.slow
def test_the_page_of_scale_gives_the_same_a_layer_at_a_time(names):
    query = [block for block in names["blocks"] if block.kind == "query"]
    given = {"my_batches": names["batches"], "loss": names["blockspec"].losses.next_token}
    run(ROOT / "docs/scale.md", names | given | {"blocks": query})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    if page.stem not in CONTINUED:
        monkeypatch.chdir(tmp_path)
        run(page, {})


def commands_of(page):
    """The words of each command of ours in its blocks of bash."""
    for block in blocks_of(page, language="bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "blockspec" in words:
                yield words[words.index("blockspec") + 1 :]


def test_every_option_of_a_command_on_a_page_is_one():
    """Longer ones than can be run here. The arguments of a model are told by its factory."""
    helps, seen = {}, 0
    for page in [README, *PAGES, *HOW_TO]:
        for command, *words in commands_of(page):
            helps.setdefault(command, invoke(command, "--help").out)
            for word in words:
                option = word.split("=")[0]
                if option.startswith("--") and not option.startswith("--model_args."):
                    seen += 1
                    name = option.removeprefix("--")  # --include is short for --blocks.include
                    told = re.search(rf"--([\w.]+\.)?{name}[ ,\]\n]", helps[command])
                    assert told, (page.name, option)
    assert seen >= 15


def test_no_code_stands_outside_of_fences():
    """Indented code would not be run."""
    for page in [README, *PAGES, *HOW_TO]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for before, line in itertools.pairwise(prose.splitlines()):
            assert before.strip() or not line.startswith("    "), (page.name, line)


@pytest.mark.parametrize(
    "page", [README, ROOT / "CONTRIBUTING.md", *PAGES, *HOW_TO], ids=lambda page: page.stem
)
def test_links_lead_somewhere(page):
    """What the site alone has, its examples, is looked up when it is built: tests/test_docs.py."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    for target in targets:
        elsewhere = target.startswith(("https://", "examples/"))
        assert elsewhere or (page.parent / target).exists(), target


def test_readme_is_read_in_five_minutes():
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    assert "positive part" not in text  # the GGN approximates the Hessian


def test_readme_leads_to_the_site():
    """It names the site, and the site names every page: sphinx warns of one that no list holds, and
    warnings are errors. (README named all of them itself, while there was no site.)
    """
    text = README.read_text(encoding="utf-8")
    for target in ("docs/build.sh", "docs/index.md", "docs/how_to/index.md"):
        assert target in text
