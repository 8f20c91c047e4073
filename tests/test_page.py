"""The page of ``blockspec report``: its numbers are those of the tables, and it works in a browser."""

import base64
import json
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium, needs_chromium
from plotly.offline import get_plotlyjs
from test_cli import invoke

from blockspec import (
    Block,
    Objective,
    Spectra,
    Spectrum,
    estimate_spectra,
    js0,
    js_distances,
    load_run,
    load_spectra,
    losses,
    partition,
)
from blockspec.numerics.files import whole_file
from blockspec.runs.loading import Run
from blockspec.runs.page import curves
from blockspec.runs.page.answer import sentences
from blockspec.runs.page.numbers import as_json
from blockspec.runs.page.write import report
from blockspec.runs.tables import append_rows, heterogeneity_of, rows_of
from blockspec.spectra.heterogeneity import corrected_distances
from blockspec.spectra.resolved import resolved_density
from blockspec.spectra.tails import SIDES, magnitudes_of, tail

HOSTILE = "h.0.<b></script><script>hacked=1</script><img src=x onerror=hacked=2>\"'$x$[/x]{0}%{x}"
KINDS = ("query", "key", "value", "norm")
STEPS = (0, 10, 300)


def spectrum(name, kind, layer, *, seed, size=1.0, probes=3, steps=12, numel=500):
    """Of random nodes: a bulk around zero, and outliers."""
    rng = np.random.default_rng(seed)
    bulk = rng.normal(0, size, (probes, steps))
    nodes = np.sort(np.where(rng.random((probes, steps)) < 0.8, bulk, 30 * np.abs(bulk)), axis=1)
    weights = rng.gamma(1.0, 1.0, (probes, steps)) * np.exp(-np.abs(nodes) / size)
    weights /= weights.sum(1, keepdims=True)
    full, none = np.full(probes, 1e-3 * size), np.zeros(probes)
    arrays = (nodes, weights, 0.01 * np.abs(nodes), np.full(probes, steps), none > 0, none, full)
    settings = (True, False, "hessian", "torch.float32", "gaussian", seed)
    return Spectrum(Block(name, kind, layer, numel), *arrays, *settings)


def stage(step, *, size=1.0):
    """Spectra of a model with a hostile name, and the full matrix."""
    blocks = [
        spectrum(f"h.{layer}.{kind}", kind, layer, seed=7 * layer + at, size=size * 10.0**-at)
        for layer in range(2)
        for at, kind in enumerate(KINDS)
    ]
    blocks.append(spectrum(HOSTILE, "other", None, seed=99, size=5 * size + step))
    return Spectra([*blocks, spectrum("model", "full", None, seed=100, size=size, numel=4500)])


