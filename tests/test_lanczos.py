"""Lanczos on dense matrices: identities, breakdown, orthogonality."""

import numpy as np
import pytest
import torch

from blockspec.numerics.lanczos import Lanczos, tridiagonalize
from blockspec.numerics.quadrature import quadrature


def symmetric(size, *, seed, decay=0.0):
    """A random symmetric matrix, its eigenvalues falling as i^-decay with random signs."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    values = values * torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    return q @ torch.diag(values) @ q.T, values, q


def starts(probes, size, *, seed):
    return torch.randn(
        probes, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def krylov_moments(matrix, start, count):
    """v' A^k v for k < count, by repeated products."""
    v = start / start.norm()
    moments, w = [], v
    for _ in range(count):
        moments.append(float(v @ w))
        w = matrix @ w
    return np.array(moments)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [1, 2, 7, 12])
def test_moments_agree_up_to_twice_the_steps_and_no_further(seed, num_steps):
    matrix, _, _ = symmetric(80, seed=seed)
    v = starts(3, 80, seed=seed)
    for start, tridiagonal in zip(
        v, tridiagonalize(lambda V: V @ matrix, v, num_steps), strict=True
    ):
        nodes, weights, _ = quadrature(tridiagonal)
        moments = np.array([(weights * nodes**k).sum() for k in range(2 * num_steps + 1)])
        truth = krylov_moments(matrix, start, 2 * num_steps + 1)
        sizes = krylov_moments(_absolute(matrix), start, 2 * num_steps + 1)
        assert np.all(np.abs(moments - truth)[:-1] <= 1e-9 * sizes[:-1])
        assert abs(moments - truth)[-1] > 1e-9 * sizes[-1]


def _absolute(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.abs()) @ vectors.T


@pytest.mark.parametrize("seed", range(8))
def test_a_probe_in_an_invariant_subspace_ends_alone_with_right_nodes(seed):
    matrix, values, vectors = symmetric(60, seed=seed)
    v = starts(3, 60, seed=seed)
    v[1] = vectors[:, [4, 17, 33]] @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first, second, third = tridiagonalize(lambda V: V @ matrix, v, 20)
    assert [t.breakdown for t in (first, second, third)] == [False, True, False]
    assert [len(t.alphas) for t in (first, second, third)] == [20, 3, 20]
    nodes, weights, _ = quadrature(second)
    np.testing.assert_allclose(nodes, np.sort(values[[4, 17, 33]].numpy()), rtol=1e-10)
    assert weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_breakdown_is_relative_to_the_scale_of_the_matrix(factor):
    matrix, values, vectors = symmetric(40, seed=0)
    v = (vectors[:, :5].sum(1))[None]
    (tridiagonal,) = tridiagonalize(lambda V: V @ matrix * factor, v, 20)
    assert len(tridiagonal.alphas) == 5
    np.testing.assert_allclose(
        quadrature(tridiagonal)[0], np.sort(values[:5].numpy()) * factor, rtol=1e-9
    )


def test_every_converged_eigenvalue_appears_once_with_reorthogonalisation_and_copies_appear_without():
    values = torch.linspace(-0.1, 0.1, 300, dtype=torch.float64)
    values[-1] = 5.0
    v = starts(1, 300, seed=0)

    def copies(reorthogonalize):
        (t,) = tridiagonalize(lambda V: V * values, v, 100, reorthogonalize=reorthogonalize)
        return int((np.abs(quadrature(t)[0] - 5.0) < 1e-6).sum()), t

    kept, tridiagonal = copies(True)
    assert kept == 1
    assert tridiagonal.orthogonality < 1e-13
    lost, tridiagonal = copies(False)
    assert lost > 1
    assert tridiagonal.orthogonality is None


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_an_eigenvalue_lies_within_the_residual_of_each_ritz_value(reorthogonalize):
    matrix, values, _ = symmetric(100, seed=3, decay=1.0)
    for tridiagonal in tridiagonalize(
        lambda V: V @ matrix, starts(2, 100, seed=1), 15, reorthogonalize=reorthogonalize
    ):
        nodes, _, residuals = quadrature(tridiagonal)
        distance = np.abs(nodes[:, None] - values.numpy()).min(1)
        assert np.all(distance <= residuals + 1e-12)
        assert (
            np.sort(residuals)[-1] > 1e-3
        )  # most are not converged after 15 steps: the bound says so


def test_a_zero_matrix_has_one_node_at_zero():
    (tridiagonal,) = tridiagonalize(torch.zeros_like, starts(1, 10, seed=0), 5)
    nodes, weights, _ = quadrature(tridiagonal)
    assert (nodes.tolist(), weights.tolist()) == ([0.0], [1.0])


def test_steps_end_at_the_dimension():
    matrix, values, _ = symmetric(6, seed=5)
    (tridiagonal,) = tridiagonalize(lambda V: V @ matrix, starts(1, 6, seed=2), 50)
    np.testing.assert_allclose(quadrature(tridiagonal)[0], np.sort(values.numpy()), rtol=1e-9)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_start_vector_must_have_a_norm(bad):
    with pytest.raises(ValueError, match="positive finite norm"):
        Lanczos(torch.full((4,), bad), 3)
