"""Dense blocks against a dense matrix that was built another way."""

import dense_truth
import numpy as np
import pytest
from problems import problem, truth

import blockspec
from blockspec import partition


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_blocks_and_pairs_of_blocks(name, curvature):
    it = problem(name)
    matrix = truth(name, curvature)
    blocks = partition(it.model, "head")[2:5] + partition(it.model, "neuron")[-1:]
    for block in blocks:
        for other in blocks[1:3]:
            rows, columns = (
                dense_truth.positions(it.model, block),
                dense_truth.positions(it.model, other),
            )
            found = blockspec.dense(it.objective(), block, other, curvature=curvature)
            assert found.shape == (block.numel, other.numel)
            np.testing.assert_allclose(
                found, matrix[rows][:, columns], rtol=0, atol=1e-12 * float(matrix.abs().max())
            )


def test_a_block_of_its_own_is_exactly_symmetric():
    it = problem("gpt2")
    query = next(block for block in partition(it.model) if block.kind == "query")
    found = blockspec.dense(it.objective(), query)
    assert (found == found.T).all()
    index = dense_truth.positions(it.model, query)
    np.testing.assert_allclose(found, truth("gpt2")[index][:, index], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found, blockspec.dense(it.objective(), query, query))


def test_takes_the_shorter_side():
    it = problem("gpt2")
    short, long = partition(it.model, include=["*ln_1.weight", "*c_fc.weight"])
    for block, other in ((short, long), (long, short)):
        seen = []
        blockspec.dense(
            it.objective(),
            block,
            other,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(8, 8)]


def test_what_does_not_fit_is_refused_before_any_work():
    it = problem("gpt2")
    (block,) = partition(it.model, "model")
    objective = it.objective()
    objective.check = None
    with pytest.raises(
        ValueError,
        match=r"'model' x 'model' has 1,032 x 1,032 .* 16.3 MiB.*1 MiB .*hold a block of 256 "
        r"parameters",
    ):
        blockspec.dense(objective, block, limit=2**20)
