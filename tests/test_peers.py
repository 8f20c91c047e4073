"""The same numbers out of other packages, where they can be installed: pip install -e '.[peers]'
with torch pinned.
"""

import dense_truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import timm_vit
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockspec import Objective, estimate_spectra, partition
from blockspec.products.curvature import Products

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),
]

CURVATURES = ("hessian", "ggn", "fisher")


@pytest.fixture(scope="module")
def it():
    """A ViT in eval mode, and batches of equal size, which the others need to give a mean over
    examples.
    """
    problem = timm_vit()
    problem.model.eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(4)
    problem.batches[:] = [(x[:2], y[:2]), (x[2:], y[2:])]
    return problem


def eigenthings_operator(it, curvature, param_filter=None, batches=None):
    peer = pytest.importorskip("hessian_eigenthings")
    batches = it.batches if batches is None else batches
    if curvature == "hessian":
        return peer.HessianOperator(
            it.model, batches, peer.supervised_loss(F.cross_entropy), param_filter=param_filter
        )
    if curvature == "ggn":
        of_output = peer.supervised_loss_of_output(F.cross_entropy)
        return peer.GGNOperator(
            it.model, batches, peer.supervised_forward, of_output, param_filter=param_filter
        )
    of_sample = peer.supervised_per_sample_loss(F.cross_entropy)
    return peer.EmpiricalFisherOperator(it.model, batches, of_sample, param_filter=param_filter)


def curvlinops_operator(it, curvature):
    peer = pytest.importorskip("curvlinops")
    kind = {
        "hessian": "HessianLinearOperator",
        "ggn": "GGNLinearOperator",
        "fisher": "EFLinearOperator",
    }[curvature]
    parameters = list(it.model.parameters())
    return getattr(peer, kind)(it.model, torch.nn.CrossEntropyLoss(), parameters, it.batches)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("peer", ["eigenthings", "curvlinops"])
def test_products_with_the_whole_matrix(it, peer, curvature):
    (block,) = partition(it.model, "model")
    vector = torch.randn(
        block.numel, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    if peer == "eigenthings":
        with sdpa_kernel(SDPBackend.MATH):
            theirs = eigenthings_operator(it, curvature).matvec(vector)
    else:  # it uses torch.func.vmap, which differentiates layer norms wrongly in torch 2.13
        with dense_truth.of_primitives(it.model):
            theirs = curvlinops_operator(it, curvature) @ vector
    (ours,) = Products(it.objective(), curvature).sweep([(block, vector)])
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-12 * float(ours.abs().max()))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_with_a_block(it, curvature):
    peer = pytest.importorskip("hessian_eigenthings")
    for block in partition(it.model, "tensor", include=["*qkv.weight", "*fc1.bias", "head.weight"]):
        vector = torch.randn(
            block.numel, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        )
        operator = eigenthings_operator(it, curvature, peer.match_names(block.name))
        with sdpa_kernel(SDPBackend.MATH):
            theirs = operator.matvec(vector).detach()
        (ours,) = Products(it.objective(), curvature).sweep([(block, vector)])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(ours.abs().max()))


def test_spectra_of_the_whole_matrix(it):
    """Each with probes of its own: extreme eigenvalues agree, and densities up to the noise of
    probes.
    """
    peer = pytest.importorskip("hessian_eigenthings")
    with sdpa_kernel(SDPBackend.MATH):
        operator = eigenthings_operator(it, "hessian")
        theirs = peer.spectral_density(
            operator, num_runs=4, lanczos_steps=40, num_grid_points=2000, seed=0
        )
    ours = estimate_spectra(
        it.objective(), partition(it.model, "model"), num_probes=4, num_steps=40
    )["model"]
    nodes, grid = theirs.raw_eigenvalues, theirs.grid.numpy()
    assert ours.largest.value == pytest.approx(float(nodes.max()), rel=1e-8)
    assert ours.smallest.value == pytest.approx(float(nodes.min()), rel=1e-8)
    difference = np.abs(ours.density(grid, width=theirs.sigma) - theirs.density.numpy())
    assert np.sum(difference) * (grid[1] - grid[0]) < 0.06  # 2 would be no overlap


def test_the_largest_eigenvalues_of_a_block(it):
    peer = pytest.importorskip("hessian_eigenthings")
    (block,) = partition(it.model, "tensor", include="*qkv.weight")
    with sdpa_kernel(SDPBackend.MATH):
        operator = eigenthings_operator(it, "hessian", peer.match_names(block.name))
        theirs = peer.lanczos(operator, k=2, which="LA", max_iter=60, tol=1e-9, seed=0)
    ours = estimate_spectra(it.objective(), block, num_probes=1, num_steps=60)[block.name]
    assert ours.largest.value == pytest.approx(float(theirs.eigenvalues.max()), rel=1e-7)


def test_unequal_batches_are_weighted_by_their_terms_here_and_not_there(it):
    """The mean over all examples is one number; a mean of batch means depends on how they were
    cut.
    """
    (block,) = partition(it.model, "model")
    x, y = (torch.cat(parts) for parts in zip(*it.batches, strict=True))
    cuts = {"even": it.batches, "uneven": [(x[:1], y[:1]), (x[1:], y[1:])]}
    vector = torch.randn(
        block.numel, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    ours, theirs = {}, {}
    for name, batches in cuts.items():
        (ours[name],) = Products(Objective(it.model, batches, it.loss)).sweep([(block, vector)])
        with sdpa_kernel(SDPBackend.MATH):
            theirs[name] = (
                eigenthings_operator(it, "hessian", batches=batches).matvec(vector).detach()
            )
    torch.testing.assert_close(
        ours["uneven"], ours["even"], rtol=0, atol=1e-12 * float(ours["even"].abs().max())
    )
    assert (theirs["uneven"] - theirs["even"]).norm() > 0.05 * theirs["even"].norm()
