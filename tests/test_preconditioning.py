"""Products with P^(-1/2) H P^(-1/2), against dense matrices."""

import numpy as np
import pytest
import scipy.linalg
import torch
from preconditioned import (
    DIAGONAL,
    LR,
    adam,
    batch,
    corrected,
    momenta,
    muon_and_adamw,
    net,
    objective,
    step,
    trained,
)
from problems import PROBLEMS
from torch import nn
from torch.func import functional_call, hessian

import blockspec
from blockspec import Block, Objective, Preconditioner, partition
from blockspec.model.blocks import Piece
from blockspec.products.curvature import Products
from blockspec.products.preconditioning import scalings
from blockspec.products.preconditioning.operator import Preconditioned, in_own_basis
from blockspec.products.preconditioning.scalings import along


def dense_hessian(model, number=0):
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])

    x, y = batch(number)

    def function(point):
        parts = point.split([p.numel() for p in named.values()])
        tensors = {n: x.view_as(p) for (n, p), x in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, tensors, (x,)), y)

    return hessian(function)(flat).detach().numpy()


def by_elements(name, model, optimizer, moved):
    """(P, P) P^-1 from the step itself, entry by entry."""
    m = momenta(name, model, optimizer)
    return np.diag(torch.cat([(-moved[n] / LR / m[n]).reshape(-1) for n in moved]).numpy())


def of_muon(model, optimizers, moved):
    blocks = []
    for parameter in model.parameters():
        if parameter.ndim == 2:
            momentum = optimizers[0].state[parameter]["momentum_buffer"].numpy()
            rows, columns = momentum.shape
            short = momentum @ momentum.T if rows <= columns else momentum.T @ momentum
            root = scipy.linalg.sqrtm(scipy.linalg.pinvh(short)).real
            eyes = (root, np.eye(columns)) if rows <= columns else (np.eye(rows), root)
            blocks.append(np.kron(*eyes))
        else:
            state = optimizers[1].state[parameter]
            square = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
            blocks.append(np.diag(1 / (square.sqrt() + 1e-8).numpy()))
    return scipy.linalg.block_diag(*blocks)


def preconditioned(inverse, matrix):
    root = scipy.linalg.sqrtm(inverse).real
    return root @ matrix @ root


def assert_operator_is(expected, model, p, by):
    """Every block, and every pair of them, against the dense matrix."""
    blocks = partition(model, by)
    operator = Preconditioned(Products(objective(model), guarded=False), p)
    operator.check(blocks)
    ends = np.cumsum([0] + [block.numel for block in blocks])
    scale = np.abs(expected).max()
    for j, block in enumerate(blocks):
        units = torch.eye(block.numel, dtype=torch.float64)
        columns = operator.columns([(block, unit) for unit in units], blocks)
        swept = torch.stack(operator.sweep([(block, unit) for unit in units]))
        at = slice(ends[j], ends[j + 1])
        np.testing.assert_allclose(swept, expected[at, at], atol=1e-10 * scale)
        for i in range(len(blocks)):
            part = torch.stack([column[i] for column in columns]).T
            np.testing.assert_allclose(
                part, expected[ends[i] : ends[i + 1], at], atol=1e-10 * scale
            )


@pytest.mark.parametrize("by", ["model", "tensor"])
@pytest.mark.parametrize("name", [name for name in DIAGONAL if name != "SGD"])
def test_products_are_those_of_the_dense_matrix(name, by):
    model, optimizer, moved = trained(DIAGONAL[name][0])
    expected = preconditioned(by_elements(name, model, optimizer, moved), dense_hessian(model))
    p = Preconditioner.from_optimizer(optimizer, model)
    assert_operator_is(expected, model, p, by)


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_products_with_muons_matrices_are_those_of_the_dense_matrix(by):
    model, optimizers, moved = trained(muon_and_adamw)
    expected = preconditioned(of_muon(model, optimizers, moved), dense_hessian(model))
    assert_operator_is(expected, model, Preconditioner.from_optimizer(optimizers, model), by)


def entries(p, model):
    """(P, P) a diagonal P^-1."""
    ones = {n: torch.ones_like(q, requires_grad=False) for n, q in model.named_parameters()}
    return np.diag(torch.cat([x.reshape(-1) for x in p.apply(ones).values()]).numpy())


