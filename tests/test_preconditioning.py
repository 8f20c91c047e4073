"""P of real optimizers against the steps that they take, and P^(-1/2) H P^(-1/2) against dense
matrices that were built another way.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import PROBLEMS
from torch import nn
from torch.func import functional_call, hessian

import blockspec
from blockspec import Block, Objective, Preconditioner, losses, partition
from blockspec.model.blocks import Piece
from blockspec.optim import AdaHessian
from blockspec.products.curvature import Products
from blockspec.products.preconditioning import scalings
from blockspec.products.preconditioning.operator import Preconditioned, in_own_basis
from blockspec.products.preconditioning.scalings import Factor, Kronecker, Rotated, along, cuts

LR = 0.01


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(number=0, size=12):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def loss_of(model, number=0):
    x, y = batch(number)
    return nn.functional.cross_entropy(model(x), y)


def step(model, optimizers, number):
    for one in optimizers:
        one.zero_grad()
    loss = loss_of(model, number)
    if isinstance(optimizers[0], AdaHessian):
        optimizers[0].backward(loss)
    else:
        loss.backward()
    for one in optimizers:
        one.step()


def trained(make, steps=3):
    """A model after some steps, its optimizer, and the last step that each parameter took."""
    model = net()
    optimizer = make(model)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for number in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizers, number)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return model, optimizer, moved


def corrected(state, group):
    """Adam's momentum, with its bias corrected."""
    return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))


def nadam(state, group):
    """torch's NAdam adds the gradient and the momentum, each with a factor of its own."""
    at, beta, decay = float(state["step"]), group["betas"][0], group["momentum_decay"]
    now, then = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (at, at + 1))
    product = float(state["mu_product"])
    gradient = (state["exp_avg"] - beta * state["before"]) / (1 - beta)
    return gradient * (1 - now) / (1 - product) + state["exp_avg"] * then / (1 - product * then)


def gradient(state, group):
    return state["gradient"]


DIAGONAL = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), LR), gradient),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), LR, eps=1e-3), corrected),
    "Adam amsgrad": (lambda m: torch.optim.Adam(m.parameters(), LR, amsgrad=True), None),
    "AdamW": (lambda m: torch.optim.AdamW(m.parameters(), LR, weight_decay=0.0), corrected),
    "NAdam": (lambda m: torch.optim.NAdam(m.parameters(), LR), nadam),
    "Adamax": (lambda m: torch.optim.Adamax(m.parameters(), LR, eps=1e-3), corrected),
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters(), LR, eps=1e-2), gradient),
    "RMSprop centered": (
        lambda m: torch.optim.RMSprop(m.parameters(), LR, centered=True),
        gradient,
    ),
    "Adagrad": (lambda m: torch.optim.Adagrad(m.parameters(), LR, eps=1e-3), gradient),
    "AdaHessian": (lambda m: AdaHessian(m.parameters(), LR, hessian_power=0.7), corrected),
}


def momenta(name, model, optimizer):
    """What P^-1 is multiplied with in the last step, from its gradients and state alone."""
    of = DIAGONAL[name][1] or corrected
    again = trained(DIAGONAL[name][0], steps=2)[1]
    found = {}
    for group, earlier in zip(optimizer.param_groups, again.param_groups, strict=True):
        for (n, p), q in zip(model.named_parameters(), earlier["params"], strict=True):
            state = dict(optimizer.state[p]) | {"gradient": p.grad}
            state["before"] = again.state[q].get("exp_avg")
            found[n] = of(state, group)
    return found


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_last_step_is_what_p_makes_of_the_momentum(name):
    model, optimizer, moved = trained(DIAGONAL[name][0])
    found = Preconditioner.from_optimizer(optimizer, model).apply(momenta(name, model, optimizer))
    for n, step_taken in moved.items():
        torch.testing.assert_close(-LR * found[n], step_taken, rtol=1e-9, atol=1e-14)


def test_adafactors_step_is_p_times_the_gradient_but_for_one_factor_a_tensor():
    model, optimizer, moved = trained(lambda m: torch.optim.Adafactor(m.parameters(), LR))
    found = Preconditioner.from_optimizer(optimizer, model).apply(
        {n: p.grad for n, p in model.named_parameters()}
    )
    for n, taken in moved.items():
        ratio = taken / found[n]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-9, atol=0)


