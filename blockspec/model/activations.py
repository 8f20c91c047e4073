"""Activation functions whose first and second derivatives are computed once, in the forward pass.

Background. PyTorch differentiates the backward pass of an activation as a composition of
elementary operations, and carries them out again in every product. At fixed parameters the factors
f'(x) and f''(x) never change. Here the forward pass computes f, f' and f'' together (a *jet*); the
backward pass is then g f'(x), and a product needs two multiplications more: t f'(x) for the
gradient g, and t g f''(x) for the input x.

The graph has to lead from the backward pass back to x. A tensor that is saved may not be changed in
place afterwards, but functions that keep their value alone (tanh, sigmoid) allow that for x, and
those that keep x alone allow it for the value. Ours allows both: beside the value it gives out a
*link*, the same entries as x with a count of changes of their own, which belongs to the graph in
the place of x. Its entries are needed by third derivatives alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockspec.model.kernels import paused
from blockspec.model.plain import bends, slopes, steps_aside, unchanged

Jet = tuple[Tensor, Tensor, Tensor]
"""Values of a function, and of its first and second derivative."""
Forward = Callable[[Tensor], Tensor]


def elementwise(module: Any, jet: Callable[[Tensor], Jet]) -> Forward:
    """A ``forward`` for an activation module.

    Args:
        module: It computes a function of every entry.
        jet: The function and its two derivatives.

    Returns:
        The module's function; with second derivatives that are cheap where it has a graph.
    """
    function = module.forward

    def forward(input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad) or steps_aside(input):
            return function(input)
        with paused():
            value, _link = _Elementwise.apply(input, function, jet)
        return value

    return forward


class _Elementwise(torch.autograd.Function):
    """f(x), and the link to x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Forward, jet: Callable[[Tensor], Jet]
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)  # x^2 overflows in float16
        value, first, second = (part.to(x.dtype) for part in jet(x.to(wide)))
        link = x.data
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(link, first, second)
        ctx.function = unchanged(x, function)
        return value, link

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, along: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        link, first, second = ctx.saved_tensors
        if gradient is None:
            return along, None, None
        if steps_aside(gradient):
            (slope,) = slopes(ctx.function, [link], gradient)
            assert slope is not None
        elif torch.is_grad_enabled():
            slope = _ElementwiseBackward.apply(gradient, link, first, second, ctx.function)
        else:
            slope = gradient * first
        return slope if along is None else slope + along, None, None


class _ElementwiseBackward(torch.autograd.Function):
    """g f'(x)"""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, link: Tensor, first: Tensor, second: Tensor, function: Forward
    ) -> Tensor:
        ctx.save_for_backward(gradient, link, first, second)
        ctx.function = function
        return gradient * first

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, link, first, second = ctx.saved_tensors
        if torch.is_grad_enabled() or steps_aside(tangent):
            return *bends(ctx.function, [link], gradient, [tangent]), None, None, None
        by_gradient, by_x, *_ = ctx.needs_input_grad
        return (
            tangent * first if by_gradient else None,
            (tangent * gradient).mul_(second) if by_x else None,
            None,
            None,
            None,
        )


def _gelu(x: Tensor) -> Jet:
    """x times the normal distribution function."""
    square = x * x
    density = square.mul(-0.5).exp_().div_(math.sqrt(2 * math.pi))
    share = torch.special.ndtr(x)
    return x * share, share.addcmul_(x, density), square.neg_().add_(2).mul_(density)


def _tanh_gelu(x: Tensor, a: float = math.sqrt(8 / math.pi)) -> Jet:
    """x (1 + tanh(v / 2)) / 2, v = a x + b x^3: tanh is a logistic function."""
    b = 0.044715 * a
    square = x * x
    return _gated(x, square.mul(b).add_(a).mul_(x), square.mul(3 * b).add_(a), square.mul_(6 * b))


def _silu(x: Tensor) -> Jet:
    return _gated(x, x, 1.0, 0.0)


def _quick_gelu(x: Tensor) -> Jet:
    return _gated(x, 1.702 * x, 1.702, 0.0)


def _gated(x: Tensor, v: Tensor, slope: Tensor | float, bend: Tensor | float) -> Jet:
    """x logistic(v), with slope = v' and bend = x v''.

    Both tails of the logistic function are computed, neither as 1 minus the other: in float32
    second derivatives are 20 times as precise.
    """
    gate, rest = v.sigmoid(), v.neg().sigmoid_()
    bell = gate * rest
    rise = bell * slope
    lean = x * rise
    value, first = x * gate, gate + lean
    second = lean.mul_(rest.sub_(gate)).mul_(slope).add_(rise, alpha=2).add_(bell.mul_(bend))
    return value, first, second


def _tanh(x: Tensor) -> Jet:
    value = x.tanh()
    first = 1 - value * value
    return value, first, (value * first).mul_(-2)


def _sigmoid(x: Tensor) -> Jet:
    value, rest = x.sigmoid(), x.neg().sigmoid_()
    first = value * rest
    return value, first, rest.sub_(value).mul_(first)


def _softplus(x: Tensor, beta: float, threshold: float) -> Jet:
    """log(1 + exp(beta x)) / beta, and x itself where beta x is above the threshold."""
    first, second, _ = _sigmoid(x * beta)
    linear = x * beta > threshold
    value = F.softplus(x, beta, threshold)
    return value, first.masked_fill_(linear, 1), second.mul_(beta).masked_fill_(linear, 0)


def _of_gelu(module: nn.GELU) -> Forward:
    return elementwise(module, _tanh_gelu if module.approximate == "tanh" else _gelu)


def _of_silu(module: nn.SiLU) -> Forward:
    """In place, PyTorch's own is right to every order, and changes its input as it should."""
    return module.forward if module.inplace else elementwise(module, _silu)


def _of_softplus(module: nn.Softplus) -> Forward:
    return elementwise(module, partial(_softplus, beta=module.beta, threshold=module.threshold))


JETS: dict[str, Callable[[Tensor], Jet]] = {
    "torch.nn.modules.activation.Tanh": _tanh,
    "torch.nn.modules.activation.Sigmoid": _sigmoid,
    "transformers.activations.NewGELUActivation": _tanh_gelu,
    "transformers.activations.GELUTanh": _tanh_gelu,
    "transformers.activations.PytorchGELUTanh": _tanh_gelu,
    "transformers.activations.GELUActivation": _gelu,
    "transformers.activations.SiLUActivation": _silu,
    "transformers.activations.QuickGELUActivation": _quick_gelu,
    "transformers.activations.FastGELUActivation": partial(_tanh_gelu, a=2 * 0.7978845608),
}
"""Activations without settings. transformers' names differ from version to version."""

ACTIVATIONS: dict[str, Callable[[Any], Forward]] = {
    "torch.nn.modules.activation.GELU": _of_gelu,
    "torch.nn.modules.activation.SiLU": _of_silu,
    "torch.nn.modules.activation.Softplus": _of_softplus,
    **{name: partial(elementwise, jet=jet) for name, jet in JETS.items()},
}
"""Name of a type of module -> what its ``forward`` is replaced with."""