def test_neurons_may_be_cut_from_a_diagonal_and_rows_from_a_matrix_on_the_other_side():
    model, optimizers, moved = trained(muon_and_adamw)
    p = Preconditioner.from_optimizer(optimizers, model)
    whole = preconditioned(of_muon(model, optimizers, moved), dense_hessian(model))
    operator = Preconditioned(Products(objective(model), guarded=False), p)
    long = Block("rows", "other", None, 8, (Piece("0.weight", 0, slice(1, 3)),))
    operator.check([long])  # (6, 4): the matrix acts on the columns, and rows are left whole
    units = torch.eye(8, dtype=torch.float64)
    found = torch.stack(operator.sweep([(long, unit) for unit in units])).numpy()
    np.testing.assert_allclose(found, whole[4:12, 4:12], atol=1e-10 * np.abs(whole).max())
    columns = Block("columns", "other", None, 12, (Piece("0.weight", 1, slice(0, 2)),))
    with pytest.raises(ValueError, match=r"'columns' cuts '0.weight' where Muon \+ AdamW mixes"):
        operator.check([columns])


def test_any_cut_of_a_diagonal_is_the_cut_of_the_matrix():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    inverse = entries(p, model)
    whole = preconditioned(inverse, dense_hessian(model))
    piece = Piece("0.weight", 1, (0, 3))
    block = Block("some", "other", None, 12, (piece,))
    operator = Preconditioned(Products(objective(model), guarded=False), p)
    found = torch.stack(operator.sweep([(block, u) for u in torch.eye(12, dtype=torch.float64)]))
    places = [4 * row + column for row in range(6) for column in (0, 3)]
    np.testing.assert_allclose(found, whole[np.ix_(places, places)], atol=1e-10)


def test_settings_and_steps_may_differ_between_groups():
    def groups(model):
        first, second = list(model.parameters())[:2], list(model.parameters())[2:]
        return torch.optim.Adam(
            [{"params": first, "eps": 1e-2, "betas": (0.5, 0.7)}, {"params": second, "eps": 0.3}],
            LR,
        )

    model, optimizer, moved = trained(groups)
    found = Preconditioner.from_optimizer(optimizer, model)
    for group in optimizer.param_groups:
        for name, p in model.named_parameters():
            if any(p is q for q in group["params"]):
                m = corrected(optimizer.state[p], group)
                torch.testing.assert_close(-LR * found.apply({name: m})[name], moved[name])


def test_with_p_equal_to_a_diagonal_hessian_all_eigenvalues_are_one():
    values = torch.linspace(0.5, 300, 40, dtype=torch.float64)
    operator = blockspec.FunctionOperator(lambda v: values * v, 40)
    p = Preconditioner.diagonal({"matrix": values})
    spectrum = blockspec.estimate_spectra(
        None, operator.block(), 2, 10, curvature=operator, precondition=p
    )["matrix"]
    np.testing.assert_allclose(spectrum.nodes[spectrum.weights > 0], 1.0, atol=1e-12)


class Quadratic(nn.Module):
    """loss = sum h theta^2 / 2."""

    def __init__(self, curvatures):
        super().__init__()
        self.theta = nn.Parameter(torch.ones_like(curvatures))
        self.register_buffer("curvatures", curvatures)


def quadratic_loss(model, batch):
    return (model.curvatures * model.theta.square()).sum() / 2, 1


def test_adams_curvature_of_a_quadratic_is_known_in_closed_form():
    """After one step v = (1 - b2) g^2, so that P = |g| + eps with g = h at theta = 1."""
    h = torch.tensor([0.1, 1.0, 7.0, 40.0], dtype=torch.float64)
    model, eps = Quadratic(h), 0.5
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=eps)
    quadratic_loss(model, None)[0].backward()
    optimizer.step()
    p = Preconditioner.from_optimizer(optimizer, model)
    it = Objective(model, [torch.zeros(1)], quadratic_loss)
    spectrum = blockspec.estimate_spectra(it, partition(model, "model"), 1, 4, precondition=p)[
        "model"
    ]
    np.testing.assert_allclose(np.sort(spectrum.nodes[0]), np.sort(h / (h + eps)), rtol=1e-10)


