"""Extreme eigenpairs against dense truth and ARPACK: values, residuals, repeated eigenvalues,
costs.
"""

import warnings

import dense_truth
import numpy as np
import pytest
import torch
from coupled import coupled, matrix_with_decay
from problems import problem, truth
from quadratics import matrix_of, objective_of
from scipy.sparse.linalg import LinearOperator, eigsh

import blockspec
from blockspec import FunctionOperator, partition, top_eigenpairs
from blockspec.numerics.algorithms import run
from blockspec.numerics.restarts import Search
from blockspec.toolbox.eigenpairs import ORDERS

BULK = torch.linspace(-0.1, 0.1, 240, dtype=torch.float64)
SPECTRA = {
    "separated": [-2.0, -1.5, -1.0, 1.0, 1.4, 1.9],
    "clustered": [1.2 + 1e-4 * i for i in range(5)] + [1 + 1e-4 * i for i in range(5)],
    "degenerate": [2.0] * 4 + [1.0] * 4 + [-1.5] * 2,
    "indefinite, both ends equal": [1.0, 1.0, -1.0, -1.0],
    "bulk only": [],
}


def search(matrix, k, which, *, seed=0, tolerance=1e-3, basis=None, max_products=3000):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda number: torch.randn(len(matrix), generator=generator, dtype=matrix.dtype)  # noqa: E731
    it = Search(
        draw,
        k,
        ORDERS[which],
        tolerance=tolerance,
        basis=basis or max(2 * k + 1, 20),
        max_products=max_products,
    )
    return run(it.run(), lambda rows: rows @ matrix), it


def wanted(values, k, which):
    order = ORDERS[which]
    return sorted((float(order(v)) for v in np.asarray(values)), reverse=True)[:k]


def residuals(matrix, found):
    return torch.stack(
        [(matrix @ u - v * u).norm() for u, v in zip(found.vectors, found.values, strict=True)]
    ).numpy()


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_finds_the_extreme_pairs(spectrum, which, k):
    values = torch.cat([BULK, torch.tensor(SPECTRA[spectrum], dtype=torch.float64)])
    matrix = matrix_of(values)
    found, _ = search(matrix, k, which)
    norm = float(values.abs().max())
    assert found.converged.all()
    assert found.complete
    np.testing.assert_allclose(
        ORDERS[which](found.values), wanted(values, k, which), atol=1e-3 * norm
    )
    assert residuals(matrix, found).max() <= 1e-3 * norm
    assert (residuals(matrix, found) <= 1.01 * found.residuals + 1e-12).all()
    torch.testing.assert_close(
        found.vectors @ found.vectors.T, torch.eye(k, dtype=torch.float64), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("seed", range(5))
def test_all_copies_of_a_repeated_eigenvalue(seed):
    matrix = matrix_of(torch.cat([BULK, torch.full((5,), 3.0).double()]), seed=seed)
    found, _ = search(matrix, 6, "largest", seed=seed)
    np.testing.assert_allclose(found.values[:5], 3.0, atol=1e-5)
    assert found.values[5] == pytest.approx(0.1, abs=3e-3)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_residuals_meet_the_tolerance(tolerance):
    matrix = matrix_with_decay(200)
    found, _ = search(matrix, 5, "magnitude", tolerance=tolerance)
    assert found.converged.all()
    assert residuals(matrix, found).max() <= tolerance


@pytest.mark.parametrize(
    ("bulk", "top", "settings"),
    [
        (10.0, [1e3] * 4 + [1.05], {"tolerance": 1e-9}),
        (10.0, [1.2] * 3, {"tolerance": 5e-2, "basis": 8}),
    ],
)
def test_residuals_are_what_they_are(bulk, top, settings):
    """Far from convergence and close to rounding, through restarts and for copies found later."""
    matrix = matrix_of(torch.cat([bulk * BULK, torch.tensor(top, dtype=torch.float64)]))
    found, it = search(matrix, len(top) + 1, "largest", **settings)
    assert it.products > 30
    shown = found.residuals > 1e-12 * it.scale
    assert shown.any()
    np.testing.assert_allclose(residuals(matrix, found)[shown], found.residuals[shown], rtol=1e-4)


def test_single_precision_ends():
    matrix = matrix_with_decay(200).float()
    found, it = search(matrix, 5, "magnitude", tolerance=1e-5)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, [1, -1 / 2, 1 / 3, 1 / 4, -1 / 5], atol=1e-5)
    assert it.products < 200


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(50),
        torch.zeros(50),
        torch.cat([torch.zeros(45), torch.tensor([1.0, 2, 2, 2, 5])]),
    ],
)
def test_few_distinct_eigenvalues_take_few_products(values):
    found, it = search(matrix_of(values), 6, "magnitude")
    np.testing.assert_allclose(np.abs(found.values), wanted(values, 6, "magnitude"), atol=1e-10)
    assert found.converged.all()
    assert it.products <= 12


