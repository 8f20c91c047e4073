"""What numbers depend on, as digests: the same content under another name is the same, and other
content under the same name is noticed.

Weights, data and blocks are hashed whole. Code cannot be: a loss, an activation or the way that a
model uses its weights is known by what it gives. So the identity holds the loss, and from one
example the length of the gradient and of a product with the Hessian. A mended loss, another
activation, another number of heads show there, at the cost of two forward passes over the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.blocks import Block
from blockspec.model.differentiability import leaves_of
from blockspec.model.layer_by_layer import layer_by_layer, weighed
from blockspec.model.objective import Objective
from blockspec.model.weights import reshard
from blockspec.numerics.content import Digest, fingerprint_of_all
from blockspec.numerics.ranks import gathered

Identity = dict[str, Any]
MEASURED = "objective"  # the part of an identity that rounds: loss, gradient, product
_REMEMBERED: ContextVar[dict[int, tuple[Objective, Identity]] | None] = ContextVar(
    "identities", default=None
)


def identity_of(
    objective: Objective, blocks: Sequence[Block], settings: Mapping[str, Any]
) -> Identity:
    """What the numbers of an estimate depend on.

    Args:
        objective: Its weights, data and loss.
        blocks: Their names, sizes and what they are made of.
        settings: Everything else, by name.

    Returns:
        The settings, digests ``weights``, ``data``, ``blocks``, and the numbers of ``objective``;
        fit for JSON.
    """
    content = _content(objective)
    order = ("weights", "data", "blocks", MEASURED)
    found = content | {"blocks": blocks_digest(blocks)}
    return dict(settings) | {name: found[name] for name in order}


@contextmanager
def remembered() -> Iterator[None]:
    """While this is open nobody changes a model or its data: each objective is hashed and looked at
    once, however often its identity is asked for.
    """
    token = _REMEMBERED.set({})
    try:
        yield
    finally:
        _REMEMBERED.reset(token)


def _content(objective: Objective) -> Identity:
    """What an identity says of the objective alone: all that costs passes over weights or data."""
    known = _REMEMBERED.get()
    if known is not None and id(objective) in known:
        return known[id(objective)][1]
    content = {
        "weights": weights_digest(objective.model),
        "data": _data_digest(objective),
        MEASURED: _measured(objective),
    }
    if known is not None:
        known[id(objective)] = (objective, content)  # held, so that no other one gets its id
    return content


def same_everywhere(identity: Identity) -> None:
    """Compares what all processes are about to work on; one small message.

    Raises:
        ValueError: On every process, if two of them differ, with the difference.
    """
    first, *others = gathered(identity)
    for number, other in enumerate(others, start=1):
        if different := differences(first, other):
            told = "; ".join(different).replace(" there", " on process 0")
            raise ValueError(
                f"processes 0 and {number} do not work on the same thing: "
                f"{told.replace(' here', f' on process {number}')}. Every process has to make the "
                "same model (random weights "
                "need a seed), blocks, settings and batches; Objective(..., sharded=True) says "
                "that each holds batches of its own"
            )


def weights_digest(model: nn.Module) -> str:
    """Of all parameters and buffers, under their names; those that ``state_dict`` leaves out
    too.
    """
    reshard(model)
    return fingerprint_of_all(
        item for named in (model.named_parameters(), model.named_buffers()) for item in named
    )


def _data_digest(objective: Objective) -> str:
    own = fingerprint_of_all(objective.whole_batches())
    return fingerprint_of_all(gathered(own)) if objective.sharded else own


def blocks_digest(blocks: Sequence[Block]) -> str:
    """Of the blocks in their order, and of the rows that each is made of."""
    digest = Digest()
    for b in blocks:
        digest.add((b.name, b.kind, b.layer, b.numel))
        for piece in b.pieces:
            digest.add(f"{piece.parameter}|{piece.axis}|{piece.index}")
    return digest.text()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In words, where two identities or settings differ; nested ones by their path.

    Measured numbers may differ by rounding.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        there, here = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            if key != MEASURED or not _close(there, here):
                lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key} is {there!r} there, {here!r} here")
    return lines


def _measured(objective: Objective) -> dict[str, float]:
    dtype = torch.float32
    for parameter in objective.parameters().values():
        dtype = objective.weights.dtype or parameter.dtype
    rounding = math.sqrt(torch.finfo(dtype).eps)
    gradient, product = _slopes(objective)
    if objective.sharded:
        gradient, product = (
            sum(parts) for parts in zip(*gathered((gradient, product)), strict=True)
        )
    return {
        "loss": objective.value(),
        "gradient": gradient,
        "product": product,
        "rounding": rounding,
    }


def _slopes(objective: Objective) -> tuple[float, float]:
    """Lengths of the gradient of the first example that has a loss term, and of the derivative of
    its sum of entries.
    """
    parameters = list(objective.parameters().values())
    weights = objective.weights
    found: tuple[float, float] | None = None
    with objective.prepared():
        for example, _ in weights.in_step(objective.batches(micro_batch=1)):
            if weights.elsewhere:
                lengths, count = _slopes_of_layers(objective, example)
                found = lengths if found is None and count > 0 else found
            else:
                total, count = objective.loss_sum(example)
                if count > 0 and total.requires_grad:
                    found = _lengths(total, parameters, objective.device)
            if weights.everywhere(found is not None):
                break
    return found or (0.0, 0.0)


def _lengths(
    total: Tensor, leaves: Sequence[Tensor], device: torch.device, **settings: Any
) -> tuple[float, float]:
    gradient = _grad(total, leaves, create_graph=True)
    if not any(part.requires_grad for part in gradient):
        return _length(gradient), 0.0
    slope = sum(part.sum().to(device) for part in gradient)
    return _length(gradient), _length(_grad(slope, leaves, **settings))


def _slopes_of_layers(objective: Objective, example: Any) -> tuple[tuple[float, float], float]:
    """The same of one layer after the other, where no more is in memory: of numbers made from its
    outputs, by its weights and inputs. And the number of loss terms.
    """
    found: list[tuple[float, float]] = []

    def look(outputs: Sequence[Tensor]) -> None:
        leaves = list(leaves_of(outputs))
        found.append(_lengths(weighed(outputs), leaves, objective.device, retain_graph=True))

    with layer_by_layer(objective.model, look):
        total, count = objective.loss_sum(example)
    if total.requires_grad:
        look([total])
    gradient, product = (math.hypot(*lengths) for lengths in zip(*found, strict=True))
    return (gradient, product), count


def _grad(total: Any, parameters: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    found = torch.autograd.grad(total, parameters, allow_unused=True, **settings)
    return [part for part in found if part is not None]


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in tensors))


def _close(there: Mapping[str, float], here: Mapping[str, float]) -> bool:
    rounding = max(there.get("rounding", 0.0), here.get("rounding", 0.0))
    return all(
        math.isclose(there.get(name, math.nan), here.get(name, math.nan), rel_tol=rounding)
        for name in ("loss", "gradient", "product")
    )