def test_transformers_adafactor_likewise():
    from transformers.optimization import Adafactor

    def make(m):
        return Adafactor(m.parameters(), LR, scale_parameter=False, relative_step=False)

    model, optimizer, moved = trained(make)
    found = Preconditioner.from_optimizer(optimizer, model).apply(
        {n: p.grad for n, p in model.named_parameters()}
    )
    for n, taken in moved.items():
        ratio = taken / found[n]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)


def muon_and_adamw(model, **settings):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, LR, **settings),
        torch.optim.AdamW(vectors, LR, weight_decay=0.0),
    ]


def test_muon_makes_the_momentum_orthogonal():
    model, optimizers, moved = trained(lambda m: muon_and_adamw(m, nesterov=False))
    p = Preconditioner.from_optimizer(optimizers, model)
    assert p.name == "Muon + AdamW"
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            momentum = optimizers[0].state[parameter]["momentum_buffer"]
            found = p.apply({name: momentum})[name]
            u, sizes, v = np.linalg.svd(momentum.numpy(), full_matrices=False)
            there = sizes > 1e-12 * sizes[0]  # a softmax has no gradient along (1, 1, 1)
            assert there.sum() == (2 if len(momentum) == 3 else 4)
            np.testing.assert_allclose(found, u[:, there] @ v[there], atol=1e-9)
            taken = -moved[name].flatten()  # by five Newton-Schulz steps in bfloat16
            assert float(taken @ found.flatten() / taken.norm() / found.norm()) > 0.85


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


def objective(model):
    return Objective(model, [batch()], losses.classification)


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


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), LR, **settings)


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


SAVED = {
    "Adam": adam,
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), LR),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), LR, momentum=0.9),
    "NAdam": DIAGONAL["NAdam"][0],
    "Adamax": DIAGONAL["Adamax"][0],
    "RMSprop": DIAGONAL["RMSprop"][0],
    "Adagrad": DIAGONAL["Adagrad"][0],
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), LR),
    "AdaHessian": DIAGONAL["AdaHessian"][0],
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], LR),
}


def without_vectors(name, model):
    """Muon steps matrices alone."""
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2 or name != "Muon")
    return model


