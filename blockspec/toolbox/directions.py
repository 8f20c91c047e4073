"""Where directions come from: each function gives parameter name -> tensor, how the parameter
moves.

A direction is what :func:`blockspec.directional` takes: an update, a difference of two models, the
error of a quantisation.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.gathering import whole
from blockspec.model.objective import Objective

Direction = dict[str, Tensor]
Weights = nn.Module | Mapping[str, Tensor]


def difference(after: Weights, before: Weights) -> Direction:
    """From one set of weights to another: an update, a fine-tuning, a task vector.

    Args:
        after: A model, or its ``state_dict`` (name -> tensor).
        before: The same, of the model whose curvature is asked for.

    Returns:
        ``after - before`` for every floating-point tensor of ``before`` that requires gradients
        (all of them, where it is a mapping).

    Raises:
        ValueError: A tensor is missing in ``after``, or has another shape.
    """
    there, here = _tensors(after), _tensors(before)
    direction = {}
    for name, tensor in here.items():
        if name not in there:
            raise ValueError(
                f"{name!r} is not among the other weights; both must be of one architecture"
            )
        if there[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has the shape {tuple(there[name].shape)} there and "
                f"{tuple(tensor.shape)} here"
            )
        direction[name] = there[name].to(tensor) - tensor
    return direction


def from_file(path: str | os.PathLike[str], before: Weights | None = None) -> Direction:
    """From a safetensors file: a direction itself, or weights, from which those of ``before`` are
    subtracted.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    return tensors if before is None else difference(tensors, before)


def next_step(optimizer: torch.optim.Optimizer, objective: Objective) -> Direction:
    """The step that the optimizer would take next, from its state and the objective's gradient;
    nothing is changed.

    A copy of the optimizer takes the step, so this works for SGD, Adam, Muon, AdaHessian and any
    other. Weight decay is a part of the step. An optimizer that measures curvature in its own
    backward pass takes the step with what it last measured.

    Args:
        optimizer: Holds parameters of the objective's model.
        objective: Its gradient is what the optimizer sees.
    """
    parameters = objective.parameters()
    gradient = objective.gradient()
    before = {name: (p.detach().clone(), p.grad) for name, p in parameters.items()}
    state = copy.deepcopy(optimizer.state_dict())
    try:
        for name, p in parameters.items():
            p.grad = gradient[name].clone()
        optimizer.step()
        return {name: p.detach() - before[name][0] for name, p in parameters.items()}
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name][0])
                p.grad = before[name][1]
        optimizer.load_state_dict(state)
        _drop_new_state(optimizer, state)


def _drop_new_state(optimizer: torch.optim.Optimizer, state: Mapping[str, object]) -> None:
    """``load_state_dict`` keeps what it is not told of: parameters that had no state must have none
    again.
    """
    if not state["state"]:
        optimizer.state.clear()


def quantised(
    model: nn.Module,
    bits: int,
    *,
    group: int | None = None,
    per: str = "channel",
    symmetric: bool = True,
    include: str | Iterable[str] = "*",
) -> Direction:
    """The error of rounding matrices to the nearest of 2^bits evenly spaced values.

    Args:
        model: Whose matrices (parameters of two dimensions and more) are rounded.
        bits: 1 to 16, of each weight.
        group: Weights of a row that share one scale; the last group of a row may be shorter. None:
            as ``per`` says.
        per: ``"channel"``: a scale an output (a row of a Linear weight, a column of a Conv1D of
            Hugging Face), or ``"tensor"``.
        symmetric: Levels around zero, one scale; False: between the smallest and the largest
            weight, scale and offset.
        include: Globs of the parameters' names.

    Returns:
        ``rounded - weight`` of every matrix whose name matches.
    """
    patterns = [include] if isinstance(include, str) else list(include)
    chosen = {
        name: p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad and p.dim() >= 2 and any(fnmatchcase(name, x) for x in patterns)
    }
    if not chosen:
        raise ValueError(f"no matrix of the model matches {patterns}")
    how: dict[str, Any] = {"group": group, "per": per, "symmetric": symmetric}
    turned = _stored_by_input(model)
    direction = {}
    for name, spread in chosen.items():
        (p,) = whole([spread])
        near = rounded(p.T, bits, **how).T if name in turned else rounded(p, bits, **how)
        direction[name] = near - p
    return direction


