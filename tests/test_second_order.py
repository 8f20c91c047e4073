"""Modules with cheap second derivatives: the numbers are those of PyTorch's own, and nothing else
is computed.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from blockspec import Objective, losses, partition
from blockspec.model.second_order import cheap_modules
from blockspec.products.curvature import Products

CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3), (2, 2, 6, 5)),
    "stride that leaves pixels": (
        nn.Conv2d(2, 3, (2, 3), stride=(3, 2), padding=(1, 0)),
        (2, 2, 6, 8),
    ),
    "dilated, without bias": (nn.Conv2d(2, 3, 2, padding=1, dilation=2, bias=False), (1, 2, 5, 4)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 3, 3)),
    "depthwise in one dimension": (nn.Conv1d(3, 3, 3, padding=2, groups=3), (2, 3, 5)),
    "three dimensions": (nn.Conv3d(1, 2, 2, stride=2), (2, 1, 3, 4, 3)),
    "padded by reflection": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 4)),
    "padded to the same size": (nn.Conv2d(2, 2, 3, padding="same"), (2, 2, 4, 4)),
    "without a batch": (nn.Conv2d(2, 2, 3), (2, 4, 4)),
}
BATCH_NORMS = {
    "of images": (nn.BatchNorm2d(3), (2, 3, 4, 3)),
    "of sequences": (nn.BatchNorm1d(3), (2, 3, 5)),
    "of vectors": (nn.BatchNorm1d(3), (4, 3)),
    "of volumes": (nn.BatchNorm3d(2), (2, 2, 2, 2, 2)),
    "without parameters": (nn.BatchNorm2d(3, affine=False), (2, 3, 4, 3)),
    "of the batch": (nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 3)),
    "in train mode": (nn.BatchNorm2d(3), (2, 3, 4, 3)),
}
ACTIVATIONS = {
    "GELU": nn.GELU(),
    "GELU by tanh": nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU(),
    "softplus": nn.Softplus(),
    **{
        f"{name} of Hugging Face": ACT2FN[name]
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "silu")
    },
}
CASES = {
    **{f"convolution, {k}": v for k, v in CONVOLUTIONS.items()},
    **{f"batch norm {k}": v for k, v in BATCH_NORMS.items()},
}


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def derivatives(module, x):
    """Value, gradient, and second derivatives with respect to input and parameters, of a nonlinear
    function of the output.
    """
    points = [x, *module.parameters()]

    def curved(*_):
        return (
            module(x).sin()
            * torch.linspace(1, 2, module(x).numel(), dtype=x.dtype).view_as(module(x))
        ).sum()

    value = curved()
    gradient = flat(torch.autograd.grad(value, points, create_graph=True))
    rows = [
        torch.autograd.grad(g, points, retain_graph=True, materialize_grads=True) for g in gradient
    ]
    return value, gradient, torch.stack([flat(row) for row in rows])


@pytest.mark.parametrize("name", CASES)
def test_values_and_both_derivatives_are_those_of_the_module(name):
    module, shape = CASES[name]
    module = module.double().train(name.endswith("train mode"))
    with torch.no_grad():
        for i, tensor in enumerate(
            [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
        ):
            tensor.copy_(
                torch.linspace(0.4 + i, 1.7, tensor.numel()).view_as(tensor).cos().abs() + 0.1
            )
    x = torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    expected = derivatives(module, x)
    with cheap_modules(module):
        found = derivatives(module, x)
    assert "forward" not in vars(module)
    assert float(expected[2].abs().max()) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_both_derivatives_are_those_of_the_module(name):
    module = ACTIVATIONS[name]
    x = torch.linspace(-12, 12, 97, dtype=torch.float64, requires_grad=True)
    expected = jet(module, x)
    with cheap_modules(module):
        found = jet(module, x)
        single = jet(module, x.detach().float().requires_grad_())
    for ours, theirs, rounded in zip(found, expected, single, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rounded.double(), theirs, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derivatives_in_half_precision_are_rounded_once(dtype):
    x = torch.tensor([-300.0, -3.0, 0.7, 300.0])
    module = ACTIVATIONS["gelu_new of Hugging Face"]
    expected = jet(module, x.to(dtype).double().requires_grad_())
    with cheap_modules(module):
        found = jet(module, x.to(dtype).requires_grad_())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize(
    "module",
    [nn.GELU(), nn.Conv1d(2, 2, 2), nn.BatchNorm1d(2).eval()],
    ids=lambda module: type(module).__name__,
)
def test_the_input_may_be_named(module):
    x = torch.randn(2, 2, 3)
    expected = module(x)
    with cheap_modules(module):
        torch.testing.assert_close(module(input=x.requires_grad_()), expected)


def jet(module, x):
    """A function of every entry, and its first and second derivative; the backward passes get a
    gradient that is not 1.
    """
    value = module(x)
    (first,) = torch.autograd.grad(value, x, torch.full_like(x, 3), create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.full_like(x, 2))
    return value.detach(), first.detach() / 3, second / 6


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_what_needs_no_gradient_gets_none(frozen):
    module, x = (
        nn.Conv2d(2, 3, 3).double(),
        torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True),
    )
    points = {"weight": module.weight, "bias": module.bias, "input": x}
    points.pop(frozen).requires_grad_(False)
    expected = torch.autograd.grad(module(x).square().sum(), list(points.values()))
    with cheap_modules(module):
        found = torch.autograd.grad(module(x).square().sum(), list(points.values()))
    torch.testing.assert_close(found, expected)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layer", "convolutions"), [(0, 9), (3, 3)])
def test_a_product_convolves_up_and_down_once(layer, convolutions):
    """Tangents of the layers above, gradients of them, and three at the layer: its tangent, and
    gradients of weight and input.
    """
    torch.manual_seed(0)
    stack = [
        module
        for _ in range(4)
        for module in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh())
    ]
    model = nn.Sequential(*stack, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    x, y = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    objective = Objective(model, [(x, y)], losses.classification)
    (block,) = partition(model, "tensor", f"{3 * layer}.weight")
    vector = torch.ones(block.numel, dtype=torch.float64)
    counts = []
    for repeats in (1, 2):
        with Counted() as counted:
            Products(objective).sweep([(block, vector)] * repeats)
        counts.append(counted.calls["convolution"] + counted.calls["convolution_backward"])
    assert counts[1] - counts[0] <= convolutions


def test_a_convolutions_input_that_was_changed_is_an_error():
    module, x = nn.Conv2d(1, 1, 2), torch.randn(1, 1, 3, 3, requires_grad=True)
    with cheap_modules(module):
        inside = x * 1
        y = module(inside)
        inside += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_autocast_keeps_its_dtypes():
    module, x = nn.Conv2d(1, 2, 2), torch.randn(1, 1, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        with cheap_modules(module):
            found = module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
