"""Whether gradients reach every parameter that the loss depends on.

A forward pass under ``torch.no_grad``, or a layer that hands back no gradient, leaves parameters
with neither gradient nor curvature, in agreement with each other. The values of the loss tell: they
change with the parameter all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blockspec.products.blame import REMEDIES, untracked, watched
from blockspec.products.references import Reference, displaced
from blockspec.products.trials import Trial

STEPS = {torch.float64: (1e-7, 1e-6), torch.float32: (1e-2, 3e-2)}
MATTERS = {torch.float64: 1e-4, torch.float32: 1e-1}
"""Of the gradient's size: by how much the loss's rise and the gradient may differ.

Right models: 1e-8 and 1e-2 at most.
"""
FAR = 0.5  # of a parameter's size: more than a quantised layer rounds away
DETACHED = (
    "a part of the loss is detached: it changes by other than its gradient says, and so the "
    "curvature is that of the "
    "gradient, not that of the loss"
)


class Unreached(Exception):
    """Parameters move the loss and get no gradient."""


def check_reach(trial: Trial, reference: Reference) -> str:
    """A note on what is detached, or "".

    Raises:
        Unreached: A parameter has no gradient though the loss depends on it.
    """
    lost = [name for name, gradient in reference.gradient.items() if gradient is None]
    if behind := _behind_quantised(trial, lost):
        raise Unreached(_message(trial, behind, None))
    if reference.rise is not None and abs(reference.rise) <= _allowed(trial, reference):
        return ""
    with trial.unmodified():
        moving = lost if lost and _moves(trial, lost) else []
        if len(moving) > 1:
            moving = next(([name] for name in moving if _moves(trial, [name])), moving)
    if reference.rise is None and not moving:
        return ""
    calls, _ = watched(trial.objective, trial.unmodified)
    runs = untracked(calls, trial.objective.model)
    if moving:
        raise Unreached(_message(trial, moving[0], runs))
    if runs:
        raise Unreached(
            f"{runs} runs with gradients switched off, though it changes the loss; {NO_GRAD}"
        )
    return DETACHED


NO_GRAD = (
    "take torch.no_grad, torch.inference_mode or .detach() away while the curvature is measured. "
    "Layers that compute themselves anew in a backward pass of their own (reversible layers, as "
    "Reformer's) have no second derivative: such a model cannot be measured"
)


def _allowed(trial: Trial, reference: Reference) -> float:
    sizes = [trial.size(n, g) for n, g in reference.gradient.items() if g is not None]
    return MATTERS[trial.dtype] * torch.tensor(sizes or [0.0]).norm().item() + 1e-9


def _moves(trial: Trial, names: Sequence[str]) -> bool:
    """Whether the loss changes with these parameters, in proportion to the step: not by rounding,
    nor by a jump.
    """
    direction = {n: t for n, t in trial.direction(2000).items() if n in names}
    slopes = []
    for step in STEPS[trial.dtype]:
        values = []
        for sign in (1, -1):
            with displaced(trial.objective, direction, sign * step), torch.no_grad():
                values.append(trial.value().item())
        change = values[0] - values[1]
        if abs(change) < 100 * torch.finfo(trial.dtype).eps * max(map(abs, values)):
            return False
        slopes.append(change / step)
    return 0.5 < slopes[0] / slopes[1] < 2


def _behind_quantised(trial: Trial, lost: Sequence[str]) -> str | None:
    """A parameter whose gradient a quantised layer does not hand back. What it rounds away, small
    steps do not show: the loss stays as it is, or jumps.
    """
    if not lost or not _quantised(trial.objective.model):
        return None
    with trial.unmodified(), torch.no_grad():
        before = trial.value().item()
        for name, direction in trial.direction(2000).items():
            if name in lost:
                with displaced(trial.objective, {name: direction}, FAR):
                    if trial.value().item() != before:
                        return name
    return None


def _quantised(model: nn.Module, behind: str = "") -> list[str]:
    """Quantised modules; those that come after the one named ``behind`` first."""
    found: list[str] = []
    before: list[str] = []
    passed = False
    for name, module in model.named_modules():
        passed = passed or name == behind
        if "quantiz" in type(module).__name__.lower() or "quantiz" in type(module).__module__:
            (found if passed else before).append(f"{name} ({type(module).__name__})")
    return found + before


def _message(trial: Trial, name: str, runs: str | None) -> str:
    path = name.rpartition(".")[0]
    if runs:
        return (
            f"parameter {name!r} gets no gradient though the loss depends on it: {runs} runs with "
            "gradients switched "
            f"off; {NO_GRAD}"
        )
    quantised = _quantised(trial.objective.model, behind=path)
    behind = f"; {quantised[0]} hands back none: {REMEDIES[-1][1]}" if quantised else f"; {NO_GRAD}"
    where = path or "the model"
    return f"parameter {name!r} of {where} gets no gradient though the loss depends on it{behind}"
