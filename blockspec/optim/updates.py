"""One step of AdaHessian, given the diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def update(
    group: Mapping[str, Any], step: int, parameters: list[Tensor], states: list[dict[str, Any]]
) -> None:
    """The step of :class:`blockspec.optim.AdaHessian`, for all parameters of a group that have the
    same number of steps behind them.

    Args:
        group: The settings.
        step: Steps behind.
        parameters, states: Each parameter with its state, which holds the square of the last
            diagonal.
    """
    for parameter, state in zip(parameters, states, strict=True):
        if not step:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_hessian_diag_sq"] = torch.zeros_like(parameter)
        state["step"] = step + 1
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    mean = [state["exp_avg"] for state in states]
    square = [state["exp_hessian_diag_sq"] for state in states]
    torch._foreach_lerp_(mean, [p.grad for p in parameters if p.grad is not None], 1 - beta1)
    torch._foreach_lerp_(square, [state["hessian_diag_sq"] for state in states], 1 - beta2)
    # Both bias corrections go into numbers: two passes over the tensors less.
    half_power = group["hessian_power"] / 2
    correction = (1 - beta2 ** (step + 1)) ** half_power
    denominator = torch._foreach_pow(square, half_power)
    torch._foreach_add_(denominator, group["eps"] * correction)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(
        parameters, mean, denominator, value=-lr * correction / (1 - beta1 ** (step + 1))
    )