def test_the_toolbox_measures_the_preconditioned_matrix():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    it, blocks = objective(model), partition(model, "tensor")
    inverse = entries(p, model)
    matrix = preconditioned(inverse, dense_hessian(model))
    whole = partition(model, "model")[0]
    np.testing.assert_allclose(blockspec.dense(it, whole, precondition=p), matrix, atol=1e-10)
    pairs = blockspec.top_eigenpairs(it, whole, 2, tolerance=1e-9, precondition=p)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(pairs.values, sorted(values, key=abs)[::-1][:2], rtol=1e-9)
    traces = blockspec.trace(it, blocks, num_probes=200, precondition=p)
    ends = np.cumsum([0] + [block.numel for block in blocks])
    for block, start, stop in zip(blocks, ends, ends[1:], strict=False):
        found = traces[block.name]
        expected = np.trace(matrix[start:stop, start:stop])
        assert abs(found.value - expected) <= 5 * (found.stderr or 0) + 1e-9
    found = blockspec.coupling(it, blocks, num_probes=4, precondition=p)
    assert found.curvature == "preconditioned hessian (Adam)"
    sizes = blockspec.squared_norms(it, blocks, num_probes=50, precondition=p)
    assert set(sizes) == {block.name for block in blocks}


def test_a_direction_is_one_of_the_preconditioned_coordinates():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    it, blocks = objective(model), partition(model, "tensor")
    generator = torch.Generator().manual_seed(2)
    d = {
        n: 1e-4 * torch.randn(q.shape, generator=generator, dtype=torch.float64)
        for n, q in model.named_parameters()
    }
    flat = torch.cat([x.reshape(-1) for x in d.values()]).numpy()
    seen = preconditioned(entries(p, model), dense_hessian(model))
    found = blockspec.directional(it, blocks, d, precondition=p)
    assert found.bend.value == pytest.approx(flat @ seen @ flat, rel=1e-9)
    assert found.predicted.value == pytest.approx(found.measured.value, rel=1e-4)
    moved = p.apply(d, 0.5)  # the same move, in the parameters' own coordinates
    plain = blockspec.directional(it, blocks, moved)
    np.testing.assert_allclose(found.curvature, plain.curvature, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose(found.gradient, plain.gradient, rtol=1e-9)


def test_a_layer_at_a_time_gives_the_same():
    it = PROBLEMS["gpt2"]()  # a model of its own: it is stepped
    optimizer = torch.optim.AdamW(it.model.parameters(), LR)
    for p in it.model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p)
    optimizer.step()
    p = Preconditioner.from_optimizer(optimizer, it.model)
    blocks = partition(it.model, include="*h.0*c_attn.weight*")
    one, other = (
        blockspec.estimate_spectra(
            it.objective(), blocks, 1, 4, precondition=p, products=way, check=False
        )
        for way in ("whole", "layerwise")
    )
    for name in one:
        np.testing.assert_allclose(one[name].nodes, other[name].nodes, rtol=1e-8, atol=1e-12)


def test_a_tracker_sees_the_optimizer_as_it_is_at_each_step():
    model, optimizer, _ = trained(adam)
    it, block = objective(model), partition(model, "model")[0]
    p = Preconditioner.from_optimizer(optimizer, model, follow=True)
    follow = blockspec.track(it, [block], k=1, which="largest", precondition=p)
    for number in range(10, 14):
        step(model, [optimizer], number)
        found = follow.measure(number)["track/preconditioned hessian (Adam)/model/1"]
        now = Preconditioner.from_optimizer(optimizer, model)
        pairs = blockspec.top_eigenpairs(it, block, 1, "largest", precondition=now, tolerance=1e-8)
        assert found == pytest.approx(pairs.values[0], rel=0.02)


def test_as_many_products_are_made_as_without():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    costs = [
        blockspec.estimate_spectra(
            objective(model), partition(model, "tensor"), 2, 5, check=False, **more
        ).cost
        for more in ({}, {"precondition": p})
    ]
    assert costs[0].products == costs[1].products
    assert costs[0].gradients == costs[1].gradients


