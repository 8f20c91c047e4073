"""What a notebook shows of results, and what they give as tables."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_page import HOSTILE, spectrum, stage

from blockspec import Block, Estimates, Spectra, js_distances
from blockspec.figures import plots
from blockspec.spectra.collection import Cost
from blockspec.spectra.notebook import ROWS
from blockspec.spectra.spectrum import Estimate
from blockspec.toolbox.couplings import Coupling


def estimates():
    blocks = [Block(HOSTILE, "key", 0, 5), Block("b", "query", None, 7)]
    values = [Estimate(1.5, 0.25, 0.5), Estimate(2.0, None)]
    return Estimates(blocks, values, probes=[3, 1], cost=Cost(1, 1))


def coupling():
    samples = np.array([[[4.0, 1.0], [1.0, 9.0]], [[4.0, 2.0], [2.0, 9.0]]])
    blocks = (Block(HOSTILE, "key", 0, 5), Block("b", "query", None, 7))
    return Coupling(blocks, samples, "hessian", Cost(1, 1))


RESULTS = {
    "spectra": lambda: stage(0),
    "spectrum": lambda: stage(0)[HOSTILE],
    "estimates": estimates,
    "coupling": coupling,
}


@pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)
def test_a_notebook_shows_a_table_with_names_escaped(make):
    html = make()._repr_html_()
    assert html.count("<table") == 1
    assert "</script>&lt;script&gt;" not in html
    assert "<script>" not in html
    assert "<img" not in html
    assert "h.0.&lt;b&gt;&lt;/script&gt;" in html


def test_every_number_has_its_errors_and_what_is_unknown_is_called_so():
    one = spectrum("a", "key", 0, seed=0)
    html = one._repr_html_()
    for value in (*one.largest[:2], *one.smallest[:2], *one.trace[:2], one.error):
        assert f"<td>{value:.3g}</td>" in html
    assert one.data_error is None
    assert "<td>not known</td>" in html
    html = estimates()._repr_html_()
    assert all(f"<td>{text}</td>" in html for text in ("1.5", "0.25", "0.5", "not known"))


def test_long_lists_are_cut():
    many = Spectra(spectrum(f"b{i}", "key", 0, seed=i) for i in range(2 * ROWS))
    assert many._repr_html_().count("<tr") <= ROWS + 3


def test_tables():
    spectra = stage(0)
    one = spectra["h.0.key"]
    table = one.to_frame()
    trace = (table["node"] * table["weight"]).sum() / one.num_probes * one.block.numel
    assert trace == pytest.approx(one.trace.value)
    assert len(spectra.to_frame()) == sum(s.nodes.size for s in spectra.values())
    assert list(estimates().to_frame()["value"]) == [1.5, 2.0]
    assert len(coupling().to_frame()) == 4


def test_an_array_with_names():
    pytest.importorskip("xarray")
    short = spectrum("short", "key", 0, seed=1, probes=2, steps=3)
    spectra = Spectra([spectrum("z", "key", 0, seed=0), short])
    found = spectra.to_xarray()
    assert list(found["block"].values) == ["z", "short"]
    np.testing.assert_array_equal(found["node"].sel(block="z"), spectra["z"].nodes)
    assert int(found["weight"].sel(block="short").notnull().sum()) == 6


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_figures_take_the_place_of_an_axes(layout):
    spectra = stage(0).select(include="h.[01].????*", exclude="*script*")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout=layout)
    assert spectra.plot(ax=left) is figure
    assert plots.distance_heatmap(js_distances(spectra), ax=right) is figure
    assert left not in figure.axes
    assert len(figure.subfigs) == 2
    figure.canvas.draw()  # warnings are errors
    first, second = (part.get_window_extent() for part in figure.subfigs)
    assert first.x1 <= second.x0 + 1
    plt.close(figure)
    alone = spectra.plot()
    assert alone is not figure
    assert not alone.subfigs


def test_an_axes_without_a_place_is_refused():
    figure = plt.figure()
    with pytest.raises(ValueError, match="takes an axes of plt"):
        stage(0).plot(ax=figure.add_axes((0, 0, 1, 1)))
    plt.close(figure)
