"""Norms and ranks of blocks against dense truth."""

import dense_truth
import numpy as np
import pytest
import torch
from coupled import assert_coverage, coupled, cut, holds, matrix_with_decay
from problems import problem, truth
from quadratics import matrix_of, spectra_of

import blockspec
from blockspec import partition

SIZES = (30, 40, 50)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_squared_norms_of_blocks(curvature):
    it = problem("gpt2")
    blocks = partition(it.model, include=["*/query", "*ln_1.weight", "*wte*"])
    found = blockspec.squared_norms(it.objective(), blocks, num_probes=40, curvature=curvature)
    for block in blocks:
        index = dense_truth.positions(it.model, block)
        exact = float(truth("gpt2", curvature)[index][:, index].square().sum())
        assert (
            abs(found[block.name].value - exact) <= 4.5 * found[block.name].stderr + 1e-12 * exact
        )
    assert found["transformer.h.0.ln_1.weight"].stderr == 0


@pytest.mark.slow
def test_intervals_cover_the_truth():
    matrix = matrix_with_decay(sum(SIZES), power=0.5)
    objective, blocks = coupled(matrix, SIZES)
    exact = [float(cut(matrix, SIZES)[i][i].square().sum()) for i in range(3)]
    trials = [
        blockspec.squared_norms(objective, blocks, num_probes=16, seed=seed) for seed in range(200)
    ]
    assert_coverage(
        [
            [holds(found.interval(b.name), t) for b, t in zip(blocks, exact, strict=True)]
            for found in trials
        ]
    )


def test_takes_a_product_of_each_block_per_probe_and_ends_at_the_tolerance():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    assert blockspec.squared_norms(objective, blocks, num_probes=9).cost.products == 27
    found = blockspec.squared_norms(objective, blocks, num_probes=25, tolerance=0.5)
    assert set(found.probes.values()) == {8}


@pytest.mark.parametrize(
    "values", [[4.0, 2.0, -2.0, 1.0], [3.0, 3.0, 3.0], [0.0, 0.0], [5.0, 0.0, 0.0]]
)
def test_ranks_of_known_eigenvalues(values):
    table = blockspec.norms(spectra_of({"a": matrix_of(values)})).loc["weights.a"]
    sizes = np.abs(values)
    assert table["squared_norm"] == pytest.approx((sizes**2).sum(), abs=1e-12)
    assert table["nuclear_norm"] == pytest.approx(sizes.sum(), abs=1e-12)
    if sizes.any():
        assert table["norm"] == pytest.approx(sizes.max())
        assert table["stable_rank"] == pytest.approx((sizes**2).sum() / sizes.max() ** 2)
        assert table["effective_rank"] == pytest.approx(sizes.sum() / sizes.max())
    else:
        assert np.isnan(table["stable_rank"])


def test_ranks_of_a_large_block_come_with_errors():
    values = torch.cat(
        [torch.linspace(-0.05, 0.05, 95), torch.tensor([1.0, 1.0, -1.0, 0.5, 0.5])]
    ).double()
    table = blockspec.norms(spectra_of({"a": matrix_of(values)}, num_probes=30, num_steps=20)).loc[
        "weights.a"
    ]
    for column, exact in (
        ("stable_rank", values.square().sum()),
        ("effective_rank", values.abs().sum()),
    ):
        assert abs(table[column] - float(exact)) < 4 * table[f"{column}_stderr"]
