"""Where functions of ours step aside, they are PyTorch's own: third derivatives, transforms,
changes in place.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, problem
from test_second_order import ACTIVATIONS, BATCH_NORMS, CONVOLUTIONS
from torch import nn
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

from blockspec import Objective, losses, partition
from blockspec.model import activations, heads, normalisation, second_order
from blockspec.model.differentiability import nodes
from blockspec.model.kernels import twice_differentiable
from blockspec.model.plain import plain_functions
from blockspec.model.second_order import cheap_modules, cross_entropies
from blockspec.products.curvature import Products

NORMS = {
    "layer norm": (nn.LayerNorm(3), (4, 3)),
    "layer norm of two dimensions": (nn.LayerNorm((2, 3), eps=0.1), (2, 2, 3)),
    "layer norm without a bias": (nn.LayerNorm(3, bias=False), (2, 2, 3)),
    "layer norm without parameters": (nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "instance norm": (nn.InstanceNorm2d(2, affine=True), (2, 2, 3, 2)),
    "instance norm without parameters": (nn.InstanceNorm1d(2), (2, 2, 4)),
}
MODULES = {
    **NORMS,
    **{name: (module, (2, 3)) for name, module in ACTIVATIONS.items()},
    **{f"convolution, {name}": case for name, case in CONVOLUTIONS.items()},
    **{f"batch norm {name}": case for name, case in BATCH_NORMS.items()},
}


def case(name):
    """A module with parameters that are not special, and its input and parameters as points."""
    module, shape = MODULES[name]
    module = module.double().train(name.endswith("train mode"))
    generator = torch.Generator().manual_seed(0)
    points = [
        torch.rand(size, generator=generator, dtype=torch.float64).add_(0.3).requires_grad_()
        for size in (shape, *(p.shape for p in module.parameters()))
    ]
    names = [n for n, _ in module.named_parameters()]

    def function(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), x)

    return module, function, points


def slope(function):
    """The gradient of a nonlinear function of the function's values, by every point."""

    def of(*points):
        value = function(*points)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
        total = (value.sin() * weights).sum()
        return torch.autograd.grad(total, points, create_graph=True, materialize_grads=True)

    return of


@pytest.mark.parametrize("name", MODULES)
def test_three_orders_numerically(name):
    module, function, points = case(name)
    with cheap_modules(module), twice_differentiable(module):
        torch.autograd.gradcheck(slope(function), points, fast_mode=True)
        torch.autograd.gradgradcheck(slope(function), points, fast_mode=True, atol=1e-4)


LABELS = torch.tensor([2, 0, 2, 1])


def linear_cross_entropies(hidden, weight, bias=None):
    return heads.cross_entropies(heads.Logits(hidden, weight, bias), LABELS)


CROSS_ENTROPIES = {
    "of logits": (lambda logits: cross_entropies(logits, LABELS), [(4, 3)]),
    "of a head": (linear_cross_entropies, [(4, 2), (3, 2)]),
    "of a head with a bias": (linear_cross_entropies, [(4, 2), (3, 2), (3,)]),
}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        *((name, None) for name in CROSS_ENTROPIES),
        ("of a head", 0),
        ("of a head", 1),
        ("of a head with a bias", 1),
    ],
)
def test_three_orders_of_cross_entropies_numerically(name, frozen, monkeypatch):
    monkeypatch.setattr(heads, "CHUNK_ENTRIES", {"cpu": 1})
    monkeypatch.setattr(heads, "CHUNK_ROWS", 3)
    function, shapes = CROSS_ENTROPIES[name]
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    fixed = None if frozen is None else points.pop(frozen)

    def free(*free_points):
        given = list(free_points)
        if fixed is not None:
            given.insert(frozen, fixed)
        return function(*given)

    points = [point.requires_grad_() for point in points]
    torch.autograd.gradcheck(free, points)
    torch.autograd.gradgradcheck(free, points)
    torch.autograd.gradcheck(slope(free), points, fast_mode=True)
    torch.autograd.gradgradcheck(slope(free), points, fast_mode=True, atol=1e-4)