@pytest.mark.parametrize("name", SAVED)
def test_spectra_by_a_saved_state_equal_those_by_the_live_optimizer(name, tmp_path):
    model, optimizer, _ = trained(lambda m: SAVED[name](without_vectors(name, m)))
    live = Preconditioner.from_optimizer(optimizer, model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = Preconditioner.from_state(tmp_path, model)
    assert (saved.name, saved.digest) == (live.name, live.digest)
    blocks = partition(model, "tensor")
    one, other = (
        blockspec.estimate_spectra(objective(model), blocks, 2, 5, precondition=p)
        for p in (live, str(tmp_path / "optimizer.pt"))
    )
    for block in blocks:
        np.testing.assert_array_equal(one[block.name].nodes, other[block.name].nodes)
        assert one[block.name].curvature == f"preconditioned hessian ({name})"


def test_a_snapshot_stays_what_it_was():
    model, optimizer, _ = trained(adam)
    p = Preconditioner.from_optimizer(optimizer, model)
    before = p.scalings["0.weight"].values.clone()
    step(model, [optimizer], 7)
    torch.testing.assert_close(p.scalings["0.weight"].values, before, rtol=0, atol=0)
    assert Preconditioner.from_optimizer(optimizer, model).digest != p.digest


def test_nanogpts_checkpoint_and_the_trainers_order_name_parameters_rightly():
    def decayed(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return torch.optim.AdamW(
            [
                {"params": matrices},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
            ],
            LR,
        )

    model, optimizer, _ = trained(decayed)
    live = Preconditioner.from_optimizer(optimizer, model)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 3}
    assert Preconditioner.from_state(checkpoint, model).digest == live.digest


def test_the_trainers_order_is_known_where_it_is_not_that_of_matrices_first():
    """It decays the weights of batch norms too, which are vectors."""
    from transformers import Trainer

    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    decayed = Trainer.get_decay_parameter_names(None, model)
    named = dict(model.named_parameters())
    assert "1.weight" in decayed
    groups = [
        {"params": [p for n, p in named.items() if n in decayed]},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LR)
    step(model, [optimizer], 0)
    live = Preconditioner.from_optimizer(optimizer, model)
    assert Preconditioner.from_state(optimizer.state_dict(), model).digest == live.digest


def test_saved_states_of_two_optimizers_are_joined():
    model, optimizers, _ = trained(muon_and_adamw)
    named = dict(model.named_parameters())
    matrices = [n for n, p in named.items() if p.ndim == 2]
    vectors = [n for n, p in named.items() if p.ndim < 2]
    one, other = (
        Preconditioner.from_state(optimizer.state_dict(), model, names=names)
        for optimizer, names in zip(optimizers, (matrices, vectors), strict=True)
    )
    live = Preconditioner.from_optimizer(optimizers, model)
    assert str(one | other) == str(live)


def test_matrices_of_kernels_and_pieces_of_experts():
    """Sides of four axes against an einsum; an expert is whole where its own axis is not mixed."""
    generator = torch.Generator().manual_seed(4)
    shape = (3, 2, 4, 5)
    roots = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in shape]
    roots = [r @ r.T for r in roots]
    factors = []
    for root in roots:
        values, basis = torch.linalg.eigh(root)
        factors.append(Factor(basis, values))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.einsum("ai,bj,ck,dl,ijkl->abcd", *roots, x)
    torch.testing.assert_close(Kronecker(tuple(factors), shape)(x), expected)
    bases = tuple(f.basis for f in factors)
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    turned = torch.einsum("ia,jb,kc,ld,ijkl->abcd", *bases, x) * values
    back = torch.einsum("ai,bj,ck,dl,ijkl->abcd", *bases, turned)
    torch.testing.assert_close(Rotated(bases, values)(x), back)
    expert = Piece("w", None, None, 1)
    assert cuts(Kronecker(tuple(factors), shape), expert)
    inner = Kronecker((None, *factors[1:]), shape)
    assert not cuts(inner, expert)
    torch.testing.assert_close(inner.cut(expert)(x[1]), inner(x)[1])
    row = Piece("w", 0, slice(0, 1), 1)  # axis 1 of the parameter, which is mixed
    assert cuts(inner, row)


def test_two_orders_that_fit_are_told_and_not_chosen_between():
    """(2, 2), (2,), (2,), (2, 2) as one group, or as two groups of two."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    names = [name for name, _ in model.named_parameters()]
    state = {"exp_avg": torch.zeros(4), "exp_avg_sq": torch.ones(4), "step": torch.tensor(1.0)}
    group = {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False}
    vectors = [n for n, p in model.named_parameters() if p.ndim == 1]
    matrix = {k: v.expand(4, 4) if v.ndim else v for k, v in state.items()}
    saved = {
        "state": {i: (matrix if i < 2 else state) for i in range(6)},
        "param_groups": [group | {"params": [0, 1]}, group | {"params": [2, 3, 4, 5]}],
    }
    found = Preconditioner.from_state(saved, model)  # only one rule has the matrices first
    assert set(found.scalings) == set(names)
    saved["param_groups"] = [group | {"params": [0, 1, 2]}, group | {"params": [3, 4, 5]}]
    with pytest.raises(
        ValueError, match=r"no order of the model's names fits .*\[3, 3\] parameters.*names="
    ):
        Preconditioner.from_state(saved, model)
    order = [n for n in names if n not in vectors] + vectors
    assert Preconditioner.from_state(saved, model, names=order).name == "Adam"


def test_names_that_torch_kept_count_more_than_the_order():
    def backwards(model):
        return torch.optim.Adam(reversed(list(model.named_parameters())), LR)

    model, optimizer, _ = trained(backwards)
    live = Preconditioner.from_optimizer(optimizer, model)
    assert Preconditioner.from_state(optimizer.state_dict(), model).digest == live.digest


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: Preconditioner.from_optimizer(adam(m), m),
            r"no state of 4 of its 4 parameters \(0.weight",
        ),
        (
            lambda m: Preconditioner.from_optimizer(adam(net()), m),
            "steps none of the parameters of this Sequential",
        ),
        (
            lambda m: Preconditioner.from_optimizer(torch.optim.LBFGS(m.parameters()), m),
            "torch.optim.lbfgs.LBFGS .* is not known",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": torch.zeros(6, 4)}),
            "'0.weight' cannot be inverted",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": -torch.ones(6, 4)}),
            "not above 0 and finite",
        ),
        (
            lambda m: Preconditioner.diagonal({"0.weight": torch.full((6, 4), torch.inf)}),
            "not above 0 and finite",
        ),
        (lambda m: Preconditioner.from_state({"model": {}}, m), "holds no optimizer's state"),
        (
            lambda m: Preconditioner.from_state("nowhere.pt", m),
            "nowhere.pt is no optimizer's state",
        ),
        (
            lambda m: Preconditioner.from_state(
                {"state": {}, "param_groups": [{"params": [0]}]}, m
            ),
            "does not tell which optimizer",
        ),
        (
            lambda m: Preconditioner.from_state(adam(m).state_dict(), m, optimizer="Lion"),
            "'Lion' is not one that can be read",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(net())


@pytest.mark.parametrize("entry", [torch.inf, torch.nan, -1.0, 0.0])
def test_a_state_without_an_inverse_is_refused_before_products(entry):
    """An infinite second moment has P^-1 = 0, which is finite and no inverse either."""
    model, optimizer, _ = trained(lambda m: torch.optim.Adam(m.parameters(), LR, eps=0))
    optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = entry
    with pytest.raises(ValueError, match=r"P of '0.weight' cannot be inverted"):
        Preconditioner.from_optimizer(optimizer, model)


def test_an_inverse_that_the_parameters_dtype_cannot_hold_is_refused():
    """Numbers are read in float64, and given in the parameter's dtype."""
    model = net().float()
    optimizer = torch.optim.Adam(model.parameters(), LR, eps=1e-40)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    optimizer.state[model[0].weight]["exp_avg_sq"].zero_()
    with pytest.raises(ValueError, match="too small for the parameter's dtype"):
        Preconditioner.from_optimizer(optimizer, model)
    with pytest.raises(ValueError, match="too small for the parameter's dtype"):
        Preconditioner.diagonal({"0.weight": torch.full((6, 4), 1e-40)})


