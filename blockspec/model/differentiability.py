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
from blockspec.model.objective import Objective
from blockspec.model.suitability import explained, remedy

# the node that `once_differentiable` leaves; it is never run where it leads to no parameter
FORBIDDEN = "torch::autograd::Error"


def check_twice_differentiable(objective: Objective, names: Iterable[str]) -> None:
    """Takes one gradient of the first batch by the parameters named, and looks at its graph.

    Raises:
        ValueError: A custom function of the model forbids a second derivative, or has a backward
            pass that autograd cannot follow (a fused kernel called directly): products would
            silently lack its terms.
    """
    everything = objective.parameters()
    parameters = [everything[name] for name in dict.fromkeys(names)]
    with objective.prepared(), explained():
        total, _ = objective.loss_sum(next(iter(objective.batches())))
        if hidden := next(filter(None, map(hiding, nodes([total]))), None):
            raise ValueError(hidden)
        watched_gradients(total, parameters)


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


def _watch(node: Node, lost: set[str]) -> Any:
    """A hook that notes a backward pass whose result has lost the graph that went into it."""

    def hook(inputs: Any, outputs: Any) -> None:
        went_in = any(isinstance(t, Tensor) and t.requires_grad for t in outputs)
        came_out = any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        if went_in and not came_out and any(isinstance(t, Tensor) for t in inputs):
            lost.add(node.name().removesuffix("Backward"))

    return hook