def _stored_by_input(model: nn.Module) -> set[str]:
    """Names of the matrices whose outputs are columns: Hugging Face's Conv1D stores (in, out)."""
    return {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}


def rounded(
    weight: Tensor,
    bits: int,
    *,
    group: int | None = None,
    per: str = "channel",
    symmetric: bool = True,
) -> Tensor:
    """The weight rounded to the nearest of 2^bits levels; see :func:`quantised`."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits is between 1 and 16, got {bits}")
    rows = _rows(weight, group, per)
    flat = _nearest(rows, bits, symmetric).view(len(weight) if per == "channel" else 1, -1)
    return flat[:, : weight.numel() // len(flat)].reshape(weight.shape)


def _nearest(rows: Tensor, bits: int, symmetric: bool) -> Tensor:
    """(n, m) each row rounded to the nearest of its own 2^bits levels."""
    if symmetric and bits == 1:  # two levels around zero: plus and minus the mean magnitude
        return torch.where(rows >= 0, 1, -1).mul(rows.abs().mean(1, keepdim=True))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = rows.abs().amax(1, keepdim=True) / top
        offset = torch.zeros_like(scale)
        low, high = -top - 1, top
    else:
        offset = rows.amin(1, keepdim=True)
        scale = (rows.amax(1, keepdim=True) - offset) / (2**bits - 1)
        low, high = 0, 2**bits - 1
    safe = torch.where(scale > 0, scale, 1)  # rows of equal weights are exact
    levels = ((rows - offset) / safe).round().clamp(low, high)
    return torch.where(scale > 0, levels * safe + offset, rows)


def _rows(weight: Tensor, group: int | None, per: str) -> Tensor:
    """(n, m) the weights that share a scale, a row each; a last group that is short repeats its
    last weight.
    """
    if per not in ("channel", "tensor"):
        raise ValueError(f"per is 'channel' or 'tensor', got {per!r}")
    flat = weight.detach().reshape(len(weight) if per == "channel" else 1, -1)
    if group is None:
        return flat
    if group < 1:
        raise ValueError(f"group is a number of weights, at least 1, got {group}")
    missing = -flat.shape[1] % group
    return torch.cat([flat, flat[:, -1:].expand(-1, missing)], 1).reshape(-1, group)


def pruned(model: nn.Module, share: float, *, include: str | Iterable[str] = "*") -> Direction:
    """Minus the smallest weights: of every matrix, this share of its weights becomes zero (pruning
    by magnitude).
    """
    if not 0 < share < 1:
        raise ValueError(f"share is between 0 and 1 (both excluded), got {share}")
    patterns = [include] if isinstance(include, str) else list(include)
    direction = {}
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() >= 2 and any(fnmatchcase(name, x) for x in patterns):
            number = max(round(share * p.numel()), 1)
            threshold = p.detach().abs().flatten().kthvalue(number).values
            direction[name] = torch.where(p.detach().abs() <= threshold, -p.detach(), 0)
    if not direction:
        raise ValueError(f"no matrix of the model matches {patterns}")
    return direction


def low_rank(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float = 1.0) -> Direction:
    """LoRA's product ``scale * B A`` by name of the adapted parameter, in the shape (out, in) of a
    Linear weight.

    Args:
        a: Name of the adapted parameter -> A (r, in).
        b: The same name -> B (out, r).
        scale: LoRA's alpha / r.
    """
    if missing := a.keys() ^ b.keys():
        raise ValueError(
            f"A and B must be of the same parameters; only one has {sorted(missing)[:3]}"
        )
    return {name: scale * (b[name] @ a[name]) for name in a}


def _tensors(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        return {name: p.detach() for name, p in weights.named_parameters() if p.requires_grad}
    return {name: t.detach() for name, t in weights.items() if t.is_floating_point()}
