"""Products by central differences of the gradients of the model as it is: what exact products are
checked against.

Each function takes an objective (of one batch, in eval mode, with nothing replaced), a direction d
(parameter name -> tensor) and a step h, and gives the product with d, of the mean over the batch's
loss terms, by parameter name. No second derivative is taken. Each costs at most two gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockspec.model.losses import Loss
from blockspec.model.objective import Objective

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What central differences say.

    Args:
        product: By name; zeros where nothing depends on a parameter.
        gradient: By name, at a point nearby or with other weights; None where the parameter has no
            path to the loss.
        rise: (L(theta + h d) - L(theta - h d)) / 2h less what the gradient says of it; None where
            it was not computed.
    """

    product: dict[str, Tensor]
    gradient: dict[str, Tensor | None]
    rise: float | None = None


def of_hessian(objective: Objective, direction: Tensors, step: float) -> Reference:
    """(g(theta + h d) - g(theta - h d)) / 2h"""
    with displaced(objective, direction, step):
        above, ahead = loss_and_gradient(objective, direction)
    with displaced(objective, direction, -step):
        below, behind = loss_and_gradient(objective, direction)
    slope = sum(
        float(((one + other) * direction[name]).sum()) / 2
        for name, one, other in _both(ahead, behind)
    )
    return Reference(
        _difference(ahead, behind, step, direction), ahead, (above - below) / (2 * step) - slope
    )


def of_ggn(objective: Objective, direction: Tensors, step: float) -> Reference:
    """J' times the difference of the loss's slopes at the outputs f(theta + h d) and f(theta - h
    d).
    """
    loss, batch = _split(objective)
    slopes = []
    for sign in (1, -1):
        with displaced(objective, direction, sign * step):
            slopes.append(_slope(loss, loss.outputs(objective.model, batch), batch))
    return _pulled_back(objective, direction, lambda outputs: (slopes[0] - slopes[1]) / (2 * step))


def of_fisher(objective: Objective, direction: Tensors, step: float) -> Reference:
    """J' J d, with J the Jacobian of the loss's terms and J d by differences."""
    loss, batch = _split(objective)
    terms = []
    for sign in (1, -1):
        with displaced(objective, direction, sign * step):
            terms.append(loss.terms(loss.outputs(objective.model, batch), batch).detach())
    return _pulled_back(
        objective,
        direction,
        lambda found: (terms[0] - terms[1]) / (2 * step * len(found)),
        lambda outputs: loss.terms(outputs, batch),
    )


def of_residual(objective: Objective, direction: Tensors, step: float) -> Reference:
    """Differences of the outputs' gradients, weighted with the loss's slope at theta."""
    loss, batch = _split(objective)
    slope = _slope(loss, loss.outputs(objective.model, batch), batch)
    found = []
    for sign in (1, -1):
        with displaced(objective, direction, sign * step):
            outputs = loss.outputs(objective.model, batch)
            found.append(_gradient(outputs, objective, direction, slope))
    return Reference(_difference(found[0], found[1], step, direction), found[0])


REFERENCES: dict[str, Callable[[Objective, Tensors, float], Reference]] = {
    "hessian": of_hessian,
    "ggn": of_ggn,
    "fisher": of_fisher,
    "residual": of_residual,
}


@contextmanager
def displaced(objective: Objective, direction: Tensors, step: float) -> Iterator[None]:
    """The objective's own parameters, which change, stand ``step * direction`` further on."""
    parameters = objective.parameters()
    with torch.no_grad():
        for name, tensor in direction.items():
            parameters[name].add_(tensor, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in direction.items():
                parameters[name].sub_(tensor, alpha=step)


def plain(loss: Any) -> Any:
    """The loss without what is ours in it, as far as it says."""
    return replace(loss, chunked=False) if isinstance(loss, Loss) else loss


def _split(objective: Objective) -> tuple[Loss, Any]:
    assert isinstance(objective.loss, Loss)
    return objective.loss, next(iter(objective.batches()))


def loss_and_gradient(
    objective: Objective, names: Iterable[str]
) -> tuple[float, dict[str, Tensor | None]]:
    """Of the mean over the batch's terms, by the parameters named."""
    total, count = objective.loss_sum(next(iter(objective.batches())))
    return total.item() / count, _gradient(total / count, objective, names)


def _gradient(
    outputs: Tensor, objective: Objective, names: Iterable[str], weights: Tensor | None = None
) -> dict[str, Tensor | None]:
    parameters = objective.parameters()
    if not outputs.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad(
        outputs, [parameters[name] for name in names], weights, allow_unused=True
    )
    return dict(zip(names, found, strict=True))


def _slope(loss: Loss, outputs: Tensor, batch: Any) -> Tensor:
    leaf = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss.terms(leaf, batch).mean(), leaf)
    return slope


def _pulled_back(
    objective: Objective,
    direction: Tensors,
    weights: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor] = lambda outputs: outputs,
) -> Reference:
    loss, batch = _split(objective)
    outputs = function(loss.outputs(objective.model, batch))
    product = _gradient(outputs, objective, direction, weights(outputs))
    return Reference(_filled(product, direction), product)


Found = Mapping[str, Tensor | None]


def _both(one: Found, other: Found) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, first in one.items():
        second = other[name]
        if first is not None and second is not None:
            yield name, first, second


def _difference(ahead: Found, behind: Found, step: float, like: Tensors) -> dict[str, Tensor]:
    return _filled({n: (one - other) / (2 * step) for n, one, other in _both(ahead, behind)}, like)


def _filled(found: Found, like: Tensors) -> dict[str, Tensor]:
    """Zeros in the place of what is not there."""
    return {
        name: torch.zeros_like(tensor) if (part := found.get(name)) is None else part
        for name, tensor in like.items()
    }
