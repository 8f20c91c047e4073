"""Landscapes: losses at the right places, directions, parameters put back."""

import numpy as np
import pytest
import torch
from coupled import coupled, matrix_with_decay
from problems import problem, resnet

import blockspec
from blockspec import Objective, partition
from blockspec.model.blocks import gather, scatter
from blockspec.toolbox.landscapes import filter_normalised
from blockspec.toolbox.moves import shifted

SIZES = (3, 4)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, before):
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]), name


def test_losses_of_a_quadratic_in_a_plane():
    matrix = matrix_with_decay(7)
    objective, _ = coupled(matrix, SIZES)
    block = partition(objective.model, "model")[0]
    with torch.no_grad():
        for p in objective.model.parameters():
            p.add_(1.0)
    u, v = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = blockspec.landscape(objective, block, [u, v], radius=(2.0, 0.5), points=5)
    for i, a in enumerate(np.linspace(-2, 2, 5)):
        for j, b in enumerate(np.linspace(-0.5, 0.5, 5)):
            w = torch.ones(7, dtype=torch.float64) + a * u + b * v
            assert found.losses[i, j] == pytest.approx(float(w @ matrix @ w) / 2, abs=1e-12)


def test_a_direction_in_a_block_moves_that_block_alone():
    matrix = matrix_with_decay(7)
    objective, blocks = coupled(matrix, SIZES)
    u = torch.arange(1.0, 5.0, dtype=torch.float64)
    losses = blockspec.landscape(objective, blocks[1], [u], points=3).losses
    np.testing.assert_allclose(
        losses,
        [float(u @ matrix[3:, 3:] @ u) / 2, 0, float(u @ matrix[3:, 3:] @ u) / 2],
        atol=1e-12,
    )


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
def test_curvature_along_eigenvectors_is_their_eigenvalue(curvature):
    it = problem("gpt2")
    block = partition(it.model, "model")[0]
    found = blockspec.landscape(
        it.objective(), block, dimensions=1, points=3, radius=1e-3, curvature=curvature
    )
    bend = (found.losses[0] - 2 * found.losses[1] + found.losses[2]) / 1e-6
    pairs = blockspec.top_eigenpairs(it.objective(), block, 1, curvature=curvature)
    assert found.names == (f"eigenvector of {pairs.values[0]:.3g}",)
    hessian = (
        blockspec.products.curvature.Products(it.objective()).sweep([(block, pairs.vectors[0])])[0]
        @ pairs.vectors[0]
    )
    assert bend == pytest.approx(float(hessian), abs=1e-3)


def test_random_directions_have_the_norms_of_neurons():
    it = problem("gpt2")
    (whole,) = partition(it.model, "model")
    vector = filter_normalised(it.objective(), whole, seed=1)
    other = filter_normalised(it.objective(), whole, seed=1, number=1)
    tensors, start = {}, 0
    for name in whole.parameters:
        size = it.objective().parameters()[name].numel()
        tensors[name] = vector[start : start + size].view_as(it.objective().parameters()[name])
        start += size
    weights = {name: p.detach() for name, p in it.objective().parameters().items()}
    for neuron in partition(it.model, "neuron"):
        expected = 0.0 if neuron.kind in ("norm", "bias") else float(gather(neuron, weights).norm())
        assert float(gather(neuron, tensors).norm()) == pytest.approx(expected, rel=1e-6), (
            neuron.name
        )
    assert abs(float(vector @ other)) < 0.3 * float(vector @ vector)


