"""Which part of a model has a wrong second derivative, and what to do about it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from blockspec.model.differentiability import nodes
from blockspec.model.losses import Loss
from blockspec.model.objective import Objective

Context = Callable[[], AbstractContextManager[Any]]
STEPS = {torch.float64: (1e-7, 1e-5), torch.float32: (1e-2, 3e-3)}
WRONG = 0.02  # relative error from which a module is to blame: right ones have 1e-6 in float64

REMEDIES = (
    (
        r"^CompiledFunction",
        "compiled code has no second derivative: measure the model before torch.compile (a "
        "compiled one has it as "
        "_orig_mod), or set torch.compiler.set_stance('force_eager') meanwhile",
    ),
    (
        r"(?i)linear_cross_entropy|fused.*(entropy|loss)|(entropy|loss).*fused|liger",
        "a fused loss hands out gradients that it made in its forward pass: compute the logits and "
        "torch.nn.functional.cross_entropy, or take blockspec.losses, which need as little memory "
        "(torch's linear_cross_entropy: options=None)",
    ),
    (
        r"^WeightNormInterface",
        "PyTorch's fused weight norm has a wrong second derivative: use "
        "torch.nn.utils.parametrizations.weight_norm, "
        "which is replaced here, or compute g * v / v.norm() itself",
    ),
    (
        r"(?i)quantiz|CppFunction|MatMul(4|8)|Int(4|8)|Bnb",
        "quantised layers hand back no gradient to what lies before them: measure the model in "
        "floating point "
        "(dequantize it), or only blocks behind them",
    ),
)
"""Pattern of a node of the graph, or of a module's type -> remedy."""
OWN = (
    "the backward pass of {names} takes for a constant what it kept of its forward pass: save the "
    "inputs "
    "(ctx.save_for_backward) and compute everything from them in differentiable operations, or "
    "switch the function off in "
    "the model"
)
HOOKS = "a hook changes gradients on their way ({where}): remove it while the curvature is measured"
ELSE = (
    "switch off fused, compiled or approximated functions in it, take .detach() and torch.no_grad "
    "out of it, or write it in plain PyTorch operations"
)


@dataclass(frozen=True)
class Call:
    """A module's first call in a forward pass: what it got, detached, and whether gradients were
    on.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tracked: bool


def hooks(model: nn.Module) -> list[str]:
    """Parameters and modules with hooks on gradients."""
    found = [name for name, p in model.named_parameters() if p._backward_hooks]
    return found + [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]


def without_hooks(model: nn.Module) -> None:
    """Takes all hooks on gradients away, for good."""
    for p in model.parameters():
        if p._backward_hooks:
            p._backward_hooks.clear()
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()


def culprit(objective: Objective, unmodified: Context) -> tuple[str, str]:
    """What is to blame, in words, and the remedy."""
    calls, total = watched(objective, unmodified)
    model = objective.model
    names = {module: name for name, module in model.named_modules()}
    try:
        module = _deepest(objective, unmodified, model, calls)
        if module is not model or (
            model in calls and _is_wrong(objective, unmodified, model, calls[model])
        ):
            named = names[module] or "the model's own forward"
            return f"{named} ({type(module).__name__})", _remedy(module, calls[module], unmodified)
    except Exception:  # the message is better without a name than not there
        return "a part of the model or the loss", _remedy_of(total)
    where = "the loss's terms" if isinstance(objective.loss, Loss) else "the loss function"
    return where, _remedy_of(total)


def watched(objective: Objective, unmodified: Context) -> tuple[dict[nn.Module, Call], Tensor]:
    """The first call of each module in one forward pass, and the loss."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in calls:
            kept = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
            calls[module] = Call(kept[0], kept[1], torch.is_grad_enabled())

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in objective.model.modules()
    ]
    try:
        with unmodified():
            total, _ = objective.loss_sum(next(iter(objective.batches())))
    finally:
        for handle in handles:
            handle.remove()
    return calls, total


def untracked(calls: Mapping[nn.Module, Call], model: nn.Module) -> str | None:
    """The first module that runs with gradients switched off, though the loss was asked for with
    gradients.
    """
    return next(
        (
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in model.named_modules()
            if module in calls and not calls[module].tracked
        ),
        None,
    )