def test_a_small_matrix_is_done_exactly():
    matrix = matrix_with_decay(12)
    found, it = search(matrix, 12, "largest")
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-12)
    assert it.products == 12
    assert found.complete


@pytest.mark.parametrize("outlier", [1.0, 10.0, 1e4])
@pytest.mark.parametrize(("size", "k"), [(100, 50), (101, 50), (102, 50), (300, 50), (19, 9)])
def test_a_bulk_under_an_outlier_is_resolved(size, k, outlier):
    """Against a norm of 10 every vector of this bulk is an eigenvector to a thousandth."""
    draws = np.random.default_rng(size)
    values = torch.tensor([outlier, *draws.uniform(0, 0.0126, size - 1)])
    found, it = search(matrix_of(values), k, "magnitude")
    np.testing.assert_allclose(found.values, wanted(values, k, "magnitude"), rtol=2e-3)
    assert found.converged.all()
    assert found.complete
    if size <= 2 * k + 1:
        assert it.products == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_pairs_than_the_rank(dtype):
    """Eigenvalues of zero have no scale of their own; rounding is their bound."""
    values = torch.cat([torch.zeros(80), torch.tensor([1e-3, 0.5, 7.0, 100.0])])
    found, it = search(matrix_of(values).to(dtype), 8, "magnitude")
    np.testing.assert_allclose(np.abs(found.values), wanted(values, 8, "magnitude"), atol=3e-4)
    assert found.converged.all()
    assert found.complete
    assert it.products < 84


def test_takes_about_what_arpack_takes():
    """To the same residuals; ARPACK does not search for missing copies."""
    matrix = matrix_of(
        torch.cat(
            [
                0.02 * torch.randn(400, generator=torch.Generator().manual_seed(0)),
                torch.linspace(0.3, 2, 12),
            ]
        )
    )
    found, it = search(matrix, 8, "largest", tolerance=1e-4)
    counted = []
    operator = LinearOperator(
        matrix.shape, matvec=lambda v: counted.append(1) or matrix.numpy() @ v, dtype=np.float64
    )
    theirs = eigsh(
        operator, k=8, which="LA", tol=1e-4, v0=np.random.default_rng(0).normal(size=len(matrix))
    )[0]
    np.testing.assert_allclose(found.values, theirs[::-1], atol=1e-6)
    assert it.products <= 1.5 * len(counted)


def test_memory_is_bounded():
    """At most ``basis`` vectors are kept beside those that are found, however long it takes."""
    matrix = matrix_of(torch.linspace(-1, 1, 300))
    with_few, few = search(matrix, 3, "largest", basis=8)
    _, many = search(matrix, 3, "largest", basis=100)
    np.testing.assert_allclose(
        with_few.values, wanted(torch.linspace(-1, 1, 300), 3, "largest"), atol=1e-3
    )
    assert few.products > many.products


@pytest.mark.parametrize(
    ("curvature", "which"),
    [
        ("hessian", "magnitude"),
        ("hessian", "largest"),
        ("hessian", "smallest"),
        ("ggn", "largest"),
        ("fisher", "largest"),
    ],
)
def test_of_a_network(curvature, which):
    it = problem("gpt2")
    matrix = truth("gpt2", curvature)
    for block in (*partition(it.model, "model"), *partition(it.model, include="*c_fc.weight")):
        index = dense_truth.positions(it.model, block)
        part = matrix[index][:, index]
        found = blockspec.top_eigenpairs(it.objective(), block, 4, which, curvature=curvature)
        norm = float(torch.linalg.matrix_norm(part, 2))
        exact = wanted(np.linalg.eigvalsh(part), 4, which)
        np.testing.assert_allclose(ORDERS[which](found.values), exact, atol=2e-3 * norm)
        assert residuals(part, found).max() <= 1.01e-3 * norm
        assert found.converged.all()
        assert found.cost.products == found.products * len(it.batches)