def test_a_block_that_the_optimizer_does_not_step_is_refused_and_others_are_not():
    model = net()
    optimizer = torch.optim.Adam(list(model.parameters())[:2], LR)
    step(model, [optimizer], 0)
    p = Preconditioner.from_optimizer(optimizer, model)
    blockspec.estimate_spectra(
        objective(model), partition(model, include="0.*"), 1, 2, precondition=p
    )
    with pytest.raises(ValueError, match=r"'2.weight', which Adam does not step"):
        blockspec.estimate_spectra(objective(model), partition(model), 1, 2, precondition=p)


def test_a_file_that_could_execute_something_is_not_loaded(tmp_path):
    torch.save({"state": {0: objective}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="which loading could execute"):
        Preconditioner.from_state(tmp_path / "optimizer.pt", net())


def test_a_state_of_another_preconditioner_is_not_gone_on_from(tmp_path):
    model, optimizer, _ = trained(adam)
    one = Preconditioner.from_optimizer(optimizer, model)
    step(model, [optimizer], 5)
    for p, q in zip(model.parameters(), trained(adam)[0].parameters(), strict=True):
        p.data.copy_(q.data)
    other = Preconditioner.from_optimizer(optimizer, model)
    blocks = partition(model)

    def measure(p):
        return blockspec.estimate_spectra(
            objective(model), blocks, 2, 5, precondition=p, state=tmp_path, keep_state=True
        )

    measure(one)
    with pytest.raises(ValueError, match="precondition is"):
        measure(other)


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


def nvidias(model, steps=3):
    """The state of SOAP as emerging-optimizers 0.3 keeps it: a basis for each side, by its name."""
    generator = torch.Generator().manual_seed(3)
    states = {}
    for number, p in enumerate(model.parameters()):
        left, right = (torch.randn(n, n, generator=generator).double() for n in p.shape)
        square = torch.rand(p.shape, generator=generator).double()
        bases = {"Q_L": torch.linalg.qr(left)[0], "Q_R": torch.linalg.qr(right)[0]}
        factors = {"L": left @ left.T, "R": right @ right.T}
        states[number] = {"step": steps, "exp_avg": 0 * square, "exp_avg_sq": square}
        states[number] |= factors | bases
    group = {"betas": (0.9, 0.95), "eps": 1e-3, "shampoo_beta": 0.95, "lr": LR}
    return {"state": states, "param_groups": [group | {"params": list(states)}]}


def test_nvidias_soap_is_read_in_the_bases_that_it_keeps_by_name():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).double()
    state = nvidias(model)
    p = Preconditioner.from_state(state, model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        kept = state["state"][number]
        turn = np.kron(kept["Q_L"], kept["Q_R"])
        root = (kept["exp_avg_sq"] / (1 - 0.95**3)).sqrt().numpy().reshape(-1) + 1e-3
        tensor = torch.randn_like(parameter)
        expected = turn @ np.diag(1 / root) @ turn.T @ tensor.detach().numpy().reshape(-1)
        found = p.apply({name: tensor})[name].detach().numpy().reshape(-1)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    for kept in state["state"].values():  # without bases it is not taken for Adam
        del kept["Q_L"], kept["Q_R"]
    with pytest.raises(ValueError, match="cannot be read"):
        Preconditioner.from_state(state, model, optimizer="emerging_optimizers.SOAP")


@pytest.mark.peers
def test_the_steps_of_nvidias_soap_are_what_p_makes_of_the_momentum():
    """Matrices alone, in float32: it takes no others."""
    cls = pytest.importorskip("emerging_optimizers.soap").SOAP
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    optimizer = cls(model.parameters(), lr=LR, weight_decay=0.0)
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(12, 4)).square().mean().backward()
        optimizer.step()
    p = Preconditioner.from_optimizer(optimizer, model)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        m = state["Q_L"] @ (state["exp_avg"] / (1 - 0.9**4)) @ state["Q_R"].T
        moved = parameter.detach() - before[name]
        torch.testing.assert_close(-LR * p.apply({name: m})[name], moved, rtol=1e-3, atol=1e-6)
    name = "emerging_optimizers.SOAP"
    assert (
        Preconditioner.from_state(optimizer.state_dict(), model, optimizer=name).digest == p.digest
    )


