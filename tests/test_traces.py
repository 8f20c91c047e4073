"""Traces against dense truth: values, intervals, costs."""

import dense_truth
import numpy as np
import pytest
import torch
from coupled import assert_coverage, coupled, cut, holds, matrix_with_decay
from problems import problem, truth
from quadratics import objective_of

import blockspec
from blockspec import Estimate, partition
from blockspec.numerics.algorithms import run
from blockspec.toolbox.traces import METHODS, Sampling, extend, leave_one_out, xtrace

CURVATURES = ("hessian", "ggn", "fisher")
SIZES = (30, 40, 50)


def exact_traces(name, curvature, blocks):
    diagonal = truth(name, curvature).diagonal()
    return {
        b.name: float(diagonal[dense_truth.positions(problem(name).model, b)].sum()) for b in blocks
    }


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_hutchinson_of_every_block(name, curvature):
    it = problem(name)
    blocks = [*partition(it.model, "head"), *partition(it.model, "model")]
    found = blockspec.trace(it.objective(), blocks, num_probes=48, curvature=curvature)
    assert list(found) == [block.name for block in blocks]
    norm = float(truth(name, curvature).norm())
    for block, exact in exact_traces(name, curvature, blocks).items():
        assert abs(found[block].value - exact) <= 4.5 * found[block].stderr + 1e-13 * norm, block


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_better_methods_on_a_network(method, curvature):
    it = problem("gpt2")
    blocks = partition(it.model, include=["*c_fc.weight", "*/query", "*ln_1.weight"])
    found = blockspec.trace(it.objective(), blocks, method, num_probes=36, curvature=curvature)
    for block, exact in exact_traces("gpt2", curvature, blocks).items():
        assert abs(found[block].value - exact) <= 4.5 * found[block].stderr + 1e-12, block
    assert found["transformer.h.0.ln_1.weight"].stderr == 0  # 8 parameters: done exactly


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_intervals_cover_the_truth(method):
    matrix = matrix_with_decay(sum(SIZES))
    objective, blocks = coupled(matrix, SIZES)
    exact = [float(cut(matrix, SIZES)[i][i].trace()) for i in range(3)]
    hits = []
    for seed in range(200):
        found = blockspec.trace(objective, blocks, method, num_probes=16, seed=seed)
        hits.append([holds(found.interval(b.name), t) for b, t in zip(blocks, exact, strict=True)])
    assert_coverage(hits)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_without_bias(method):
    matrix = matrix_with_decay(sum(SIZES))
    objective, blocks = coupled(matrix, SIZES)
    trials = [
        blockspec.trace(objective, blocks, method, num_probes=8, seed=seed).values()
        for seed in range(150)
    ]
    values = np.array([[estimate.value for estimate in trial] for trial in trials])
    exact = [float(cut(matrix, SIZES)[i][i].trace()) for i in range(3)]
    assert np.all(np.abs(values.mean(0) - exact) <= 4 * values.std(0) / np.sqrt(len(values)))


def test_hutchinson_takes_one_full_product_per_probe_for_any_number_of_blocks():
    it = problem("gpt2")
    costs = [
        blockspec.trace(it.objective(), blocks, num_probes=10).cost
        for blocks in (partition(it.model, "model"), partition(it.model, "neuron"))
    ]
    assert costs[0] == costs[1]
    assert costs[0].products == 10 * len(it.batches)
    assert costs[0].gradients == 2 * len(it.batches)  # 8 probes at once, then 2


@pytest.mark.parametrize(
    ("method", "probes"), [("hutch++", 12), ("hutch++", 14), ("xtrace", 12), ("xtrace", 13)]
)
def test_block_by_block_methods_take_at_most_their_products(method, probes):
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    cost = blockspec.trace(objective, blocks, method, num_probes=probes).cost
    assert cost.products <= probes * len(blocks)
    assert cost.products >= (probes - 2) * len(blocks)


def test_traces_of_all_partitions_add_up_to_one_number():
    it = problem("gpt2")
    sums = [
        sum(
            e.value
            for e in blockspec.trace(
                it.objective(), partition(it.model, by), num_probes=3, seed=5
            ).values()
        )
        for by in ("model", "tensor", "head", "neuron", "layer")
    ]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-10)


def test_hessian_is_gauss_newton_plus_residual():
    it = problem("gpt2")
    blocks = partition(it.model)
    parts = {
        curvature: blockspec.trace(it.objective(), blocks, num_probes=3, curvature=curvature)
        for curvature in ("hessian", "ggn", "residual")
    }
    for name, value in parts["hessian"].items():
        assert parts["ggn"][name].value + parts["residual"][name].value == pytest.approx(
            value.value, abs=1e-12
        )
    assert any(abs(e.value) > 0.1 for e in parts["residual"].values())


