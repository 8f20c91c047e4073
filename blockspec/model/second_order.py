"""Functions whose second derivatives are cheap: activations and cross entropy that keep what double backward needs, and
convolutions and batch norms whose double backward computes what is asked for alone.

PyTorch differentiates a backward pass as a composition of elementary operations, again in every product. At fixed parameters
those factors never change: here they are computed once, in the shared pass. Values and derivatives are those of the original
functions up to rounding. Activations and cross entropy have no third derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Jet = tuple[Tensor, Tensor, Tensor]
"""Values of a function, and of its first and second derivative."""


def _elementwise(
    module: nn.Module, jet: Callable[[Tensor], Jet] | None = None
) -> Callable[[Tensor], Tensor]:
    function = module.forward

    def forward(input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return function(input)
        if jet is None:
            return _Elementwise.apply(input, *_jet_by_autograd(function, input))
        wide = torch.promote_types(
            input.dtype, torch.float32
        )  # x^2 overflows in float16, and is coarse in bfloat16
        return _Elementwise.apply(
            input, *(part.to(input.dtype) for part in jet(input.detach().to(wide)))
        )

    return forward


def _jet_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor) -> Jet:
    point = x.detach().requires_grad_()
    value = function(point)
    (first,) = torch.autograd.grad(value.sum(), point, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), point)
    return value.detach(), first.detach(), second


def _gelu(x: Tensor) -> Jet:
    """x times the normal distribution function."""
    square = x * x
    density = square.mul(-0.5).exp_().div_(math.sqrt(2 * math.pi))
    share = torch.special.ndtr(x)
    return x * share, share.addcmul_(x, density), square.neg_().add_(2).mul_(density)


def _tanh_gelu(x: Tensor) -> Jet:
    """x (1 + tanh(v / 2)) / 2, v = a x + b x^3: tanh is a logistic function."""
    a = math.sqrt(8 / math.pi)
    b = 0.044715 * a
    square = x * x
    return _gated(x, square.mul(b).add_(a).mul_(x), square.mul(3 * b).add_(a), square.mul_(6 * b))


def _silu(x: Tensor) -> Jet:
    return _gated(x, x, 1.0, 0.0)


def _quick_gelu(x: Tensor) -> Jet:
    return _gated(x, 1.702 * x, 1.702, 0.0)


def _gated(x: Tensor, v: Tensor, slope: Tensor | float, bend: Tensor | float) -> Jet:
    """x logistic(v), with slope = v' and bend = x v''. Both tails of the logistic function are computed, neither as 1 minus the
    other: in float32 second derivatives are 20 times as precise."""
    gate, rest = v.sigmoid(), v.neg().sigmoid_()
    bell = gate * rest
    rise = bell * slope
    lean = x * rise
    value, first = x * gate, gate + lean
    second = lean.mul_(rest.sub_(gate)).mul_(slope).add_(rise, alpha=2).add_(bell.mul_(bend))
    return value, first, second


class _Elementwise(torch.autograd.Function):
    """f(x), given the values of f, f' and f''."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _ElementwiseBackward.apply(gradient, *ctx.saved_tensors), None, None, None


class _ElementwiseBackward(torch.autograd.Function):
    """g f'(x)"""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, first, second)
        return gradient * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, first, second = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            tangent * first if wanted[0] else None,
            (tangent * gradient).mul_(second) if wanted[1] else None,
            None,
            None,
        )


def _convolution(module: Any) -> Callable[[Tensor], Tensor]:
    """PyTorch's double backward of a convolution computes the weight's part too, at the price of the rest, wanted or not.

    Autograd leaves out a function that leads to nothing wanted, but not a part of one: so input and weight have one each.
    """
    original = module.forward

    def forward(input: Tensor) -> Tensor:
        weight, bias, padding = module.weight, module.bias, module.padding
        plain = (
            module.padding_mode == "zeros"
            and not isinstance(padding, str)
            and input.dim() == weight.dim()
        )
        if not (plain and torch.is_grad_enabled()) or torch.is_autocast_enabled(input.device.type):
            return original(input)
        how = (module.stride, padding, module.dilation, module.groups)
        y = _ConvolutionOfInput.apply(input, [weight], how)
        if weight.requires_grad:
            y = y + _ConvolutionOfWeight.apply(weight, [input], how, y.shape)
        return y if bias is None else y + _by_channel(bias, y)

    return forward


