"""Figures of the toolbox: what is in them, and that they can be saved."""

import numpy as np
import pytest
from coupled import coupled, matrix_with_decay
from matplotlib.colors import LogNorm
from problems import problem

import blockspec
from blockspec.figures import toolbox as plots
from blockspec.toolbox.landscapes import Landscape
from blockspec.toolbox.matrices import dense


@pytest.fixture(scope="module")
def network():
    it = problem("gpt2")
    return blockspec.coupling(it.objective(), blockspec.partition(it.model), 2)


def mesh(figure):
    return figure.axes[0].collections[0]


@pytest.mark.parametrize("relative", [True, False])
def test_coupling_heatmap_shows_the_table(network, relative, tmp_path):
    figure = plots.coupling_heatmap(network, relative=relative)
    table = network.relative if relative else network.norms
    shown = np.asarray(mesh(figure).get_array()).reshape(table.shape)
    np.testing.assert_array_equal(shown, np.maximum(table, mesh(figure).norm.vmin))
    assert isinstance(mesh(figure).norm, LogNorm)
    assert (mesh(figure).norm.vmin == 0.01) == relative
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[4:7] == ["h0.query", "h0.key", "h0.value"]
    assert f"{100 * network.off_diagonal_share.value:.3g}" in figure.get_suptitle()
    assert plots.save(figure, tmp_path, "coupling").stat().st_size > 10_000


def test_small_heatmaps_are_written_out():
    objective, blocks = coupled(matrix_with_decay(9), (4, 5))
    found = blockspec.coupling(objective, blocks, 3)
    texts = [text.get_text() for text in plots.coupling_heatmap(found).axes[0].texts]
    assert texts == [f"{value:.2g}" for value in found.relative.to_numpy().ravel()]


def test_a_coupling_of_zeros_can_be_drawn(tmp_path):
    objective, blocks = coupled(0 * matrix_with_decay(9), (4, 5))
    for relative in (True, False):
        plots.save(
            plots.coupling_heatmap(blockspec.coupling(objective, blocks, 1), relative=relative),
            tmp_path,
            "zeros",
        )


def test_pictures_of_blocks(tmp_path):
    it = problem("gpt2")
    query = next(block for block in blockspec.partition(it.model) if block.kind == "query")
    matrix = dense(it.objective(), query)
    figure = plots.hessian_blocks({"query": matrix, "nothing": np.zeros((3, 4))}, title="Hessian")
    picture = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(picture, np.abs(matrix) / np.abs(matrix).max())
    assert figure.axes[0].get_xlabel() == f"64 x 64, largest {np.abs(matrix).max():.2g}"
    assert plots.save(figure, tmp_path, "blocks").stat().st_size > 5_000


def test_large_blocks_keep_their_largest_entries():
    matrix = np.zeros((1000, 700))
    matrix[613, 401] = 5
    small = plots.coarse(matrix, 100)
    assert small.shape == (100, 100)
    assert small.max() == 5
    assert (small > 0).sum() == 1
    assert plots.coarse(matrix[:50, :50], 100).shape == (50, 50)


def test_line(tmp_path):
    steps = np.linspace(-1, 1, 5)
    figure = plots.landscape_line(Landscape((steps,), steps**2, ("direction 1",)))
    np.testing.assert_array_equal(
        figure.axes[0].lines[0].get_xydata(), np.stack([steps, steps**2], 1)
    )
    plots.save(figure, tmp_path, "line")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_surface(logarithmic, tmp_path):
    steps = (np.linspace(-1, 1, 5), np.linspace(-2, 2, 7))
    losses = 1 + steps[0][:, None] ** 2 + 0.1 * steps[1] ** 2
    losses[0, 0] = np.inf
    figure = plots.landscape_surface(Landscape(steps, losses, ("u", "v")), logarithmic=logarithmic)
    solid, flat = figure.axes[:2]
    assert (
        (solid.get_xlabel(), solid.get_ylabel())
        == (flat.get_xlabel(), flat.get_ylabel())
        == ("u", "v")
    )
    assert solid.get_zlabel() == ("log10 of the loss" if logarithmic else "loss")
    assert flat.get_ylim() == (-2, 2)
    plots.save(figure, tmp_path, "surface")


def test_wrong_landscapes_are_refused():
    line, plane = (
        Landscape((np.arange(3.0),), np.arange(3.0), ("u",)),
        Landscape((np.arange(3.0),) * 2, np.eye(3) - 1, ("u", "v")),
    )
    with pytest.raises(ValueError, match="a line needs a landscape of 1 direction, got 2"):
        plots.landscape_line(plane)
    with pytest.raises(ValueError, match="a surface needs a landscape of 2 directions, got 1"):
        plots.landscape_surface(line)
    with pytest.raises(ValueError, match="positive losses, got -1"):
        plots.landscape_surface(plane, logarithmic=True)
    with pytest.raises(ValueError, match="no matrices"):
        plots.hessian_blocks({})