def write_run(folder, *, size=1.0, steps=STEPS, hostile="m[/x]<b>"):
    """A run as ``blockspec run`` leaves it, without a model."""
    folder.mkdir()
    stages = []
    for step in steps:
        spectra = stage(step, size=size)
        append_rows(folder, rows_of(spectra, heterogeneity_of(spectra, step=step), step=step))
        model = {"class": hostile, "parameters": 4500, "dtype": "torch.float32"}
        entry = {"step": step, "loss": 5 - step / 100, "model": model, "data": ["a", "b"]}
        entry |= {"checkpoint": f"<i>{step}", "cost": {"products": 72, "check": "passed"}}
        stages.append(entry | {"seconds": 65.0, "peak": 2**30, "planned": {"products": 36}})
    record = {"command": ["__main__.py", "run", "a b"], "settings": {"model": hostile}}
    with whole_file(folder / "run.json") as partial:
        partial.write_text(json.dumps(record | {"stages": stages, "versions": {"torch": "2"}}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs; the second has one step of the first, and another one."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first")
    return first, write_run(folder / "<b>second", size=2.0, steps=(10, 20))


@pytest.fixture(scope="module")
def page(runs):
    """The page of the first run, by the command."""
    out = runs[0].parent / "report.html"
    result = invoke("report", str(runs[0]), "-o", str(out))
    assert result.code == 0, result.err
    assert result.out.strip() == str(out)
    return out


def inflated(path, name):
    text = path.read_text("utf-8").split(f'<script id="{name}" type="text/plain">')[1]
    return zlib.decompress(base64.b64decode(text.split("</script>")[0]))


def unpacked(path):
    """JSON and whole numbers of a page, read as they are written down in the module's text."""
    content = inflated(path, "data")
    length = int.from_bytes(content[:4], "little")
    low, high = np.frombuffer(content[4 + length :], np.uint8).reshape(2, -1).astype(np.uint16)
    return json.loads(content[4 : 4 + length]), (low + 256 * high).cumsum(dtype=np.uint16).view(
        np.int16
    )


def test_numbers_are_those_of_the_table(page, runs):
    data, _ = unpacked(page)
    (run,) = data["runs"]
    assert run["steps"] == list(STEPS)
    for at, step in enumerate(STEPS):
        spectra = load_spectra(runs[0] / "spectra.parquet", step=step)
        assert [block["name"] for block in run["blocks"]] == list(spectra)
        for place, one in enumerate(spectra.values()):
            expected = {
                "largest": one.largest[:2],
                "smallest": one.smallest[:2],
                "trace": one.trace[:2],
                "error": (one.error,),
            }
            for name, values in expected.items():
                found = [run["numbers"][name][part][place][at] for part in ("value", "error")]
                np.testing.assert_allclose(found[: len(values)], values, rtol=1e-4)
            sizes = np.abs(one.nodes)
            rank = 500 * (sizes * one.weights).sum(1).mean() / sizes.max()
            rank *= one.block.numel / 500
            found = run["numbers"]["effective_rank"]["value"][place][at]
            np.testing.assert_allclose(found, rank, rtol=1e-4)


def test_curves_and_distances_survive_their_packing(page, runs):
    data, store = unpacked(page)
    run, scales = data["runs"][0], data["scales"]
    spectra = load_spectra(runs[0] / "spectra.parquet", step=10)
    places, points = run["curves"], run["curves"]["points"]
    for place, one in enumerate(spectra.values()):
        number = places["number"][place][1]
        linear, low, high, top = places["heads"][number]
        grid = linear * np.sinh(np.linspace(low, high, points))
        mean, error = resolved_density(one, grid, one.linear)
        read = {
            name: store[places[name] + number * points :][:points].astype(float)
            for name in ("density", "density_error", "tail", "tail_high")
        }
        found = 10.0 ** (top + read["density"] / scales["decade"])
        seen = mean > mean.max() * 1e-10
        np.testing.assert_allclose(found[seen], mean[seen], rtol=0.01)
        relative = read["density_error"] / scales["unit"]
        np.testing.assert_allclose(relative[seen], (error / mean)[seen], atol=0.011)
        side = grid > magnitudes_of([one])[0]
        beyond = tail(one, grid[side])
        for name, expected in (("tail", beyond.count), ("tail_high", beyond.high)):
            some = expected >= 0.5
            found = 10.0 ** (read[name][side][some] / scales["decade"])
            np.testing.assert_allclose(found, expected[some], rtol=0.01)
    parts = spectra.parts
    count = len(parts) * (len(parts) - 1) // 2
    start = run["distances"]["jensen-shannon"]["values"] + count
    below = js_distances(parts).to_numpy()[np.tril_indices(len(parts), -1)]
    np.testing.assert_allclose(store[start : start + count] / scales["nat"], below, atol=6e-5)


def test_errors_of_distances_add_up_to_that_of_their_mean(runs):
    """For two blocks the mean over pairs is the pair."""
    two = load_spectra(runs[0] / "spectra.parquet", step=0).select(include="h.0.[qk]*")
    corrected, errors = corrected_distances(two)
    assert corrected[0, 1] == pytest.approx(js0(two).value, rel=1e-9)
    assert errors[0, 1] == pytest.approx(js0(two).stderr, rel=1e-9)
    assert errors[0, 0] == corrected[0, 0] == 0


def test_what_comes_from_a_run_is_escaped(page):
    text = page.read_text("utf-8")
    assert "<script>hacked" not in text
    assert "<i>0" not in text
    assert "m[/x]&lt;b&gt;" in text
    assert "m[/x]<b>" not in text
    assert "blockspec run &#x27;a b&#x27;" in text
    assert inflated(page, "plotly").decode() == get_plotlyjs()
    assert text.count('id="plotly"') == 1
    for outside in ("<script src", "<link", "@import"):
        assert outside not in text.replace("script src=%", "")


def test_the_answer_in_sentences(page, runs):
    text = page.read_text("utf-8").split("What was found")[1].split("</section>")[0]
    last = load_spectra(runs[0] / "spectra.parquet", step=300)
    top = max(last.parts.values(), key=lambda s: s.largest.value)
    assert top.block.name == HOSTILE
    assert f"{top.largest.value:.2g}"[:2] in text
    assert "layer 0</button>" in text
    assert "not known" in text  # how far the data reach
    mean = js0(last)  # of the loaded run, as it is
    assert f"± {mean.stderr:.2g} nats</b> at step 300" in text


@pytest.mark.slow
def test_fifty_blocks_at_twenty_stages_stay_below_six_megabytes():
    store = curves.Store()
    points = curves.ROOM // 1000
    found = [
        curves.curve(spectrum("b", "key", 0, seed=i, size=1 + i, probes=4, steps=40), points)
        for i in range(1000)
    ]
    for name in curves.ARRAYS:
        store.put(np.stack([one[name] for one in found]))
    store.put(np.random.default_rng(0).integers(0, 6931, 4 * 20 * 50 * 49 // 2))
    described = {"heads": [one["head"] for one in found]}
    described |= {"numbers": np.random.default_rng(0).random((1000, 20)).round(5).tolist()}
    script = curves.deflated(get_plotlyjs().encode())
    assert len(script) + len(store.packed(described)) < 3.1e6


def test_a_run_without_distances_and_with_one_block(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    one = Spectra([spectrum("model", "full", None, seed=0)])
    append_rows(folder, rows_of(one, None, step=0))
    (folder / "run.json").write_text('{"stages": []}')
    assert report([folder], tmp_path / "deep" / "one.html").stat().st_size > 1e6
    assert load_run(folder).heterogeneity is None


def test_a_report_without_plotly_says_what_to_install(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = invoke("report", str(runs[0]), "-o", str(tmp_path / "r.html"))
    assert result.code == 1
    assert "pip install 'blockspec[report]'" in result.err
    assert not (tmp_path / "r.html").exists()


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    result = invoke("report", str(tmp_path), "-o", str(tmp_path / "r.html"))
    assert result.code == 1
    assert "is no run's folder" in result.err


@pytest.fixture(scope="module")
def shown(page):
    """The page in a browser."""
    with chromium() as browser:
        browser.size(1400, 1000)
        browser.open(page)
        yield browser


def text(browser, selector):
    browser.until("later === 0")
    return browser.run(f"document.querySelector('{selector}').innerText")


def drawn(browser, plot):
    """What a figure shows: names and heights of its lines."""
    browser.run(f"$('{plot}').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    browser.until(f"later === 0 && !waiting.has('{plot}')")
    lines = f"$('{plot}').data.filter(t => t.mode !== 'none').map(t => [t.name || '', [...t.y]])"
    return browser.run(lines)


@needs_chromium
def test_it_opens_without_an_error_and_asks_for_nothing(shown, page):
    assert shown.errors == []
    assert [url for url in shown.requests if not url.startswith("data:")] == [page.as_uri()]
    assert shown.run("window.hacked === undefined")
    assert shown.run("document.querySelectorAll('img, iframe, main i:not(.chip i)').length") == 0
    names = shown.run("data.runs[0].blocks.map(b => b.short)")
    seen = shown.run("[...document.querySelectorAll('#map .ytick text')].map(t => t.textContent)")
    assert set(seen) == set(names)
    assert HOSTILE in shown.run("[...document.querySelectorAll('#table button')].map(b => b.title)")


@needs_chromium
def test_sentences_and_tables_do_not_wait_for_the_figures(shown, page):
    text = page.read_text("utf-8")
    assert text.index("What was found") < text.index("the command to do it again")
    assert text.index("the command to do it again") < text.index('id="plotly"')
    marks = "performance.getEntriesByType('mark').map(mark => mark.name)"
    assert shown.run(marks) == ["tables", "figures"]
    paints = "performance.getEntriesByName('first-contentful-paint').length"
    assert shown.run(paints) == 1
    shown.run("scrollTo(0, 0); state.stage = 0; draw()")
    shown.until("later === 0 && !waiting.has('density')")
    assert shown.run("waiting.has('pair')")  # far below: it is not drawn
    shown.run("dispatchEvent(new Event('beforeprint'))")
    assert shown.run("waiting.size") == 0


@needs_chromium
def test_the_slider_changes_what_is_shown(shown):
    shown.run("state.stage = 2; draw()")
    before = drawn(shown, "density"), text(shown, "#table")
    shown.run("$('stage').focus()")
    shown.press("ArrowLeft")
    assert "Training step 10 (2 of 3)" in text(shown, "#bar").replace("\n", " ")
    assert drawn(shown, "density") != before[0]
    assert text(shown, "#table") != before[1]
    assert "10" in text(shown, "#table-step")


@needs_chromium
def test_a_click_on_a_cell_draws_its_block_at_its_step(shown):
    shown.run("state.chosen = []; draw()")
    shown.click("#map .nsewdrag", at=(0.01, 0.01))
    shown.until("state.chosen.length === 1")
    assert shown.run("[state.chosen[0], steps[state.stage]]") == ["h.0.query", 0]
    assert [name for name, _ in drawn(shown, "density")] == ["h0.query"]
    assert text(shown, "#map-cell").startswith("h0.query, step 0, largest eigenvalue: ")
    shown.click("#map .nsewdrag", at=(0.99, 0.15))
    shown.until("state.chosen.length === 2")
    assert len(drawn(shown, "density")) == 2  # laid over each other
    assert shown.run("steps[state.stage]") == 300


@needs_chromium
def test_the_map_works_by_keyboard(shown):
    shown.run("state.chosen = []; draw(); $('map').cursor = null; $('map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        shown.press(key)
    assert shown.run("[state.chosen[0], steps[state.stage]]") == ["h.0.value", 10]


@needs_chromium
def test_axes_normalisation_and_tails(shown, runs):
    shown.run("state.chosen = ['h.0.key']; state.stage = 2")
    seen = []
    for view, axis, normalised in [
        ("density", "symlog", False),
        ("density", "linear", False),
        ("density", "log", False),
        ("density", "linear", True),
        ("tail", "symlog", False),
    ]:
        shown.run(f"Object.assign(state, {{view: '{view}', axis: '{axis}'}})")
        shown.run(f"state.normalised = {str(normalised).lower()}; draw()")
        seen.append(shown.run("JSON.stringify($('density').data.map(t => [...t.x, ...t.y]))"))
    assert len(set(seen)) == len(seen)
    top = max(max(heights) for _, heights in drawn(shown, "density"))
    one = load_spectra(runs[0] / "spectra.parquet", step=300)["h.0.key"]
    most = [tail(one, magnitudes_of([one])[:1], side).count[0] for side in SIDES]
    assert top == pytest.approx(max(most), rel=0.05)
    shown.run("Object.assign(state, {view: 'density', axis: 'symlog'}); draw()")


@needs_chromium
def test_a_click_on_a_distance_lays_two_spectra_over_each_other(shown, runs):
    shown.run("state.stage = 2; draw()")
    shown.until("later === 0")
    shown.click("#pairs .nsewdrag", at=(0.05, 0.16))
    shown.until("state.pair.includes('h.0.query')")
    assert shown.run("state.pair") == ["h.0.key", "h.0.query"]
    assert [name for name, _ in drawn(shown, "pair")] == ["h0.key", "h0.query"]
    parts = load_spectra(runs[0] / "spectra.parquet", step=300).parts
    expected = js_distances(parts).loc["h.0.key", "h.0.query"]
    told = text(shown, "#pair-note").split("Distance: ")[1].split(" ")[0]
    assert float(told) == pytest.approx(expected, rel=0.01, abs=1e-4)


@needs_chromium
def test_the_table_is_sorted_and_filtered_and_the_data_can_be_had(shown):
    shown.click("#table th:nth-child(5) button")
    column = "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[4].innerText)"
    shown.until("later === 0")
    values = [float(cell.split(" ")[0]) for cell in shown.run(column)]
    assert values == sorted(values, reverse=True)
    shown.run("$('filter').value = 'KEY'; $('filter').dispatchEvent(new Event('input'))")
    shown.until("later === 0")
    assert len(shown.run(column)) == 2
    shown.run("$('filter').value = ''; $('filter').dispatchEvent(new Event('input'))")
    shown.until("later === 0")
    shown.run("URL.createObjectURL = blob => { last = blob; return 'data:,' }; last = null")
    for button in ("map", "density", "course", "pairs", "pair", "table"):
        assert shown.run(f"$('{button}').rows_ ?? $('{button}').rows")
        shown.run(f"last = null; document.querySelector('[data-csv={button}]').click()")
        assert shown.run("last.size") > 50, button


@needs_chromium
def test_a_sentence_leads_to_its_figure(shown):
    shown.run("state.pair = ['h.1.value', 'h.0.value']; draw()")
    shown.click(".answer [data-pair]")
    shown.until("state.pair[0] === 'h.0.query'")
    box = shown.run("(b => [b.top, b.bottom])($('pair').getBoundingClientRect())")
    assert box[0] < 1000
    assert box[1] > 0


def in_view(browser, selector):
    """Whether an element's upper end is on the screen."""
    box = f"document.querySelector('{selector}').getBoundingClientRect().top"
    browser.until("later === 0")
    return browser.run(f"(top => top >= 0 && top < innerHeight)({box})")


@needs_chromium
def test_five_questions_are_answered_in_two_clicks_each(shown, runs):
    """By a person who has never seen the project, from the page alone."""
    by_step = [load_spectra(runs[0] / "spectra.parquet", step=step) for step in STEPS]
    first, last = by_step[0], by_step[-1]
    clicks = []

    def ask(*selectors):
        shown.run("scrollTo(0, 0); state.chosen = []; state.pair = null; draw()")
        clicks.append(len(selectors))
        for selector in selectors:
            shown.click(selector)

    ask()  # which block has the largest eigenvalue?
    assert max(last.parts.values(), key=lambda s: s.largest.value).block.name == HOSTILE
    largest = text(shown, ".answer li:nth-child(2)")
    value = f"{last[HOSTILE].largest.value:.4g}"
    assert largest.startswith(f"The largest eigenvalue of all blocks is {value} ± ")
    assert in_view(shown, ".answer li:nth-child(2)")
    ask(".answer [data-block]")  # how did it move in training?
    assert f"It was {first[HOSTILE].largest.value:.4g} " in largest
    assert in_view(shown, "#density")
    (course,) = [y for name, y in drawn(shown, "course")]
    assert course == pytest.approx([s[HOSTILE].largest.value for s in by_step], rel=1e-4)
    ask(".answer [data-pair]")  # do query and key of layer 0 look alike?
    pairs = text(shown, ".answer li:nth-child(5)")
    assert pairs.startswith("Query against key: layer 0 differ clearly (")
    assert in_view(shown, "#pair-note")
    assert [name for name, _ in drawn(shown, "pair")] == ["h0.query", "h0.key"]
    ask()  # how sure is that?
    _, errors = corrected_distances(last)
    error = errors[tuple(list(last.parts).index(f"h.0.{kind}") for kind in ("query", "key"))]
    assert f" ± {error:.2g})" in pairs
    assert "of its largest magnitude" in text(shown, ".answer li:nth-child(6)")
    ask("nav a[href='#origin']")  # with which settings was it made?
    assert in_view(shown, "#origin h2")
    assert "blockspec run 'a b'" in text(shown, "#origin pre")
    assert max(clicks) <= 2


@needs_chromium
def test_on_a_phone_and_in_the_dark(shown):
    light = shown.run("getComputedStyle(document.body).backgroundColor")
    shown.scheme("dark")
    assert shown.run("getComputedStyle(document.body).backgroundColor") != light
    shown.scheme("light")
    shown.size(360, 740, phone=True)
    time.sleep(0.3)
    assert shown.run("document.documentElement.scrollWidth") <= 360
    shown.size(1400, 1000)
    assert shown.errors == []


@pytest.mark.slow
@needs_chromium
def test_two_runs_beside_each_other(runs, tmp_path):
    out = report(runs, tmp_path / "two.html")
    with chromium() as browser:
        browser.size(1200, 900)
        browser.open(out)
        browser.run("state.stage = steps.indexOf(10); draw()")
        rows = (
            "[...document.querySelectorAll('#differences tbody tr')].map(r => r.cells[4].innerText)"
        )
        browser.until("later === 0")
        found = browser.run(rows)
        two = [load_spectra(run / "spectra.parquet", step=10) for run in runs]
        for shown_, name in zip(found, two[0], strict=True):
            difference = two[1][name].largest.value - two[0][name].largest.value
            value, error = shown_.split(" ± ")
            assert float(value) == pytest.approx(difference, rel=0.006)
            both = [one[name].largest.residual for one in two]
            assert float(error) == pytest.approx(np.hypot(*both), rel=0.06)
        assert len(drawn(browser, "density")) == 2  # one line a run
        browser.run("state.stage = steps.indexOf(20); draw()")
        assert "Not measured at this step" in text(browser, "#density-note")
        assert browser.errors == []


def test_errors_of_the_data_are_shown_where_they_are_known():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(12)]
    objective = Objective(model, batches, losses.classification)
    blocks = partition(model, by="tensor")
    spectra = estimate_spectra(objective, blocks, num_probes=2, num_steps=4)
    run = Run(Path("r"), {}, spectra.to_frame(step=0))
    numbers = as_json(run, "r")["numbers"]
    for place, one in enumerate(spectra.values()):
        assert one.data_error > 0
        for name, expected in (
            ("largest", one.largest.data_stderr),
            ("trace", one.trace.data_stderr),
            ("error", one.data_error),
        ):
            assert numbers[name]["data"][place][0] == pytest.approx(expected, rel=1e-4)
        assert numbers["total"]["value"][place][0] == pytest.approx(one.total_error, rel=1e-4)
    told = " ".join(sentences(run, None))
    shares = sorted(one.total_error / one.norm for one in spectra.values())
    assert f"With them counted in, the error is <b>{50 * (shares[1] + shares[2]):.2g} %" in told
    assert "not known" not in told
