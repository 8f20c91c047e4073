"""Functions whose second derivatives are cheap: activations and cross entropy that keep what double backward needs.

PyTorch differentiates a backward pass as a composition of elementary operations, again in every product. At fixed parameters
those factors never change: here they are computed once, in the shared pass. Values and derivatives are those of the original
functions up to rounding. There are no third derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import activations

ELEMENTWISE = (
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    *(getattr(activations, name) for name in ("NewGELUActivation", "GELUActivation", "FastGELUActivation", "GELUTanh",
                                             "PytorchGELUTanh", "QuickGELUActivation", "SiLUActivation")
      if hasattr(activations, name)),
)  # fmt: skip
"""Modules that apply one smooth function to every entry."""


@contextmanager
def cheap_activations(model: nn.Module) -> Iterator[None]:
    """While this is open, the model's elementwise activations keep their first two derivatives."""
    modules = [m for m in model.modules() if type(m) in ELEMENTWISE and "forward" not in vars(m)]
    try:
        for module in modules:
            module.forward = _elementwise(module.forward)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _elementwise(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return function(x)
        point = x.detach().requires_grad_()
        value = function(point)
        (first,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), point)
        return _Elementwise.apply(x, value.detach(), first.detach(), second)

    return forward


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
    def forward(ctx: Any, gradient: Tensor, logits: Tensor, probabilities: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, probabilities, labels)
        slope = probabilities * gradient[:, None]
        return slope.scatter_add_(1, labels[:, None], -gradient[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, p, labels = ctx.saved_tensors
        product = p * tangent
        total = product.sum(-1, keepdim=True)
        by_gradient = total.squeeze(-1) - tangent.gather(1, labels[:, None]).squeeze(-1)
        by_logits = torch.addcmul(product, p, total, value=-1).mul_(gradient[:, None])  # (diag(p) - p p') t
        return by_gradient, by_logits, None, None
