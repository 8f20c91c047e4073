"""Products in reduced precision, and the error that is stated for them."""

import numpy as np
import pytest
import torch
from models import tiny_gpt2

import blockspec
from blockspec.numerics.measures import wasserstein
from blockspec.products.precision import reduced_multiplication


def make(model=None, *, terms=None):
    model = model or tiny_gpt2(dtype=torch.float32)
    tokens = torch.randint(
        model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(0)
    )
    loss = blockspec.losses.next_token
    if terms is not None:
        loss = blockspec.losses.Loss(loss.outputs, terms)
    return blockspec.Objective(model, [{"input_ids": tokens}], loss), blockspec.partition(
        model, include="*weight*"
    )


def measure(spectrum):
    return spectrum.nodes.ravel(), spectrum.weights.ravel() / spectrum.num_probes


@pytest.fixture(scope="module")
def spectra():
    objective, blocks = make()
    return {
        p: blockspec.estimate_spectra(objective, blocks, 4, 12, precision=p)
        for p in (None, "bfloat16")
    }


def test_the_stated_error_is_that_of_the_spectra():
    """Against all eigenvalues in both precisions: it bounds how far they move, and is not many
    times too large.
    """
    objective, blocks = make()
    blocks = [block for block in blocks if block.numel <= 64]
    wide, narrow = (
        blockspec.estimate_spectra(objective, blocks, 1, 64, precision=p)
        for p in (None, "bfloat16")
    )
    assert all(s.exact for s in narrow.values())
    moved = np.array([wasserstein(measure(wide[name]), measure(narrow[name])) for name in wide])
    stated = np.array([s.error for s in narrow.values()])
    assert (moved > 0).all()
    assert (moved <= stated).all()
    assert np.median(stated / moved) < 10


def test_the_error_is_a_part_of_the_spectrum_s_error(spectra, tmp_path):
    wide, narrow = spectra[None], spectra["bfloat16"]
    for name, s in narrow.items():
        assert wide[name].precision_error == 0
        assert s.error >= s.precision_error > 0
    narrow.save(tmp_path / "spectra.parquet")
    loaded = blockspec.load_spectra(tmp_path / "spectra.parquet")
    assert [s.precision_error for s in loaded.values()] == [
        s.precision_error for s in narrow.values()
    ]
    assert blockspec.block_diagonal(narrow).precision_error > 0


def test_what_measuring_the_error_costs(spectra):
    wide, narrow = spectra[None], spectra["bfloat16"]
    assert narrow.cost.products == wide.cost.products + 2 * 4 * len(wide)  # small blocks


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_tf32_is_allowed_inside_alone(precision):
    seen = set()

    def terms(outputs, batch):
        seen.add(torch.backends.cuda.matmul.allow_tf32)
        return blockspec.losses.next_token.terms(outputs, batch)

    objective, blocks = make(terms=terms)
    blockspec.estimate_spectra(objective, blocks[:1], 1, 2, precision=precision)
    assert seen == ({False, True} if precision else {False})  # in full too, for the error
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_state_of_another_precision_is_refused(tmp_path):
    objective, blocks = make()

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        blockspec.estimate_spectra(
            objective, blocks, 1, 4, state=tmp_path, state_every=0.0, progress=stop
        )
    with pytest.raises(ValueError, match="precision is 'None' there, 'bfloat16' here"):
        blockspec.estimate_spectra(objective, blocks, 1, 4, state=tmp_path, precision="bfloat16")


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match=r"precision is one of \('tf32', 'bfloat16'\).*got 'half'"):
        blockspec.estimate_spectra(*make(), 1, 2, precision="half")


def test_the_other_precision_is_measured_in_the_same_way(monkeypatch):
    """A layer at a time, from the micro-batch that was fitted, and never beside another graph."""
    from blockspec.engine import estimate
    from blockspec.products.curvature import Products

    objective, blocks = make()
    made = []

    class Noted(Products):
        def sweep(self, requests):
            found = super().sweep(requests)
            made.append(self)
            assert {one for one in made if one._kept} == {self}
            return found

    monkeypatch.setattr("blockspec.products.selection.Products", Noted)
    monkeypatch.setattr(estimate, "Products", Noted)

    def at_once(schedule, operator, limit):
        operator.micro_batch, operator.graphs = 2, 2  # both graphs are kept
        return limit

    monkeypatch.setattr(estimate, "fit", at_once)
    blockspec.estimate_spectra(
        objective, blocks, 1, 2, precision="bfloat16", products="layerwise", memory="2GiB"
    )
    narrow, wide = dict.fromkeys(made)
    assert (narrow.precision, wide.precision) == ("bfloat16", None)
    assert wide.way.layerwise
    assert wide.rebuilt > 0
    assert wide.micro_batch == 2


SAID = {
    "as PyTorch begins": lambda: None,
    "for training": lambda: torch.set_float32_matmul_precision("high"),
    "nowhere": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "by name": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "by name, everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def names_of_precisions():
    cudnn = torch.backends.cudnn
    return [p.fp32_precision for p in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.fixture
def as_pytorch_begins():
    def put_back():
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.fp32_precision = "none"

    before = names_of_precisions()
    yield
    put_back()
    assert names_of_precisions() == before


@pytest.mark.parametrize("precision", [None, "tf32"])
@pytest.mark.parametrize("said", SAID)
def test_a_gpu_rounds_where_it_was_asked_for_and_nowhere_else(as_pytorch_begins, said, precision):
    """PyTorch's convolutions round unless they are told not to, and trainings let products too."""
    SAID[said]()
    before = names_of_precisions()
    with reduced_multiplication(precision, torch.device("cuda")):
        rounds = [name == "tf32" for name in names_of_precisions()]
        assert rounds == [precision == "tf32"] * 3
    assert names_of_precisions() == before