TRANSFORMS = {
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum()),
    "vmap": lambda f: vmap(f),
    "vmap of jacrev": lambda f: vmap(jacrev(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),)),
    "is_grads_batched": lambda f: (
        lambda x: torch.autograd.grad(
            f(x),
            x,
            torch.eye(f(x).numel(), dtype=x.dtype).view(-1, *f(x).shape),
            is_grads_batched=True,
        )
    ),
    "vectorised hessian": lambda f: (
        lambda x: torch.autograd.functional.hessian(
            lambda x: f(x).square().sum(), x, vectorize=True
        )
    ),
    "forward over reverse": lambda f: (
        lambda x: torch.autograd.functional.hvp(lambda x: f(x).sin().sum(), x, x.cos())
    ),
}


class Elementary(nn.LayerNorm):
    """Of primitives: PyTorch's own is wrong to the third order, and to the second under vmap."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / scale * self.weight + self.bias


def stack(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), norm(4), nn.Conv1d(2, 1, 2), nn.GELU()
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_modules(name):
    model, truth = stack(nn.LayerNorm), stack(Elementary)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    transform = TRANSFORMS[name]

    def alone(model):
        return (lambda x: model(x[None])[0]) if "vmap" in name else model

    expected = transform(alone(truth))(x)
    with cheap_modules(model), twice_differentiable(model):
        torch.testing.assert_close(transform(alone(model))(x), expected)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if "vmap" not in name])
@pytest.mark.parametrize("of", CROSS_ENTROPIES)
def test_transforms_of_cross_entropies(of, name):
    function, shapes = CROSS_ENTROPIES[of]
    x, *fixed = [torch.randn(s, dtype=torch.float64) for s in shapes]
    x.requires_grad_()
    with plain_functions():
        expected = TRANSFORMS[name](lambda x: function(x, *fixed))(x)
    torch.testing.assert_close(TRANSFORMS[name](lambda x: function(x, *fixed))(x), expected)


def used(activation, kind):
    """Functions of an activation's input, with an operation in place; the input need not be
    kept.
    """
    stages = {
        "added to": lambda x: activation(x).add_(x),
        "masked": lambda x: activation(x).masked_fill_(x > 0.3, 0),
        "set by index": lambda x: indexed(activation(x)),
        "dropped out": lambda x: F.dropout(activation(x), 0.5, training=False, inplace=True),
        "rectified": lambda x: nn.ReLU(inplace=True)(activation(x)),
        "input changed after": lambda x: changed(activation, x * 1.0),
    }
    return stages[kind]


def indexed(out):
    out[0] = 0
    return out


def changed(activation, x):
    out = activation(x)
    x.mul_(2)
    return out * x


KINDS = ["added to", "masked", "set by index", "dropped out", "rectified"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_changes_in_place_of_what_an_activation_gives(name, kind):
    """Expected: the same function of a copy, since tanh itself may not be changed in place."""
    module = ACTIVATIONS[name].double()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = orders(used(lambda x: module(x).clone(), kind), x)
    with cheap_modules(module):
        found = orders(used(module, kind), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Sigmoid()], ids=lambda m: type(m).__name__)
def test_the_input_of_a_function_that_keeps_its_value_may_be_changed(module):
    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    function = used(module, "input changed after")
    expected = orders(function, x)
    with cheap_modules(module):
        torch.testing.assert_close(orders(function, x, most=2), expected[:3])
        with pytest.raises(RuntimeError, match=r"changed in place.*replacements=False"):
            orders(function, x, most=3)


def test_logits_may_be_changed_in_place_after_their_cross_entropy():
    def function(x, cross_entropy):
        logits = x.view(4, 2) * 1.0
        terms = cross_entropy(logits, LABELS % 2)
        return terms * logits.div_(3).exp().sum(1)

    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = orders(
        lambda x: function(x, lambda z, y: F.cross_entropy(z, y, reduction="none")), x
    )
    found = orders(lambda x: function(x, cross_entropies), x, most=2)
    torch.testing.assert_close(found, expected[:3])


def test_an_activation_in_place_changes_its_input():
    module = nn.SiLU(inplace=True)

    def function(x):
        inside = x * 1.0
        return module(inside) * inside

    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = orders(lambda x: F.silu(x).square(), x)
    with cheap_modules(module):
        torch.testing.assert_close(orders(function, x), expected)


def orders(function, x, most=3):
    """Values, and the first three derivatives of a nonlinear function of them."""
    found = [function(x)]
    weights = torch.linspace(1, 2, found[0].numel(), dtype=x.dtype).view_as(found[0])
    (of,) = torch.autograd.grad((found[0].sin() * weights).sum(), x, create_graph=True)
    found.append(of)
    for _ in range(most - 1):
        create = len(found) < most
        (of,) = torch.autograd.grad((of * weights.sum()).sin().sum(), x, create_graph=create)
        found.append(of)
    return [tensor.detach() for tensor in found]


ODD = {
    "complex": (nn.Tanh(), lambda x: torch.complex(x, x.cos())),
    "complex through a convolution": (
        nn.Conv1d(1, 1, 2, dtype=torch.complex128),
        lambda x: torch.complex(x, x.cos()).view(1, 1, -1),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_numbers_that_are_not_real(name):
    module, make = ODD[name]
    x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)

    def function(x):
        value = module(make(x))
        return value.abs() if value.is_complex() else value

    expected = orders(function, x)
    with cheap_modules(module):
        torch.testing.assert_close(orders(function, x), expected)


# losses that contain gradients of the network


def physics(model, batch):
    """u_t = u_xx, as in physics-informed networks."""
    points = batch[0].clone().requires_grad_()
    u = model(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    residual = first[:, 1] - second[:, 0]
    return residual.square().sum(), len(points)


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    terms = F.cross_entropy(model(x), batch[1], reduction="none")
    (slope,) = torch.autograd.grad(terms.sum(), x, create_graph=True)
    return (terms + (slope.norm(dim=1) - 1) ** 2).sum(), len(x)


def maml(model, batch):
    parameters = dict(model.named_parameters())
    x, y = batch
    inner, _ = losses.classification(model, (x, y))
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
    outer = cross_entropies(functional_call(model, moved, x.flip(0)), y)
    return outer.sum(), len(x)


def gradient_norm(model, batch):
    total, count = losses.classification(model, batch)
    gradients = torch.autograd.grad(total, list(model.parameters()), create_graph=True)
    return total + sum(g.square().sum() for g in gradients), count


def transformed(model, batch):
    """The Jacobian of every example's outputs, by torch.func."""
    jacobians = vmap(jacrev(lambda x: model(x[None])[0]))(batch[0])
    return jacobians.square().sum() + model(batch[0]).sum(), len(batch[0])


