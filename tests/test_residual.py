"""What the Hessian has beyond the Gauss-Newton matrix, block by block: products, traces,
spectra.
"""

import dense_truth
import numpy as np
import pytest
import torch
from problems import problem, truth

import blockspec
from blockspec import Objective, partition
from blockspec.products.curvature import Products


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "resnet"])
def test_products_are_those_of_the_difference(name):
    it = problem(name)
    residual = truth(name) - truth(name, "ggn")
    assert residual.norm() > 0.01 * truth(name).norm()
    for block in (*partition(it.model, "model"), *partition(it.model, "head")[:5]):
        index = dense_truth.positions(it.model, block)
        vector = torch.randn(
            block.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        (product,) = Products(it.objective(), "residual").sweep([(block, vector)])
        expected = residual[index][:, index] @ vector
        torch.testing.assert_close(
            product, expected, rtol=0, atol=1e-11 * float(truth(name).norm())
        )


@pytest.mark.parametrize("curvature", ["ggn", "residual"])
def test_spectra_of_both_parts(curvature):
    it = problem("gpt2")
    matrix = truth("gpt2", "ggn") if curvature == "ggn" else truth("gpt2") - truth("gpt2", "ggn")
    blocks = partition(it.model, include=["*weight/value", "*ln_1.weight"])
    spectra = blockspec.estimate_spectra(
        it.objective(), blocks, num_probes=4, num_steps=25, curvature=curvature
    )
    for block in blocks:
        index = dense_truth.positions(it.model, block)
        values = dense_truth.eigenvalues(matrix, index).numpy()
        scale = np.abs(values).max()
        assert spectra[block.name].curvature == curvature
        assert spectra[block.name].largest.value == pytest.approx(values[-1], abs=1e-2 * scale)
        assert spectra[block.name].smallest.value == pytest.approx(values[0], abs=1e-2 * scale)
        trace = spectra[block.name].trace
        assert (
            abs(trace.value - values.sum())
            <= 5 * trace.stderr + 1e-12 * scale + 1e-12 * np.abs(values).sum()
        )


def test_a_linear_model_has_none():
    model = torch.nn.Linear(4, 3).double()
    batch = (torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3)
    objective = Objective(model, [batch], blockspec.losses.classification)
    found = blockspec.trace(
        objective, partition(model, "tensor"), num_probes=4, curvature="residual"
    )
    assert {estimate.value for estimate in found.values()} == {0.0}


def test_needs_a_loss_that_says_where_to_split():
    it = problem("gpt2")
    objective = Objective(it.model, it.batches, lambda model, batch: it.loss(model, batch))
    with pytest.raises(ValueError, match="'residual' needs a loss that is split"):
        blockspec.trace(objective, partition(it.model), curvature="residual")
