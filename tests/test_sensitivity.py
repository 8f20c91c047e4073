"""Damage by quantisation: predicted, measured, ranked, and bits dealt out under a budget."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from problems import problem

import blockspec
from blockspec.toolbox.directions import quantised
from blockspec.toolbox.sensitivity import sensitivity


@pytest.fixture(scope="module")
def found():
    it = problem("gpt2")
    blocks = blockspec.partition(it.model, exclude=["*bias*", "*wpe*"])
    return it, blocks, sensitivity(it.objective(), blocks, (2, 4, 8))


def test_every_matrix_has_every_bit_width(found):
    _, blocks, result = found
    matrices = [block.name for block in blocks if "ln_" not in block.name]
    assert set(result.table.index) == set(itertools.product(matrices, (2, 4, 8)))


def test_predictions_are_those_of_the_dense_block(found):
    it, blocks, result = found
    block = next(block for block in blocks if block.name.endswith("c_attn.weight/value"))
    matrix = blockspec.dense(it.objective(), block)
    q = blockspec.model.blocks.gather(block, quantised(it.model, 4) | {}).numpy()
    gradient = blockspec.model.blocks.gather(block, it.objective().gradient()).numpy()
    row = result.table.loc[(block.name, 4)]
    assert row["curvature"] == pytest.approx(q @ matrix @ q, rel=1e-9)
    assert row["gradient"] == pytest.approx(gradient @ q, rel=1e-9)
    largest = np.linalg.eigvalsh(matrix)[-1]
    assert row["largest"] == pytest.approx(largest * row["mse"], rel=0.02)


def test_predicted_and_measured_agree_at_eight_bits(found):
    _, _, result = found
    fine = result.table.xs(8, level="bits")
    np.testing.assert_allclose(fine["measured"], fine["predicted"], rtol=0.1, atol=1e-7)
    assert result.correlations([8])["predicted"] > 0.9


def test_the_models_weights_are_as_they_were(found):
    it, blocks, _ = found
    before = {name: p.detach().clone() for name, p in it.model.named_parameters()}
    sensitivity(it.objective(), blocks[:2], (2,))
    for name, p in it.model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("mean_bits", [2, 3.3, 5, 8])
def test_the_allocation_is_the_best_of_all(found, mean_bits):
    """Against every allocation of the first four matrices."""
    from dataclasses import replace

    _, _, result = found
    names = result.table.index.unique("block")[:4]
    few = replace(result, table=result.table.loc[list(names)])
    damage, sizes = few.table["predicted"], few.table["numel"].groupby("block").first()[names]

    def total(bits):
        return sum(damage[(name, width)] for name, width in zip(names, bits, strict=True))

    allowed = [
        bits
        for bits in itertools.product((2, 4, 8), repeat=4)
        if np.dot(bits, sizes) <= mean_bits * sizes.sum() + 1e-6
    ]
    chosen = few.allocate(mean_bits)
    assert tuple(chosen[names]) in allowed
    assert total(chosen[names]) == pytest.approx(min(map(total, allowed)), abs=1e-12)


def test_a_budget_below_the_smallest_width_is_refused(found):
    with pytest.raises(ValueError, match="at least 2"):
        found[2].allocate(1.5)


def test_measuring_an_allocation_moves_all_matrices_at_once(found):
    it, _, result = found
    everywhere = result.allocate(8).map(lambda bits: 8)
    parts = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight", "wte.weight")
    direction = quantised(it.model, 8, include=[f"*{part}" for part in parts])
    blocks = blockspec.partition(it.model)
    found = blockspec.directional(it.objective(), blocks, direction, couplings=False)
    assert result.measure(everywhere) == pytest.approx(found.measured.value, rel=1e-9)


def test_the_command_prints_and_writes_its_tables(tmp_path):
    from test_cli import TINY, invoke

    out = tmp_path / "bits"
    result = invoke(
        "sensitivity", "--model", TINY, "--bits", "2,4", "--group", "4", "--budgets", "3", "--out", str(out)
    )  # fmt: skip
    assert result.code == 0, result.err
    for word in ("damage of 2 bits", "Spearman", "uniform"):
        assert word in result.out
    assert {path.name for path in out.iterdir()} == {
        "sensitivity.csv",
        "rankings.csv",
        "budgets.csv",
        "allocations.csv",
    }
    budget = pd.read_csv(out / "budgets.csv").iloc[0]
    assert (budget["mean_bits"], budget["uniform_bits"]) == (3, 2)


def test_bits_that_are_no_numbers_are_named():
    from test_cli import TINY, invoke

    result = invoke("sensitivity", "--model", TINY, "--bits", "two")
    assert result.code == 1
    assert "bits is a list of numbers" in result.err