LOSSES = [physics, penalty, maml, gradient_norm, transformed]
NETWORKS = [nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus]


def objective_of(loss, activation, norm=None, **settings):
    torch.manual_seed(0)
    norms = [] if norm is None else [norm(4)]
    model = nn.Sequential(nn.Linear(2, 4), activation(), *norms, nn.Linear(4, 3)).double()
    batch = (torch.randn(5, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0]))
    return Objective(model, [batch], loss, **settings)


def central_difference(objective, direction, step=1e-5):
    """Of gradients by plain autograd, without blockspec."""
    model, (batch,) = objective.model, objective._batches
    parameters = list(model.parameters())
    sides = []
    with plain_functions():
        for sign in (1, -1):
            shift = direction.split([p.numel() for p in parameters])
            with torch.no_grad():
                for p, d in zip(parameters, shift, strict=True):
                    p += sign * step * d.view_as(p)
            total, count = objective.loss(model, batch)
            sides.append(torch.cat([g.flatten() for g in grads(total / count, parameters)]))
            with torch.no_grad():
                for p, d in zip(parameters, shift, strict=True):
                    p -= sign * step * d.view_as(p)
    return (sides[0] - sides[1]) / (2 * step)


def grads(total, parameters):
    return torch.autograd.grad(total, parameters, materialize_grads=True, allow_unused=True)