class _ConvolutionOfInput(torch.autograd.Function):
    """The convolution, with a derivative by the input alone: autograd does not see a tensor that comes in a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: list[Tensor], how: tuple[Any, ...]) -> Tensor:
        (weight,) = weights
        stride, padding, dilation, groups = how
        ctx.save_for_backward(weight)
        ctx.size, ctx.how = x.shape[2:], how
        return torch.convolution(
            x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        sides = zip(
            ctx.size, gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
        unseen = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in sides
        ]  # pixels after the last window
        return (
            torch.convolution(
                gradient, weight, None, stride, padding, dilation, True, unseen, groups
            ),
            None,
            None,
        )


class _ConvolutionOfWeight(torch.autograd.Function):
    """Zeros of the convolution's shape, with its derivative by the weight alone."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, inputs: list[Tensor], how: tuple[Any, ...], shape: torch.Size
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.weight, ctx.how = weight.detach(), how
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        _, by_weight, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            ctx.weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            (False, True, False),
        )
        return by_weight, None, None, None


def _batch_norm(module: Any) -> Callable[[Tensor], Tensor]:
    """With fixed statistics it is a scale and a shift for each channel."""
    original = module.forward

    def forward(input: Tensor) -> Tensor:
        mean, variance = module.running_mean, module.running_var
        if (
            module.training
            or variance is None
            or variance.dtype != input.dtype
            or not torch.is_grad_enabled()
        ):
            return original(input)
        scale = torch.rsqrt(variance + module.eps)
        if module.affine:
            scale = scale * module.weight
        shift = -mean * scale
        if module.affine:
            shift = shift + module.bias
        return input * _by_channel(scale, input) + _by_channel(shift, input)

    return forward


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) to (C, 1, …) beside x (B, C, …)."""
    return vector.view(-1, *[1] * (x.dim() - 2))


HUGGING_FACE: dict[str, Callable[[Tensor], Jet] | None] = {
    "NewGELUActivation": _tanh_gelu,
    "GELUTanh": _tanh_gelu,
    "PytorchGELUTanh": _tanh_gelu,
    "GELUActivation": _gelu,
    "SiLUActivation": _silu,
    "QuickGELUActivation": _quick_gelu,
    "FastGELUActivation": None,
}
"""By the names of their classes, which differ from version to version: nothing is imported for them."""

Replacements = Mapping[type[nn.Module] | str, Callable[[Any], Callable[[Tensor], Tensor]]]
"""Type of module, or name of a class of transformers.activations -> what its ``forward`` is replaced with."""
ACTIVATIONS: Replacements = {
    nn.GELU: lambda module: _elementwise(
        module, _tanh_gelu if module.approximate == "tanh" else _gelu
    ),
    nn.SiLU: partial(_elementwise, jet=_silu),
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.Softplus), _elementwise),
    **{name: partial(_elementwise, jet=jet) for name, jet in HUGGING_FACE.items()},
}
"""Cheaper from the first product on."""
CHEAPER: Replacements = {
    **ACTIVATIONS,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
}
"""The others are for many products, with parts of the parameters."""


@contextmanager
def cheap_modules(model: nn.Module, replacements: Replacements = CHEAPER) -> Iterator[None]:
    """While this is open, modules of the types in ``replacements`` have second derivatives that are cheap."""
    modules = [m for m in model.modules() if _kind(m) in replacements and "forward" not in vars(m)]
    try:
        for module in modules:
            module.forward = replacements[_kind(module)](module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _kind(module: nn.Module) -> type[nn.Module] | str:
    kind = type(module)
    return kind.__name__ if kind.__module__ == "transformers.activations" else kind


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, C) logits and (N,) labels -> (N,) cross entropies. Keeps the probabilities (N, C) and nothing else of that size."""
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        probabilities = logits.log_softmax(-1)
        terms = -probabilities.gather(-1, labels[:, None]).squeeze(-1)
        ctx.save_for_backward(logits, probabilities.exp_(), labels)
        return terms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _CrossEntropyBackward.apply(gradient, *ctx.saved_tensors), None


class _CrossEntropyBackward(torch.autograd.Function):
    """g (p - onehot)"""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, logits: Tensor, probabilities: Tensor, labels: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gradient, probabilities, labels)
        return cross_entropy_slope(probabilities, labels, gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, probabilities, labels = ctx.saved_tensors
        return *cross_entropy_curvature(probabilities, labels, gradient, tangent), None, None


def cross_entropy_slope(probabilities: Tensor, labels: Tensor, gradient: Tensor) -> Tensor:
    """(N, C) probabilities p, (N,) labels, (N,) gradient g -> (N, C) the gradient by the logits: g (p - onehot)."""
    slope = probabilities * gradient[:, None]
    return slope.scatter_add_(1, labels[:, None], -gradient[:, None])


def cross_entropy_curvature(
    probabilities: Tensor, labels: Tensor, gradient: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """Along a tangent t (N, C), the slope's derivatives transposed: by g, (N,); by the logits, (N, C) g (diag(p) - p p') t."""
    product = probabilities * tangent
    total = product.sum(-1, keepdim=True)
    by_gradient = total.squeeze(-1) - tangent.gather(1, labels[:, None]).squeeze(-1)
    return by_gradient, product.addcmul_(probabilities, total, value=-1).mul_(gradient[:, None])
