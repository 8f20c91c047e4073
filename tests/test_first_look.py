"""What a user sees first in Python: results that print in a few words, a run read back, one block
in a line.
"""

import numpy as np
import pytest
import torch
from test_cli import invoke, run_arguments
from torch import nn

import blockspec
from blockspec import losses


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 2))
    batches = [(torch.randn(8, 20), torch.randn(8, 2))]
    return blockspec.Objective(model, batches, losses.regression)


@pytest.fixture(scope="module")
def blocks(objective):
    return blockspec.partition(objective.model)


@pytest.fixture(scope="module")
def spectra(objective, blocks):
    return blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=5)


def test_results_print_in_a_few_words(objective, blocks, spectra):
    first = blocks[0]
    printed = {
        "objective": repr(objective),
        "spectrum": repr(spectra[first.name]),
        "spectra": repr(spectra),
        "estimates": repr(blockspec.trace(objective, blocks, num_probes=3)),
        "diagonal": repr(blockspec.diagonal(objective, blocks, num_probes=2)),
        "eigenpairs": repr(blockspec.top_eigenpairs(objective, first, k=2)),
        "coupling": repr(blockspec.coupling(objective, blocks, 2)),
        "landscape": repr(blockspec.landscape(objective, first, "random", dimensions=1, points=5)),
        "loss": repr(losses.next_token),
    }
    for name, text in printed.items():
        assert " at 0x" not in text, name
        assert "array(" not in text, name
        assert "tensor(" not in text, name
        assert len(text) < 900, name
    assert printed["objective"] == "Objective of Sequential (370 parameters), 1 batch(es), " + repr(
        losses.regression
    )
    spectrum = spectra[first.name]
    for word in (first.name, f"{spectrum.largest.value:.3g}", f"{spectrum.trace.value:.3g}"):
        assert word in printed["spectrum"]
    assert len(printed["estimates"].splitlines()) == len(blocks) + 1


def test_spectra_are_also_found_by_their_place(spectra):
    names = list(spectra)
    assert spectra[0] is spectra[names[0]]
    assert spectra[-1] is spectra[names[-1]]
    with pytest.raises(IndexError):
        spectra[len(names)]


def test_one_block_or_all_of_them_in_a_line(spectra):
    for figure in (spectra[0].plot(), spectra.plot()):
        drawn = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata())]
        assert drawn
        assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_a_run_is_read_back_as_a_whole(tmp_path):
    out = tmp_path / "run"
    assert invoke(*run_arguments(out)).code == 0
    run = blockspec.load_run(out)
    assert run.steps == [0]
    loaded = blockspec.load_spectra(out)  # the folder will do
    assert list(run.last) == list(run[0]) == list(loaded)
    np.testing.assert_array_equal(run.last[0].nodes, loaded[0].nodes)
    assert run.settings["estimate"]["num_steps"] == 3
    assert set(run.heterogeneity["block"]) == set(run.last.parts)
    assert "steps [0]" in repr(run)
    with pytest.raises(KeyError, match="no step 7; it has"):
        run[7]
    with pytest.raises(FileNotFoundError, match="is no run's folder"):
        blockspec.load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no table of spectra at"):
        blockspec.load_spectra(tmp_path)


def test_a_loss_of_outputs_is_told_what_it_is_called_with(objective):
    wrong = {
        "lambda out, batch": lambda out, batch: ((out - batch[1]) ** 2).sum(),
        "torch's own": lambda out, batch: torch.nn.functional.mse_loss(out, batch[1]),
        "of one argument": lambda batch: 0.0,
    }
    for loss in wrong.values():
        other = blockspec.Objective(objective.model, objective.whole_batches(), loss)
        with pytest.raises(TypeError, match=r"called as loss\(model, batch\), and failed"):
            other.value()
    within = lambda model, batch: (model(batch), 1)  # noqa: E731 - the model itself fails
    other = blockspec.Objective(objective.model, objective.whole_batches(), within)
    with pytest.raises(TypeError, match="linear"):
        other.value()