@pytest.mark.parametrize("activation", NETWORKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_contain_gradients(loss, activation):
    objective = objective_of(loss, activation)
    (block,) = partition(objective.model, "model")
    direction = torch.linspace(-1, 1, block.numel, dtype=torch.float64)
    (product,) = Products(objective).sweep([(block, direction)])
    expected = central_difference(objective, direction)
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-7)
    plain = objective_of(loss, activation, replacements=False)
    for name, gradient in objective.gradient().items():
        torch.testing.assert_close(gradient, plain.gradient()[name])
    assert objective.value() == pytest.approx(plain.value(), rel=1e-12)
    assert math.isfinite(objective.value())


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_contain_gradients_of_norms(loss):
    objective = objective_of(loss, nn.Tanh, nn.LayerNorm)
    truth = objective_of(loss, nn.Tanh, Elementary)
    (block,) = partition(objective.model, "model")
    direction = torch.linspace(-1, 1, block.numel, dtype=torch.float64)
    (product,) = Products(objective).sweep([(block, direction)])
    torch.testing.assert_close(product, central_difference(truth, direction), rtol=1e-6, atol=1e-6)
    for name, gradient in truth.gradient().items():
        torch.testing.assert_close(objective.gradient()[name], gradient)


@pytest.mark.parametrize("loss", [losses.classification, physics, penalty, maml, gradient_norm])
def test_small_norms_are_ours_where_a_loss_takes_gradients_itself_and_nowhere_else(loss):
    objective = objective_of(loss, nn.Tanh, nn.LayerNorm)
    (batch,) = objective._batches
    with objective.prepared():
        for _ in range(2):
            total, _ = objective.loss_sum(batch)
            names = [node.name() for node in nodes([total])]
            assert any("NativeLayerNorm" in name for name in names) == (
                loss is losses.classification
            )


def test_large_norms_are_ours(monkeypatch):
    monkeypatch.setattr(normalisation, "SMALL", 5 * 4 - 1)
    objective = objective_of(losses.classification, nn.Tanh, nn.LayerNorm)
    with objective.prepared():
        total, _ = objective.loss_sum(objective._batches[0])
        assert "_NormalisedBackward" in [node.name() for node in nodes([total])]


def test_norms_are_no_longer_watched_when_the_loss_is_there():
    objective = objective_of(losses.classification, nn.Tanh, nn.LayerNorm)
    with objective.prepared():
        total, _ = objective.loss_sum(objective._batches[0])
        parameters = list(objective.model.parameters())
        torch.autograd.grad(total, parameters)
        again, _ = objective.loss_sum(objective._batches[0])
    assert any("NativeLayerNorm" in node.name() for node in nodes([again]))


# with replacements and without

BOTH_WAYS = [
    *((name, "hessian") for name in PROBLEMS),
    *(("gpt2", curvature) for curvature in ("ggn", "fisher", "residual")),
    *(("resnet", curvature) for curvature in ("ggn", "fisher", "residual")),
]


@pytest.mark.parametrize(("name", "curvature"), BOTH_WAYS)
def test_numbers_agree_with_replacements_and_without(name, curvature):
    it = problem(name)
    blocks = [*partition(it.model, "model"), *partition(it.model, "tensor")[::3]]
    generator = torch.Generator().manual_seed(0)
    requests = [
        (block, torch.randn(block.numel, generator=generator, dtype=torch.float64))
        for block in blocks
    ]
    ours, theirs = it.objective(), it.objective(replacements=False)
    found = Products(ours, curvature).sweep(requests)
    with Recorded() as recorded:
        expected = Products(theirs, curvature).sweep(requests)
    assert not recorded.ours
    for block, one, other in zip(blocks, found, expected, strict=True):
        atol = 1e-12 + 1e-11 * float(other.norm())
        torch.testing.assert_close(one, other, rtol=1e-9, atol=atol, msg=block.name)
    assert ours.value() == pytest.approx(theirs.value(), rel=1e-12)


class Recorded:
    """Which of our autograd functions are used in between."""

    def __enter__(self):
        self.ours, self.patch = [], pytest.MonkeyPatch()
        for function in (
            activations._Elementwise,
            second_order._CrossEntropy,
            second_order._ConvolutionOfInput,
            heads._LinearCrossEntropy,
        ):
            self.patch.setattr(function, "apply", lambda *args: self.ours.append(args))
        return self

    def __exit__(self, *error):
        self.patch.undo()