def test_what_has_not_converged_is_said():
    objective, (block,) = coupled(matrix_of(torch.linspace(-1, 1, 100)), (100,))
    with pytest.warns(
        UserWarning,
        match=r"'parts.0': . of 3 eigenpairs have not converged after 12 products.*max_products",
    ):
        found = blockspec.top_eigenpairs(objective, block, 3, max_products=12)
    assert not found.converged.all()
    assert not found.complete
    assert found.products == 12
    objective, (block,) = coupled(
        matrix_of(torch.cat([BULK, torch.tensor([2.0]).double()])), (241,)
    )
    with pytest.warns(UserWarning, match="repeated eigenvalues may be missing after 10 products"):
        found = blockspec.top_eigenpairs(objective, block, max_products=10)
    assert found.converged.all()
    assert not found.complete


def test_scale_of_the_loss_does_not_matter():
    values = torch.cat([BULK, torch.tensor([1.0, 2.0]).double()])
    found = []
    for scale in (1.0, 1e-8):
        objective = objective_of({"a": matrix_of(values)}, scale=scale)
        found.append(
            blockspec.top_eigenpairs(objective, partition(objective.model, "tensor")[0], 2)
        )
    assert found[0].products == found[1].products
    np.testing.assert_allclose(found[1].values, 1e-8 * found[0].values, rtol=1e-6)


def test_same_seed_same_pairs_and_progress():
    objective, (block,) = coupled(matrix_with_decay(60), (60,))
    seen = []
    first = blockspec.top_eigenpairs(
        objective, block, 2, progress=lambda done, total: seen.append((done, total))
    )
    again = blockspec.top_eigenpairs(objective, block, 2)
    assert torch.equal(first.vectors, again.vectors)
    assert seen == [(done, None) for done in range(1, first.products + 1)]


@pytest.mark.parametrize(
    ("k", "settings", "message"),
    [
        (0, {}, "k is between 1 and the 6 parameters of block 'parts.0', got 0"),
        (7, {}, "got 7"),
        (1, {"which": "top"}, "which is one of .*got 'top'"),
        (1, {"tolerance": 1.0}, "tolerance is relative.*got 1.0"),
        (3, {"basis": 4}, r"basis is at least k \+ 2 = 5"),
    ],
)
def test_wrong_settings(k, settings, message):
    objective, (block,) = coupled(matrix_with_decay(6), (6,))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        blockspec.top_eigenpairs(objective, block, k, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rest", [1e-8, 1e-6, 1e-5, 1e-3])
def test_one_pair_above_almost_nothing_takes_few_products(rest, dtype):
    """What is left of the residual of the first pair is larger than the rest, and all there is."""
    for seed in range(4):
        values = rest * np.abs(np.random.default_rng(seed).standard_normal(1000))
        values[0] = 1.0
        v = torch.from_numpy(values).to(dtype)
        operator = FunctionOperator(lambda x, v=v: v * x, 1000, dtype=dtype)
        found = top_eigenpairs(None, operator.block(), curvature=operator, k=1, seed=seed)
        assert found.values[0] == pytest.approx(1.0, rel=1e-5)
        assert found.complete
        assert found.products <= 20


def test_a_copy_of_the_pair_above_almost_nothing_is_not_missed():
    values = 1e-6 * np.abs(np.random.default_rng(0).standard_normal(1000))
    values[[0, 7]] = 1.0
    v = torch.from_numpy(values)
    operator = FunctionOperator(lambda x: v * x, 1000)
    found = top_eigenpairs(None, operator.block(), curvature=operator, k=2)
    np.testing.assert_allclose(found.values, [1.0, 1.0], rtol=1e-5)


@pytest.mark.parametrize(("which", "sign"), [("largest", 1), ("smallest", -1)])
@pytest.mark.parametrize("size", [200, 2000])
def test_an_outlier_at_the_other_end_does_not_loosen_the_bound(which, sign, size):
    """A hundred times as large as the pair that is wanted."""
    for seed in range(3):
        values = sign * 2.5e-3 * np.random.default_rng(seed).standard_normal(size)
        values[0] = -sign
        v = torch.from_numpy(values)
        operator = FunctionOperator(lambda x, v=v: v * x, size)
        found = top_eigenpairs(None, operator.block(), curvature=operator, which=which, seed=seed)
        assert found.values[0] == pytest.approx(sign * (sign * values).max(), rel=1e-3)
        assert found.complete
        assert found.products < 150
