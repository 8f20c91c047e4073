"""The diagonal against dense truth."""

import dense_truth
import numpy as np
import pytest
import torch
from coupled import assert_coverage, coupled, holds, matrix_with_decay
from problems import problem, truth

import blockspec
from blockspec import partition

SIZES = (30, 40, 50)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_entries_and_means(name, curvature):
    it = problem(name)
    blocks = [
        *partition(it.model, "head"),
        *partition(it.model, "neuron"),
        *partition(it.model, "layer"),
    ]
    blocks = list({block.name: block for block in blocks}.values())
    found = blockspec.diagonal(it.objective(), blocks, num_probes=40, curvature=curvature)
    exact = truth(name, curvature).diagonal()
    names, _ = dense_truth.flat_parameters(it.model)
    values = torch.cat([found.values[n].reshape(-1) for n in names])
    stderrs = torch.cat([found.stderrs[n].reshape(-1) for n in names])
    floor = 1e-13 * float(exact.abs().max())
    assert ((values - exact).abs() <= 6 * stderrs + floor).all()
    assert ((values - exact).abs() <= 2.03 * stderrs + floor).double().mean() > 0.85
    for block in blocks:
        mean = float(exact[dense_truth.positions(it.model, block)].mean())
        assert (
            abs(found.means[block.name].value - mean)
            <= 5.5 * found.means[block.name].stderr + floor
        ), block.name


@pytest.mark.slow
def test_intervals_cover_the_truth():
    matrix = matrix_with_decay(sum(SIZES))
    objective, blocks = coupled(matrix, SIZES)
    exact = [part.mean().item() for part in matrix.diagonal().split(SIZES)]
    means, entries = [], []
    for seed in range(200):
        found = blockspec.diagonal(objective, blocks, num_probes=16, seed=seed)
        means.append(
            [holds(found.means.interval(b.name), t) for b, t in zip(blocks, exact, strict=True)]
        )
        error = (found.values["parts.1"] - matrix.diagonal()[30:70]).abs()
        entries.append((error <= 2.131 * found.stderrs["parts.1"]).double().mean().item())
    assert_coverage(means)
    assert 0.9 <= np.mean(entries) <= 0.99


def test_takes_one_full_product_per_probe():
    it = problem("gpt2")
    cost = blockspec.diagonal(
        it.objective(), partition(it.model, "neuron"), num_probes=9
    ).means.cost
    assert cost.products == 9 * len(it.batches)


def test_means_are_the_traces_of_the_same_probes():
    it = problem("gpt2")
    blocks = partition(it.model)
    means = blockspec.diagonal(it.objective(), blocks, num_probes=4, seed=3).means
    traces = blockspec.trace(it.objective(), blocks, num_probes=4, seed=3)
    for block in blocks:
        assert means[block.name].value * block.numel == pytest.approx(
            traces[block.name].value, abs=1e-12
        )


def test_a_diagonal_matrix_is_exact_with_one_probe():
    values = torch.linspace(-2, 3, sum(SIZES), dtype=torch.float64)
    objective, blocks = coupled(torch.diag(values), SIZES)
    found = blockspec.diagonal(objective, blocks, num_probes=1)
    torch.testing.assert_close(torch.cat(list(found.values.values())), values)
    assert found.stderrs is None
    assert np.isnan(found.to_frame()["stderr"]).all()


def test_errors_of_entries_are_those_of_a_block_of_one_entry():
    objective, blocks = coupled(matrix_with_decay(41), (1, 40))
    found = blockspec.diagonal(objective, blocks, num_probes=5)
    assert found.values["parts.0"].item() == pytest.approx(found.means["parts.0"].value)
    assert found.stderrs["parts.0"].item() == pytest.approx(found.means["parts.0"].stderr)


def test_what_lies_outside_of_the_blocks_is_left_alone():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    found = blockspec.diagonal(objective, blocks[1], num_probes=3)
    assert list(found.values) == ["parts.1"]
    it = problem("gpt2")
    query = partition(it.model, include="*c_attn.weight/query")
    values = blockspec.diagonal(it.objective(), query, num_probes=3).values[
        "transformer.h.0.attn.c_attn.weight"
    ]
    assert values[:, :8].all()
    assert not values[:, 8:].any()


def test_groups_by_kind_have_errors_of_their_own():
    it = problem("gpt2")
    blocks = partition(it.model)
    found = blockspec.diagonal(it.objective(), blocks, num_probes=30)
    table = found.grouped()
    assert set(table.index) == {block.kind for block in blocks}
    biases = [block for block in blocks if block.kind == "bias"]
    numel = sum(block.numel for block in biases)
    assert table.loc["bias", "blocks"] == len(biases)
    assert table.loc["bias", "value"] == pytest.approx(
        sum(found.means[b.name].value * b.numel for b in biases) / numel
    )
    samples = found.sums[:, [i for i, b in enumerate(blocks) if b.kind == "bias"]].sum(1) / numel
    assert table.loc["bias", "stderr"] == pytest.approx(samples.std(ddof=1) / np.sqrt(30))


def test_ends_when_the_tolerance_is_met():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)) + torch.eye(sum(SIZES)), SIZES)
    found = blockspec.diagonal(objective, blocks, num_probes=1000, tolerance=0.05)
    assert len(found.sums) < 100
    assert all(estimate.stderr <= 0.05 * estimate.value for estimate in found.means.values())
