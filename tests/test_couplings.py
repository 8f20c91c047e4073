"""Norms of cross blocks against dense truth."""

import dense_truth
import numpy as np
import pytest
import torch
from coupled import assert_coverage, coupled, cut, holds, matrix_with_decay
from problems import problem, truth

import blockspec
from blockspec import Estimate, partition
from blockspec.spectra.estimates import interval

SIZES = (30, 40, 50)


def exact_squares(matrix, positions):
    return np.array(
        [
            [float(matrix[rows][:, columns].square().sum()) for columns in positions]
            for rows in positions
        ]
    )


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_all_norms_of_a_network(curvature):
    it = problem("gpt2")
    blocks = partition(it.model, "matrix" if curvature == "hessian" else "layer")
    found = blockspec.coupling(it.objective(), blocks, 12, curvature=curvature)
    exact = exact_squares(
        truth("gpt2", curvature), [dense_truth.positions(it.model, block) for block in blocks]
    )
    error = np.abs(found.squared_norms.to_numpy() - exact)
    assert (error <= 8 * found.squared_stderrs.to_numpy() + 1e-12 * exact.max()).all()
    assert (error <= 2.08 * found.squared_stderrs.to_numpy() + 1e-12 * exact.max()).mean() > 0.8
    share = 1 - np.trace(exact) / exact.sum()
    assert abs(found.off_diagonal_share.value - share) <= 4 * found.off_diagonal_share.stderr
    assert list(found.norms.index) == list(found.norms.columns) == [block.name for block in blocks]


@pytest.mark.slow
def test_intervals_cover_the_truth():
    matrix = matrix_with_decay(sum(SIZES), power=0.5)
    objective, blocks = coupled(matrix, SIZES)
    exact = np.array([[float(part.norm()) for part in row] for row in cut(matrix, SIZES)])
    share = 1 - (np.diag(exact) ** 2).sum() / (exact**2).sum()
    names = [block.name for block in blocks]
    hits = []
    for seed in range(200):
        found = blockspec.coupling(objective, blocks, 16, seed=seed)
        cells = [
            holds(found.interval(names[i], names[j]), exact[i, j])
            for i, j in zip(*np.triu_indices(3), strict=True)
        ]
        hits.append([*cells, holds(interval(found.off_diagonal_share, 16), share)])
    assert_coverage(hits)


def test_takes_one_full_product_per_block_and_probe():
    it = problem("gpt2")
    blocks = partition(it.model)
    assert blockspec.coupling(it.objective(), blocks, 1).cost.products == len(blocks) * len(
        it.batches
    )
    assert blockspec.coupling(it.objective(), blocks, 3).cost.products == 3 * len(blocks) * len(
        it.batches
    )


def test_a_block_diagonal_matrix_has_no_share_off_it():
    matrix = torch.block_diag(*[matrix_with_decay(size) for size in SIZES])
    objective, blocks = coupled(matrix, SIZES)
    found = blockspec.coupling(objective, blocks, 2)
    assert found.off_diagonal_share == Estimate(0.0, 0.0)
    assert (found.norms.to_numpy()[np.triu_indices(3, 1)] == 0).all()
    np.testing.assert_array_equal(np.diag(found.relative), 1)


def test_nothing_at_all():
    objective, blocks = coupled(torch.zeros(8, 8, dtype=torch.float64), (3, 5))
    found = blockspec.coupling(objective, blocks, 2)
    assert found.off_diagonal_share == Estimate(0.0, 0.0)
    assert not found.to_frame()[["norm", "stderr", "relative"]].to_numpy().any()


def test_errors_of_one_probe_are_unknown():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    found = blockspec.coupling(objective, blocks, 1)
    assert found.off_diagonal_share.stderr is None
    assert np.isnan(found.stderrs.to_numpy()).all()
    assert np.isnan(found.interval("parts.0", "parts.1")).all()
    assert found.norms.to_numpy().min() > 0


def test_norms_are_roots_and_their_errors_follow():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    found = blockspec.coupling(objective, blocks, 10)
    squares = found.samples.mean(0)
    np.testing.assert_allclose(found.norms, np.sqrt(squares))
    up, down = np.sqrt(squares + 1e-6), np.sqrt(squares - 1e-6)
    np.testing.assert_allclose(found.stderrs, found.squared_stderrs * (up - down) / 2e-6, rtol=1e-4)
    relative = found.relative.to_numpy()
    assert relative[0, 1] == pytest.approx(
        squares[0, 1] ** 0.5 / (squares[0, 0] * squares[1, 1]) ** 0.25
    )


def test_groups_add_up():
    it = problem("gpt2")
    blocks = partition(it.model, "head")
    found = blockspec.coupling(it.objective(), blocks, 2)
    by_kind = found.grouped(lambda block: block.kind)
    kinds = [block.kind for block in blocks]
    rows = [i for i, kind in enumerate(kinds) if kind == "query"]
    columns = [i for i, kind in enumerate(kinds) if kind == "mlp_in"]
    assert by_kind.squared_norms.loc["query", "mlp_in"] == pytest.approx(
        found.squared_norms.to_numpy()[np.ix_(rows, columns)].sum()
    )
    assert by_kind.samples.sum() == pytest.approx(found.samples.sum())
    assert by_kind.off_diagonal_share.value < found.off_diagonal_share.value
    assert next(b for b in by_kind.blocks if b.name == "query").numel == 64


def test_frame_has_a_row_for_each_pair():
    it = problem("gpt2")
    blocks = partition(it.model)
    found = blockspec.coupling(it.objective(), blocks, 2)
    table = found.to_frame().set_index(["row", "column"])
    assert len(table) == len(blocks) ** 2
    first, second = blocks[4].name, blocks[0].name
    assert table.loc[(first, second), "norm"] == found.norms.loc[first, second]
    assert table.loc[(first, second), "row_kind"] == "query"
    assert table.loc[(first, second), "column_kind"] == "embedding"


def test_progress_counts_products():
    objective, blocks = coupled(matrix_with_decay(sum(SIZES)), SIZES)
    seen = []
    blockspec.coupling(
        objective, blocks, 3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 9) for i in range(1, 10)]


def test_overlapping_blocks_are_refused():
    it = problem("gpt2")
    with pytest.raises(ValueError, match="overlap"):
        blockspec.coupling(it.objective(), [*partition(it.model), *partition(it.model, "model")])