@pytest.mark.parametrize("name", ["resnet", "unknown"])
def test_random_directions_have_the_norm_of_every_filter(name):
    """Li et al.: |d| = |w| for each filter; whole convolutions had ratios from 0.4 to 777."""
    if name == "resnet":
        objective = resnet().objective()  # not the shared one: its weights are changed
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Conv1d(2, 3, 3), torch.nn.Bilinear(4, 4, 2)
            ).double()
            model.table = torch.nn.Parameter(torch.randn(5, 3).double())
        objective = Objective(model, [torch.zeros(1)], lambda m, b: (m.table.sum(), 1))
    (whole,) = partition(objective.model, "model")
    with torch.no_grad():
        for p in objective.parameters().values():
            p.mul_(torch.logspace(0, 3, len(p)).view(-1, *[1] * (p.dim() - 1)))
    objective.check = lambda: None
    direction = scatter(whole, filter_normalised(objective, whole, seed=1), objective.parameters())
    filters = 0
    for parameter, weight in objective.parameters().items():
        if weight.dim() > 1:
            norms = [t.detach().flatten(1).norm(dim=1) for t in (direction[parameter], weight)]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=1e-12)
            filters += len(weight)
    assert filters > 9


def test_random_plane_of_a_block_and_its_table():
    it = problem("gpt2")
    block = next(b for b in partition(it.model) if b.kind == "mlp_in")
    seen = []
    found = blockspec.landscape(
        it.objective(),
        block,
        "random",
        points=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.losses[1, 1] == pytest.approx(it.objective().value(), abs=1e-14)
    assert len(np.unique(found.losses)) == 9
    table = found.to_frame()
    assert list(table.columns) == ["random direction 1", "random direction 2", "loss"]
    assert table["loss"].to_numpy().tolist() == found.losses.ravel().tolist()
    assert table["random direction 2"].tolist() == [-1, 0, 1] * 3
    assert seen == [(i, 9) for i in range(1, 10)]


def test_parameters_come_back_bit_by_bit():
    it = problem("gpt2")
    before = parameters(it.model)
    flags = [module.training for module in it.model.modules()]
    blockspec.landscape(
        it.objective(), partition(it.model, "model")[0], "random", dimensions=1, points=4
    )
    assert_same(it.model, before)
    assert flags == [module.training for module in it.model.modules()]


def test_parameters_come_back_after_an_exception():
    objective, _ = coupled(matrix_with_decay(7), SIZES)
    with torch.no_grad():
        objective.model.parts[0].fill_(0.1)
    before = parameters(objective.model)
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third call")
        return model(), 1

    fragile = Objective(objective.model, [torch.zeros(1)], loss)
    with pytest.raises(RuntimeError, match="the third call"):
        blockspec.landscape(
            fragile, partition(objective.model, "model")[0], [torch.ones(7).double()]
        )
    assert_same(objective.model, before)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blockspec.landscape(
            objective,
            partition(objective.model, "model")[0],
            [torch.ones(7).double()],
            progress=stop,
        )
    assert_same(objective.model, before)


def test_moves_do_not_add_up():
    objective, blocks = coupled(matrix_with_decay(7), SIZES)
    parameters = objective.parameters()
    change = scatter(blocks[0], torch.ones(3).double(), parameters)
    for step in (1.0, 2.0):
        with shifted(parameters, change, step):
            moved = objective.model.parts[0].tolist()
    assert moved == [2, 2, 2]


@pytest.mark.parametrize(
    ("directions", "settings", "message"),
    [
        ("gradient", {}, "directions is one of .*got 'gradient'"),
        ("random", {"dimensions": 3}, "dimensions is 1 or 2, got 3"),
        ("random", {"points": 1}, "points is at least 2, got 1"),
        ("random", {"radius": -1.0}, "radius is a positive number"),
        ("random", {"radius": (1.0,)}, "one for each of the 2 directions"),
        ([torch.ones(5)], {}, r"shape \(7,\), got \(5,\)"),
        ([], {}, "one or two directions are possible, got 0"),
        ([torch.zeros(7)], {}, r"has the norm 0\.0"),
    ],
)
def test_wrong_settings(directions, settings, message):
    objective, _ = coupled(matrix_with_decay(7), SIZES)
    with pytest.raises(ValueError, match=message):
        blockspec.landscape(
            objective, partition(objective.model, "model")[0], directions, **settings
        )
