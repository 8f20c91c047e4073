"""Optimizers and learning rates, from settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerSettings:
    """What makes an update out of a gradient.

    Args:
        name: adamw (decoupled weight decay), adam (decay added to the gradient), sgd (with
            momentum) or adahessian.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices; vectors (biases, norms) are never decayed.
        betas: Decay of the running means of gradient and squared gradient (adamw, adam,
            adahessian).
        eps: Added to the denominator; None takes the optimizer's own (1e-8 for adamw and adam, 1e-4
            for adahessian).
        momentum: Momentum of sgd.
        hessian_power: Share of adahessian's scaling by curvature, from 0 to 1.
        update_each: Steps from one of adahessian's measurements of curvature to the next.
        spatial_averaging: What adahessian's curvature is averaged over: conv (kernels), rows
            (these, and rows of matrices), or runs of so many entries; nothing if left out.
        clip: Largest norm of the whole gradient; 0 switches clipping off.
    """

    name: Literal["adamw", "adam", "sgd", "adahessian"] = "adamw"
    lr: float = 6e-4  # this, weight_decay, betas and clip are nanoGPT's, and the paper's for GPT-2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float | None = None
    momentum: float = 0.9
    hessian_power: float = 1.0
    update_each: int = 1
    spatial_averaging: Literal["conv", "rows"] | int | None = None
    clip: float = 1.0


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over training, as a share of its peak.

    Args:
        shape: cosine or linear (from the peak, after warm-up, to final), constant, or steps (times
            factor at each milestone).
        warmup: Steps of linear growth from 0 at the start.
        final: Where cosine and linear end, as a share of the peak.
        milestones: Steps at which the rate is multiplied by factor.
        factor: See milestones.
    """

    shape: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    warmup: int = 0
    final: float = 0.1  # nanoGPT's advice, after Chinchilla
    milestones: tuple[int, ...] = ()
    factor: float = 0.1


def _done(step: int, num_steps: int, schedule: ScheduleSettings) -> float:
    """The share of the steps after warm-up that is done."""
    return (step - schedule.warmup) / max(1, num_steps - schedule.warmup)


def _down(left: float, schedule: ScheduleSettings) -> float:
    """``left`` from 1 to 0 -> from the peak to ``final``."""
    return schedule.final + (1 - schedule.final) * left


SHAPES: Mapping[str, Callable[[int, int, ScheduleSettings], float]] = {
    "cosine": lambda step, last, schedule: _down(
        (1 + math.cos(math.pi * _done(step, last, schedule))) / 2, schedule
    ),
    "linear": lambda step, last, schedule: _down(1 - _done(step, last, schedule), schedule),
    "constant": lambda step, last, schedule: 1.0,
    "steps": lambda step, last, schedule: (
        schedule.factor ** sum(step >= m for m in schedule.milestones)
    ),
}


def share_of_peak(step: int, num_steps: int, schedule: ScheduleSettings) -> float:
    """The learning rate of the update after ``step`` updates, divided by its peak."""
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    return SHAPES[schedule.shape](step, num_steps, schedule)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def parameter_groups(parameters: Iterable[nn.Parameter], *, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors without: decay of norms and biases moves them from where
    they belong.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adaptive(settings: OptimizerSettings) -> dict[str, Any]:
    return {"lr": settings.lr, "betas": settings.betas} | (
        {} if settings.eps is None else {"eps": settings.eps}
    )


def _adahessian(groups: list[dict], settings: OptimizerSettings) -> Optimizer:
    from blockspec.optim import AdaHessian

    own = {
        name: getattr(settings, name)
        for name in ("hessian_power", "update_each", "spatial_averaging")
    }
    return AdaHessian(groups, **own, **_adaptive(settings))


OPTIMIZERS: Mapping[str, Callable[[list[dict], OptimizerSettings], Optimizer]] = {
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, **_adaptive(settings)),
    "adam": lambda groups, settings: torch.optim.Adam(groups, **_adaptive(settings)),
    "sgd": lambda groups, settings: torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum
    ),
    "adahessian": _adahessian,
}


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimizer of the model's parameters that require gradients."""
    if settings.lr <= 0:
        raise ValueError(f"lr is {settings.lr}; it must be above 0")
    groups = parameter_groups(model.parameters(), weight_decay=settings.weight_decay)
    if not groups:
        raise ValueError("no parameter of the model requires gradients; unfreeze some")
    return OPTIMIZERS[settings.name](groups, settings)
