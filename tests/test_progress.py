"""Bars say how far a call is."""

import pytest
import torch
from coupled import coupled, matrix_with_decay
from models import tiny_gpt2

import blockspec
from blockspec.numerics import progress as shown
from blockspec.numerics.progress import progress_bars


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(shown, "_place", lambda: "terminal")


@pytest.fixture
def network():
    return coupled(matrix_with_decay(9), (4, 5))


def test_a_landscape_shows_its_points(network, terminal, capsys):
    objective, blocks = network
    with blockspec.progress_bar("loss around", unit="points") as bar:
        blockspec.landscape(objective, blocks[0], "random", dimensions=1, points=7, progress=bar)
    shown = capsys.readouterr().err
    assert "loss around" in shown
    assert "7/7 points" in shown


def test_a_trace_with_a_tolerance_does_not_know_its_end(network, terminal, capsys):
    objective, blocks = network
    for tolerance, counted in ((None, "3/3 products"), (0.5, "3 products")):
        with blockspec.progress_bar("traces") as bar:
            blockspec.trace(objective, blocks, num_probes=3, tolerance=tolerance, progress=bar)
        assert counted in capsys.readouterr().err


def test_every_public_function_tells_its_progress_in_the_same_way(network):
    """``progress(done, total)``, where total is None if the end is not known."""
    objective, (first, second) = network
    calls = {
        "estimate_spectra": (objective, [first], 1, 2),
        "trace": (objective, [first]),
        "diagonal": (objective, [first]),
        "squared_norms": (objective, [first]),
        "top_eigenpairs": (objective, first),
        "coupling": (objective, [first, second], 1),
        "dense": (objective, first),
        "landscape": (objective, first, "random"),
    }
    for name, arguments in calls.items():
        told = []
        function = getattr(blockspec, name)
        function(*arguments, progress=lambda done, total, told=told: told.append((done, total)))
        assert told, name
        assert all(total is None or done <= total for done, total in told), name


def test_a_bar_for_each_label_or_none(terminal, capsys):
    for wanted in (True, False):
        with progress_bars(shown=wanted) as update:
            update("one", 1, 2)
            update("two", 2, 2)
            update("one", 2, 2)
        printed = capsys.readouterr().err
        assert (printed.count("2/2 products") == 2) == wanted
        assert ("one" in printed) == wanted


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    passed = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: passed[0])
    return passed


def test_a_log_gets_a_line_a_minute(clock, capsys):
    with progress_bars() as update:
        for second in range(0, 185):
            clock[0] = float(second)
            update("step 7", second + 1, 740)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[1] == "step 7: 61/740 products, 0:01:00 passed, 0:11:08 left"


def test_a_notebook_gets_a_line_that_is_written_over(clock, capsys, monkeypatch):
    monkeypatch.setattr(shown, "_place", lambda: "notebook")
    with progress_bars(unit="points") as update:
        for second in (0, 1, 2):
            clock[0] = float(second)
            update("loss", second, None)
    written = capsys.readouterr().err
    assert [line.strip() for line in written.split("\r")] == [
        f"loss: {n} points, 0:00:0{n} passed" for n in (0, 1, 2)
    ] + [""]


@pytest.mark.parametrize(("seconds", "asked"), [(4.0, None), (6.0, None), (6.0, False)])
def test_a_long_call_shows_itself_unless_it_is_told_not_to(clock, capsys, seconds, asked):
    @shown.shows_progress("outer")
    def outer(*, progress):
        clock[0] += seconds
        progress(1, 2)
        inner(progress=asked)

    @shown.shows_progress("inner")
    def inner(*, progress):
        clock[0] += 100.0
        progress(1, 2)

    outer(progress=asked)
    printed = capsys.readouterr().err
    assert ("outer: 1/2 products" in printed) == (seconds > shown.PATIENCE and asked is None)
    assert "inner" not in printed


def test_no_blank_line_where_nothing_was_counted(terminal, capsys):
    with progress_bars():
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("way", ["whole", "layerwise"])
def test_progress_moves_within_a_sweep(monkeypatch, way):
    monkeypatch.setattr(shown, "OFTEN", 0.0)
    objective = blockspec.Objective(
        tiny_gpt2(layers=4),
        [{"input_ids": torch.arange(16).view(2, 8)}],
        blockspec.losses.next_token,
        micro_batch=1,
    )
    blocks = blockspec.partition(objective.model, include="*h.[01].attn.c_proj.weight")
    told = []

    def tell(done, total):
        told.append((done, total, shown._where.get()))

    blockspec.estimate_spectra(
        objective, blocks, num_probes=1, num_steps=3, products=way, check=False, progress=tell
    )
    ends = [done for done, _, where in told if not where]
    assert ends == [2, 4, 6]
    numbers = [done for done, *_ in told if done <= 6]
    assert numbers == sorted(numbers)
    assert {total for _, total, _ in told} == {6}
    assert any(done % 1 for done in numbers)
    wanted = "layer 2 of 4, micro-batch 2 of 2" if way == "layerwise" else "micro-batch 2 of 2"
    assert wanted in {where for *_, where in told}


def test_a_line_says_where_in_a_sweep_the_work_is(monkeypatch, capsys):
    monkeypatch.setattr(shown, "OFTEN", 0.0)
    monkeypatch.setitem(shown.EVERY, "log", 0.0)

    @shown.shows_progress("spectra")
    def call(*, progress):
        shown.expect(4, 8)
        with shown.sweeping(2, lambda: 2) as sweep:
            sweep.number = 1
            shown.moved(0.5, "layer 12 of 32")
        progress(6, 8)

    monkeypatch.setattr(shown, "PATIENCE", 0.0)
    call()
    line, after = capsys.readouterr().err.splitlines()
    assert line.startswith("spectra: 5.5/8 products (layer 12 of 32, micro-batch 2 of 2), ")
    assert after.startswith("spectra: 6/8 products, ")
