"""Modules whose second derivatives are cheap, and cross entropies.

Background. PyTorch's double backward is general: of a convolution it computes the part of the
weight together with that of the input, wanted or not; of a batch norm in eval mode it goes through
the kernel for statistics of the batch; of an activation and of a cross entropy it computes factors
again, in every product, that depend on the parameters alone. The replacements here are the same
functions with the same derivatives to every order, up to rounding. They differ in what a product
computes: what is asked for, and nothing twice.

What is replaced is the ``forward`` of a module, on the instance and for a while. Modules of exactly
the types in the tables are replaced. A subclass, and a module whose ``forward`` somebody else has
replaced, are left alone. :mod:`blockspec.model.plain` tells when a replaced module uses its own
function all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockspec.model.activations import ACTIVATIONS as ACTIVATIONS
from blockspec.model.patching import patched
from blockspec.model.plain import bends, slopes, steps_aside, unchanged
from blockspec.model.walks import modules_of


def _convolution(module: Any) -> Callable[[Tensor], Tensor]:
    """A convolution in two parts, of the input and of the weight.

    PyTorch's double backward of a convolution computes the weight's part too, at the price of all
    the others, wanted or not. Autograd leaves out a function that leads to nothing wanted, but not
    a part of one: so input and weight have a function each.
    """
    original = module.forward

    def forward(input: Tensor) -> Tensor:
        weight, bias, padding = module.weight, module.bias, module.padding
        ours = (
            module.padding_mode == "zeros"
            and not isinstance(padding, str)
            and input.dim() == weight.dim()
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(input.device.type)
            and not steps_aside(input, weight, bias)
        )
        if not ours:
            return original(input)
        how = (module.stride, padding, module.dilation, module.groups)
        y = _ConvolutionOfInput.apply(input, [weight], how)
        if weight.requires_grad:
            y = y + _ConvolutionOfWeight.apply(weight, [input], how, y.shape)
        return y if bias is None else y + _by_channel(bias, y)

    return forward


class _ConvolutionOfInput(torch.autograd.Function):
    """The convolution, with a derivative by the input alone.

    Autograd does not see a tensor that comes in a list. The backward pass is made of functions that
    PyTorch differentiates to any order, by the weight too.
    """

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
        ours = (
            not module.training
            and variance is not None
            and variance.dtype == input.dtype
            and torch.is_grad_enabled()
            and not steps_aside(input)
        )
        if not ours:
            return original(input)
        module._check_input_dim(input)
        scale = torch.rsqrt(variance + module.eps)
        if module.weight is not None:
            scale = scale * module.weight
        shift = -mean * scale
        if module.bias is not None:
            shift = shift + module.bias
        return input * _by_channel(scale, input) + _by_channel(shift, input)

    return forward


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) to (C, 1, …) beside x (B, C, …)."""
    return vector.view(-1, *[1] * (x.dim() - 2))


Replacements = Mapping[str, Callable[[Any], Callable[[Tensor], Tensor]]]
"""Name of a type of module -> what its ``forward`` is replaced with."""
CHEAPER: Replacements = {
    **ACTIVATIONS,
    **{f"torch.nn.modules.conv.Conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"torch.nn.modules.batchnorm.BatchNorm{n}d": _batch_norm for n in (1, 2, 3)},
}
"""Activations are cheaper from the first product on; the others for many products, with parts of
the parameters.
"""


@contextmanager
def cheap_modules(model: nn.Module, replacements: Replacements = CHEAPER) -> Iterator[None]:
    """Gives modules second derivatives that are cheap; they get their own ``forward`` back on
    leaving.

    Args:
        model: Its modules of exactly the types in ``replacements`` are meant.
        replacements: Name of a type -> what makes the new ``forward`` of a module of that type.
    """
    with patched(
        (module, "forward", replacements[_name(module)](module))
        for module in modules_of(model)
        if _name(module) in replacements and "forward" not in vars(module)
    ):
        yield


def _name(module: nn.Module) -> str:
    """Of its type; a name needs no import of a library that the model may not come from."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies whose second derivative is cheap.

    Args:
        logits: (N, C).
        labels: (N,) classes, 0 to C - 1.

    Returns:
        (N,) one term for each row. Beside the logits, the graph keeps their probabilities (N, C),
        and nothing else of that size.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad) or steps_aside(logits):
        return F.cross_entropy(logits, labels, reduction="none")
    terms, _link = _CrossEntropy.apply(logits, labels)
    return terms


class _CrossEntropy(torch.autograd.Function):
    """The terms, and the link to the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.log_softmax(-1)
        terms = -probabilities.gather(-1, labels[:, None]).squeeze(-1)
        link = logits.data
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(link, probabilities.exp_(), labels)
        ctx.function = unchanged(
            logits, lambda logits: F.cross_entropy(logits, labels, reduction="none")
        )
        return terms, link

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, along: Tensor | None
    ) -> tuple[Tensor | None, None]:
        link, probabilities, labels = ctx.saved_tensors
        if gradient is None:
            return along, None
        if steps_aside(gradient):
            (slope,) = slopes(ctx.function, [link], gradient)
            assert slope is not None
        else:
            slope = _CrossEntropyBackward.apply(gradient, link, probabilities, labels, ctx.function)
        return slope if along is None else slope + along, None


class _CrossEntropyBackward(torch.autograd.Function):
    """g (p - onehot)"""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        link: Tensor,
        probabilities: Tensor,
        labels: Tensor,
        function: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(gradient, link, probabilities, labels)
        ctx.function = function
        return cross_entropy_slope(probabilities, labels, gradient)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, link, probabilities, labels = ctx.saved_tensors
        if torch.is_grad_enabled() or steps_aside(tangent):
            return *bends(ctx.function, [link], gradient, [tangent]), None, None, None
        curvature = cross_entropy_curvature(probabilities, labels, gradient, tangent)
        return *curvature, None, None, None


def cross_entropy_slope(probabilities: Tensor, labels: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of cross entropies by their logits, g (p - onehot).

    Args:
        probabilities: p, (N, C).
        labels: (N,) classes.
        gradient: g, (N,).

    Returns:
        (N, C).
    """
    slope = probabilities * gradient[:, None]
    return slope.scatter_add_(1, labels[:, None], -gradient[:, None])


def cross_entropy_curvature(
    probabilities: Tensor, labels: Tensor, gradient: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivatives of the slope, transposed, along a tangent.

    Args:
        probabilities: p, (N, C).
        labels: (N,) classes.
        gradient: g, (N,).
        tangent: t, (N, C), along the slope.

    Returns:
        By the gradient, (N,): (p - onehot)' t. By the logits, (N, C): g (diag(p) - p p') t.
    """
    product = probabilities * tangent
    total = product.sum(-1, keepdim=True)
    by_gradient = total.squeeze(-1) - tangent.gather(1, labels[:, None]).squeeze(-1)
    return by_gradient, product.addcmul_(probabilities, total, value=-1).mul_(gradient[:, None])