def test_blocks_of_other_parameters_do_not_disturb_a_single_block():
    """Alone, a block is probed alone: for one without off-diagonal entries the trace is exact."""
    matrix = torch.block_diag(
        torch.diag(torch.arange(1.0, 5.0)), matrix_with_decay(6).float()
    ).double()
    matrix[:4, 4:], matrix[4:, :4] = 0.5, 0.5
    objective, blocks = coupled(matrix, (4, 6))
    alone = blockspec.trace(objective, blocks[0], num_probes=3)["parts.0"]
    assert alone.value == pytest.approx(10.0)
    assert 0 < alone.stderr < 10  # equal samples prove nothing
    assert blockspec.trace(objective, blocks, num_probes=3)["parts.0"].stderr > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_ends_when_the_tolerance_is_met(method):
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)) + torch.eye(sum(SIZES)), SIZES)
    loose, tight = (
        blockspec.trace(
            objective,
            blocks,
            method,
            num_probes=3000 if method == "hutchinson" else 28,
            tolerance=tolerance,
        )
        for tolerance in (0.1, 0.002)
    )
    for estimate in loose.values():
        assert estimate.stderr <= 0.1 * abs(estimate.value)
    assert loose.cost.products < tight.cost.products


def test_a_block_of_zeros_does_not_keep_the_others_going():
    objective = objective_of(
        {"one": 0.1 * torch.ones(6, 6).double() + torch.eye(6), "zero": torch.zeros(4, 4).double()}
    )
    found = blockspec.trace(
        objective, partition(objective.model, "tensor"), num_probes=500, tolerance=0.2
    )
    assert found.probes["weights.one"] < 50
    assert found["weights.zero"] == Estimate(0.0, 0.0)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method):
    factor = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = factor @ torch.diag(torch.tensor([5.0, 2.0, -1.0, 0.01]).double()) @ factor.T
    objective, blocks = coupled(matrix, (60,))
    (found,) = blockspec.trace(objective, blocks, method, num_probes=30).values()
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert found.stderr < 1e-9


def test_leaving_one_out_is_what_it_says():
    """Against the definition: a QR factorisation of all other images, for each probe anew (equation
    2.3 of the paper).
    """
    matrix = matrix_with_decay(40)
    drawn = torch.randn(
        7, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).sign()
    images = drawn @ matrix
    expected = []
    for i in range(7):
        q = torch.linalg.qr(torch.cat([images[:i], images[i + 1 :]]).T)[0]
        rest = drawn[i] - q @ (q.T @ drawn[i])
        expected.append(float((q.T @ matrix @ q).trace() + rest @ matrix @ rest))
    basis = extend(images[:0], images[:3])
    basis = torch.cat([basis, extend(basis, images[3:])])
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))
    np.testing.assert_allclose(
        leave_one_out(drawn, images, basis, basis @ matrix), expected, rtol=1e-10
    )


def test_dependent_vectors_extend_a_basis_by_what_is_new():
    basis = torch.eye(5, dtype=torch.float64)[:2]
    vectors = torch.tensor(
        [[1, 1, 0, 0, 0], [0, 0, 3, 0, 0], [1, 0, 3, 0, 0], [0, 0, 0, 0, 0]]
    ).double()
    torch.testing.assert_close(
        extend(basis, vectors).abs(), torch.tensor([[0, 0, 1, 0, 0]]).double()
    )


def test_same_seed_same_numbers():
    it = problem("gpt2")
    blocks = partition(it.model)
    first, again, other = (
        blockspec.trace(it.objective(), blocks, num_probes=2, seed=seed) for seed in (1, 1, 2)
    )
    assert dict(first) == dict(again) != dict(other)


def test_frame_and_progress():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    seen = []

    def told(done, total):
        seen.append((done, total))

    table = blockspec.trace(objective, blocks, num_probes=10, progress=told).to_frame()
    assert seen == [(8, 10), (10, 10)]
    assert list(table.index) == ["parts.0", "parts.1", "parts.2"]
    columns = ["kind", "layer", "numel", "value", "stderr", "data_stderr"]
    assert list(table.columns) == columns  # a number shows both of its errors
    assert np.isnan(blockspec.trace(objective, blocks, num_probes=1).to_frame()["stderr"]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "girard"}, "method is one of .*hutch"),
        ({"num_probes": 0}, "at least 1, got 0"),
        ({"method": "xtrace", "num_probes": 7}, "at least 8, got 7"),
        ({"tolerance": 0}, "tolerance is relative.*got 0"),
        ({"curvature": "hesse"}, "curvature is one of"),
    ],
)
def test_wrong_settings(settings, message):
    objective, blocks = coupled(matrix_with_decay(4), (4,))
    with pytest.raises(ValueError, match=message):
        blockspec.trace(objective, blocks, **settings)


def test_algorithms_know_nothing_of_models():
    matrix = matrix_with_decay(50)

    class Drawn:
        def draw(self, start, stop):
            generator = torch.Generator().manual_seed(start)
            return torch.randn(stop - start, 50, generator=generator, dtype=torch.float64).sign()

    estimate, samples, _ = run(xtrace(Drawn(), Sampling(40)), lambda rows: rows @ matrix)
    assert samples == 20
    assert abs(estimate.value - float(matrix.trace())) < 5 * estimate.stderr