@pytest.mark.peers
@pytest.mark.parametrize(
    "name",
    [
        "pytorch_optimizer.Shampoo",
        "pytorch_optimizer.SOAP",
        "torch_optimizer.Shampoo",
        "pytorch_optimizer.AdamMini",
        "heavyball.SOAP",
    ],
)
def test_the_steps_of_other_packages_are_what_p_makes_of_the_momentum(name):
    package, _, title = name.partition(".")
    cls = getattr(pytest.importorskip(package), title)
    more = {
        "pytorch_optimizer.SOAP": {"weight_decay": 0.0, "precondition_frequency": 100},
        "heavyball.SOAP": {
            "weight_decay": 0.0,
            "precondition_frequency": 100,
            "storage_dtype": "float64",
            "compile_step": False,
        },
        "pytorch_optimizer.AdamMini": {
            "weight_decay": 0.0,
            "num_embeds": 4,
            "num_heads": 1,
            "num_query_groups": 1,
        },
    }.get(name, {})

    def make(model):
        return cls(model if title == "AdamMini" else model.parameters(), lr=LR, **more)

    model, optimizer, moved = trained(make, steps=4)
    p = Preconditioner.from_optimizer(optimizer, model)
    for n, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        group = next(g for g in optimizer.param_groups if any(parameter is q for q in g["params"]))
        if title == "Shampoo":
            m = parameter.grad
        elif package == "heavyball":
            turned = next(v for k, v in state[0].items() if "exp_avg_2" in k)[0]
            bases = next(v for k, v in state[0].items() if "soap_Q" in k)
            m = turned if bases[0] is None else bases[0][0] @ turned @ bases[1][0].T
        else:
            steps = int(state.get("step", group["step"])) - (title == "SOAP")
            momentum = state["exp_avg"] if title == "SOAP" else state["m"].view_as(parameter)
            m = momentum.double() / (1 - group["betas"][0] ** steps)
        tolerance = 1e-5 if title == "AdamMini" or package == "heavyball" else 1e-8
        torch.testing.assert_close(-LR * p.apply({n: m})[n], moved[n], rtol=tolerance, atol=1e-9)
    assert (
        Preconditioner.from_state(optimizer.state_dict(), model, optimizer=name).digest == p.digest
    )