@pytest.mark.slow
def test_what_the_inner_operator_can_do_stays_within_reach():
    from blockspec.products.calibration import Calibrated

    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    inner = Products(objective(model))
    outer = Preconditioned(inner, p)
    assert isinstance(outer, blockspec.Operator)
    assert isinstance(outer, Calibrated)
    outer.micro_batch = 3
    assert inner.micro_batch == 3
    plain = Preconditioned(blockspec.FunctionOperator(lambda v: v, 4), p)
    assert isinstance(plain, blockspec.Operator)
    assert not isinstance(plain, Calibrated)
    spectra = blockspec.estimate_spectra(
        objective(model), partition(model), 2, 4, precondition=p, memory="2GiB"
    )
    assert len(spectra) == 4


def hand_made(shampoo):
    """A state of Shampoo or SOAP as their packages keep it, without the package."""
    model = net()
    generator = torch.Generator().manual_seed(1)
    states, expected = {}, []
    for number, p in enumerate(model.parameters()):
        roots = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in p.shape]
        roots = [r @ r.T + torch.eye(len(r)) for r in roots]
        if shampoo:
            states[number] = {f"inv_pre_cond_{i}": r for i, r in enumerate(roots)}
            inverse = roots[0].numpy()
            for r in roots[1:]:
                inverse = np.kron(inverse, r.numpy())
        else:
            bases = [torch.linalg.qr(r)[0] for r in roots] if p.ndim == 2 else [[]]
            square = torch.rand(p.shape, generator=generator, dtype=torch.float64)
            states[number] = {"exp_avg_sq": square, "Q": bases, "GG": roots}
            turn = np.kron(*bases) if p.ndim == 2 else np.eye(p.numel())
            values = np.sqrt(1 - 0.95**3) / (square.sqrt() + 1e-3).numpy().reshape(-1)
            inverse = turn @ np.diag(values) @ turn.T
        expected.append(inverse)
    group = (
        {"matrix_eps": 1e-6}
        if shampoo
        else {
            "normalize_gradient": False,
            "correct_bias": True,
            "betas": (0.95, 0.95),
            "eps": 1e-3,
            "step": 4,
            "merge_dims": False,
        }
    )
    return (
        model,
        {"state": states, "param_groups": [group | {"params": list(states)}]},
        scipy.linalg.block_diag(*expected),
    )


@pytest.mark.parametrize("shampoo", [True, False])
def test_products_with_two_sided_matrices_are_those_of_the_dense_matrix(shampoo):
    model, state, inverse = hand_made(shampoo)
    p = Preconditioner.from_state(state, model)
    assert p.name == ("Shampoo" if shampoo else "SOAP")
    assert_operator_is(preconditioned(inverse, dense_hessian(model)), model, p, "tensor")
    with pytest.raises(ValueError, match="is a matrix that acts on the whole"):
        Preconditioned(Products(objective(model)), p).check(
            [Block("row", "other", None, 4, (Piece("0.weight", 0, slice(0, 1)),))]
        )


@pytest.mark.parametrize("by", ["tensor", "model"])
def test_spectra_are_made_in_soaps_own_basis_and_are_the_same_numbers(by):
    """An orthogonal matrix around both sides, and start vectors that are turned too."""
    model, state, _ = hand_made(shampoo=False)
    p = Preconditioner.from_state(state, model)
    natural = Preconditioned(Products(objective(model)), p)
    for block in partition(model, by):
        function = blockspec.FunctionOperator(
            lambda v, block=block: natural.sweep([(block, v)])[0], block.numel
        )
        there = function.block(name=block.name)
        (expected,) = blockspec.estimate_spectra(None, there, 2, 3, curvature=function).values()
        (found,) = blockspec.estimate_spectra(
            objective(model), block, 2, 3, precondition=p, check=False
        ).values()
        np.testing.assert_allclose(found.nodes, expected.nodes, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-9)


def test_in_its_own_basis_soap_takes_half_the_products_with_small_matrices(monkeypatch):
    model, state, _ = hand_made(shampoo=False)
    natural = Preconditioned(Products(objective(model)), Preconditioner.from_state(state, model))
    turns = []
    monkeypatch.setattr(scalings, "along", lambda *given: turns.append(1) or along(*given))
    (whole,) = partition(model, "model")
    sides = sum(2 for parameter in model.parameters() if parameter.ndim == 2)
    for operator, times in ((natural, 4), (in_own_basis(natural), 2)):
        turns.clear()
        operator.sweep([(whole, torch.ones(whole.numel).double())])
        assert len(turns) == times * sides