def _deepest(
    objective: Objective, unmodified: Context, module: nn.Module, calls: Mapping[nn.Module, Call]
) -> nn.Module:
    for child in _called_children(module, calls):
        if _is_wrong(objective, unmodified, child, calls[child]):
            return _deepest(objective, unmodified, child, calls)
    return module


def _called_children(module: nn.Module, calls: Mapping[nn.Module, Call]) -> Iterator[nn.Module]:
    for child in module.children():
        if child in calls:
            yield child
        else:  # a list of modules is not called itself
            yield from _called_children(child, calls)


def _is_wrong(objective: Objective, unmodified: Context, module: nn.Module, call: Call) -> bool:
    """Whether the module's product, as the operator makes it, is not that of differences of its
    gradient.
    """
    flat, shape = tree_flatten((call.args, call.kwargs))
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.is_floating_point()]
    for i in places:
        flat[i] = flat[i].clone().requires_grad_()
    leaves: list[Tensor] = [flat[i] for i in places] + [
        p for p in module.parameters() if p.requires_grad
    ]

    def gradients(**settings: Any) -> list[Tensor]:
        args, kwargs = tree_unflatten(flat, shape)
        outputs = [
            x for x in tree_flatten(module(*args, **kwargs))[0]
            if isinstance(x, Tensor) and x.requires_grad
        ]  # fmt: skip
        weights = [_random(x, i, 1.0) for i, x in enumerate(outputs)]
        return list(
            torch.autograd.grad(outputs, leaves, weights, materialize_grads=True, **settings)
        )

    return bool(leaves) and _disagree(objective, unmodified, leaves, gradients)


def _disagree(
    objective: Objective,
    unmodified: Context,
    leaves: Sequence[Tensor],
    gradients: Callable[..., list[Tensor]],
) -> bool:
    sizes = [float(x.detach().square().mean().sqrt()) or 1.0 for x in leaves]
    directions = [
        _random(x, 100 + i, size) for i, (x, size) in enumerate(zip(leaves, sizes, strict=True))
    ]
    with objective.prepared():
        product = _product(gradients(create_graph=True), leaves, directions)
    quotients = []
    for step in STEPS.get(leaves[0].dtype, STEPS[torch.float32]):
        with unmodified():
            _move(leaves, directions, step)
            ahead = gradients()
            _move(leaves, directions, -2 * step)
            behind = gradients()
            _move(leaves, directions, step)
        quotients.append([(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)])
    whole = math.hypot(*(_distance(q) for q in quotients[0]))
    parts = zip(product, *quotients, strict=True)
    return any(
        min(_distance(p, one), _distance(p, other))
        > max(WRONG * (_distance(one) + 1e-3 * whole), 10 * _distance(one, other))
        for p, one, other in parts
    )


def _product(
    slopes: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> Sequence[Tensor]:
    pairs = [(g, d) for g, d in zip(slopes, directions, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in leaves]
    tracked, vectors = zip(*pairs, strict=True)
    return torch.autograd.grad(tracked, leaves, vectors, materialize_grads=True)


def _move(leaves: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> None:
    with torch.no_grad():
        for leaf, direction in zip(leaves, directions, strict=True):
            leaf.add_(direction, alpha=step)


def _distance(one: Tensor, other: Tensor | float = 0.0) -> float:
    return float((one - other).norm())


def _random(like: Tensor, seed: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _remedy(module: nn.Module, call: Call, unmodified: Context) -> str:
    flat, shape = tree_flatten((call.args, call.kwargs))
    flat = [
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in flat
    ]
    with unmodified():
        args, kwargs = tree_unflatten(flat, shape)
        outputs = tree_flatten(module(*args, **kwargs))[0]
    tensors = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    return _remedy_of(*tensors, also=[type(module).__name__])


def _remedy_of(*outputs: Tensor, also: Sequence[str] = ()) -> str:
    found = list(nodes(outputs))
    texts = [node.name().removeprefix("GeneratedBackwardFor_") for node in found] + list(also)
    for pattern, remedy in REMEDIES:
        if any(re.search(pattern, text) for text in texts):
            return remedy
    own = sorted(
        {n.name().removesuffix("Backward") for n in found if isinstance(n, BackwardCFunction)}
        - OURS
    )
    return OWN.format(names=", ".join(own)) if own else ELSE


OURS = frozenset({"_CrossEntropy", "_LinearCrossEntropy"})
