"""The shared pass of one micro-batch: from a curvature and a batch to products.

One forward pass and one backward pass are made with a graph that can be differentiated again. A
product then runs only through the part of that graph that lies between the direction's parameters
and the targets: ``autograd.grad(g_b, p_b, v_b)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blockspec.model.objective import Objective
from blockspec.products.finiteness import check_terms

Tensors = Mapping[str, Tensor]
Apply = Callable[[Tensors, Sequence[str]], dict[str, Tensor]]
"""``apply(direction, targets)``: product with a direction (parameter name -> tensor; zero
elsewhere), restricted to the parameters named in ``targets``; summed over the loss terms of the
batch it was made from. Absent names are zeros.
"""


def _hessian(objective: Objective, batch: Any, parameters: Tensors) -> tuple[Apply, float]:
    total, count = objective.loss_sum(batch)
    check_terms(total)
    return _slopes(_grad([total], parameters, create_graph=True), parameters), count


def _residual(objective: Objective, batch: Any, parameters: Tensors) -> tuple[Apply, float]:
    outputs = objective.loss.outputs(objective.model, batch)
    leaf = outputs.detach().requires_grad_()
    terms = objective.loss.terms(leaf, batch)
    check_terms(terms)
    (slope,) = torch.autograd.grad(
        terms.sum(), leaf
    )  # held fixed: the outputs' own curvature is left
    gradients = _grad([outputs], parameters, grad_outputs=[slope], create_graph=True)
    return _slopes(gradients, parameters), float(terms.numel())


def _slopes(gradients: Tensors, parameters: Tensors) -> Apply:
    """Products with the derivative of gradients that have a graph."""

    def apply(direction: Tensors, targets: Sequence[str]) -> dict[str, Tensor]:
        sources = [
            name for name in direction if name in gradients and gradients[name].requires_grad
        ]
        return _grad(
            [gradients[name] for name in sources],
            {name: parameters[name] for name in targets},
            grad_outputs=[direction[name] for name in sources],
            retain_graph=True,
        )

    return apply


def _ggn(objective: Objective, batch: Any, parameters: Tensors) -> tuple[Apply, float]:
    outputs = objective.loss.outputs(objective.model, batch)
    leaf = outputs.detach().requires_grad_()
    terms = objective.loss.terms(leaf, batch)
    check_terms(terms)
    (slope,) = torch.autograd.grad(terms.sum(), leaf, create_graph=True)

    def middle(tangent: Tensor) -> Tensor:
        if not slope.requires_grad:  # terms linear in the outputs
            return torch.zeros_like(leaf)
        return _grad([slope], {"": leaf}, grad_outputs=[tangent], retain_graph=True).get(
            "", torch.zeros_like(leaf)
        )

    return _gauss_newton(outputs, parameters, middle), float(terms.numel())


def _fisher(objective: Objective, batch: Any, parameters: Tensors) -> tuple[Apply, float]:
    terms = objective.loss.terms(objective.loss.outputs(objective.model, batch), batch)
    check_terms(terms)
    return _gauss_newton(terms, parameters, lambda tangent: tangent), float(terms.numel())


def _gauss_newton(
    outputs: Tensor, parameters: Tensors, middle: Callable[[Tensor], Tensor]
) -> Apply:
    """J' M J with J the Jacobian of ``outputs``; J v is the derivative of J' u with respect to u,
    so it shares a pass too.
    """
    dual = torch.zeros_like(outputs, requires_grad=True)
    transposed = _grad([outputs], parameters, grad_outputs=[dual], create_graph=True)

    def apply(direction: Tensors, targets: Sequence[str]) -> dict[str, Tensor]:
        sources = [name for name in direction if name in transposed]
        tangent = _grad(
            [transposed[name] for name in sources],
            {"": dual},
            grad_outputs=[direction[name] for name in sources],
            retain_graph=True,
        )
        if not tangent:
            return {}
        wanted = {name: parameters[name] for name in targets}
        return _grad([outputs], wanted, grad_outputs=[middle(tangent[""])], retain_graph=True)

    return apply


LINEARISATIONS = {"hessian": _hessian, "ggn": _ggn, "fisher": _fisher, "residual": _residual}


def _grad(outputs: Sequence[Tensor], inputs: Tensors, **settings: Any) -> dict[str, Tensor]:
    """``torch.autograd.grad`` by name; without the inputs that the outputs do not depend on."""
    if not outputs or not inputs:
        return {}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), allow_unused=True, **settings)
    return {
        name: gradient
        for name, gradient in zip(inputs, gradients, strict=True)
        if gradient is not None
    }
