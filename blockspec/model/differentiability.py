"""Finds functions without a second derivative: some raise, and some leave out terms without a
word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from blockspec.model.checkpointing import hiding
from blockspec.model.layer_by_layer import Look, layer_by_layer, weighed
from blockspec.model.objective import Objective
from blockspec.model.suitability import explained, remedy

# the node that `once_differentiable` leaves; it is never run where it leads to no parameter
FORBIDDEN = "torch::autograd::Error"


def check_twice_differentiable(objective: Objective, names: Iterable[str]) -> None:
    """Takes one gradient of the first batch by the parameters named, and looks at its graph. Where
    weights stay elsewhere, it does so a layer at a time.

    Raises:
        ValueError: A custom function of the model forbids a second derivative, or has a backward
            pass that autograd cannot follow (a fused kernel called directly): products would
            silently lack its terms.
    """
    everything = objective.parameters()
    parameters = [everything[name] for name in dict.fromkeys(names)]
    with objective.prepared(), explained():
        batch = next(iter(objective.batches()))
        if objective.weights.elsewhere:
            look = _look_at_layers(objective, parameters)
            with layer_by_layer(objective.model, look):
                total, _ = objective.loss_sum(batch)
            look([total])
        else:
            total, _ = objective.loss_sum(batch)
            _check_hidden([total])
            watched_gradients(total, parameters)


def _look_at_layers(objective: Objective, parameters: Sequence[Tensor]) -> Look:
    """The same of one layer after the other: by the copies that stand in for the parameters, and
    by what comes from below where some of them are there.
    """
    weights, below = objective.weights, False

    def look(outputs: Sequence[Tensor]) -> None:
        nonlocal below
        _check_hidden(outputs)
        every = {id(weights.stand_in(p)) for p in objective.model.parameters()}
        wanted = {id(weights.stand_in(p)) for p in parameters}
        leaves = [
            leaf
            for leaf in leaves_of(outputs)
            if id(leaf) in wanted or (below and id(leaf) not in every)
        ]
        if leaves:
            below = True
            watched_gradients(weighed(outputs), leaves)

    return look


def _check_hidden(outputs: Iterable[Tensor]) -> None:
    if hidden := next(filter(None, map(hiding, nodes(outputs))), None):
        raise ValueError(hidden)


def watched_gradients(total: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a loss with their graph; None where it does not depend on a parameter.

    Raises:
        ValueError: A custom function forbids a second derivative, or its backward pass loses the
            graph.
    """
    lost: set[str] = set()
    handles = [
        node.register_hook(_watch(node, lost))
        for node in nodes([total])
        if isinstance(node, BackwardCFunction)
    ]
    try:
        gradients = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    forbidding = any(
        node.name() == FORBIDDEN for node in nodes(g for g in gradients if g is not None)
    )
    if lost or forbidding:
        named = ", ".join(sorted(lost)) or "a function marked once_differentiable"
        raise ValueError(remedy(f"{named} has no second derivative"))
    return gradients


def nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of the graph behind ``tensors``, once."""
    todo = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions if following is not None]


def leaves_of(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the graphs of tensors, each once."""
    outputs = list(outputs)
    for node in nodes(outputs):
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
    yield from (t for t in outputs if t.requires_grad and t.grad_fn is None)


def _watch(node: Node, lost: set[str]) -> Any:
    """A hook that notes a backward pass whose result has lost the graph that went into it."""

    def hook(inputs: Any, outputs: Any) -> None:
        went_in = any(isinstance(t, Tensor) and t.requires_grad for t in outputs)
        came_out = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        if went_in and not came_out and any(isinstance(t, Tensor) for t in inputs):
            lost.add(node.name().removesuffix("Backward"))

    return hook
