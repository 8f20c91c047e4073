"""Bars say how far a call is."""

import pytest
from coupled import coupled, matrix_with_decay

import blockspec
from blockspec.runs.progress import progress_bars


@pytest.fixture
def network():
    return coupled(matrix_with_decay(9), (4, 5))


def test_a_landscape_shows_its_points(network, capsys):
    objective, blocks = network
    with blockspec.progress_bar("loss around", unit="points") as bar:
        blockspec.landscape(objective, blocks[0], "random", dimensions=1, points=7, progress=bar)
    shown = capsys.readouterr().err
    assert "loss around" in shown
    assert "7/7 points" in shown


def test_a_trace_with_a_tolerance_does_not_know_its_end(network, capsys):
    objective, blocks = network
    for tolerance, shown in ((None, "3/3 products"), (0.5, "3 products")):
        with blockspec.progress_bar("traces") as bar:
            blockspec.trace(objective, blocks, num_probes=3, tolerance=tolerance, progress=bar)
        assert shown in capsys.readouterr().err


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


def test_a_bar_for_each_label_or_none(capsys):
    for shown in (True, False):
        with progress_bars(shown=shown) as update:
            update("one", 1, 2)
            update("two", 2, 2)
            update("one", 2, 2)
        printed = capsys.readouterr().err
        assert (printed.count("2/2 products") == 2) == shown
        assert ("one" in printed) == shown
