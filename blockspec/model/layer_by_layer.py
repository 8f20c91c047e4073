"""A forward pass whose graph is never longer than one layer.

Some questions need a look at the graph of every layer, and no derivative that leads through all of
them: is the value the same twice, has every function a second derivative, how long does a gradient
take. For these the outputs of each layer are looked at as soon as they are there, and go on without
what they were made from. So one graph lives at a time, and with it what a layer computed with:
its activations, and the copies of weights that stay elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from blockspec.model.containers import layer_modules
from blockspec.model.patching import patched

Look = Callable[[Sequence[Tensor]], None]
"""What is done with the outputs of a layer that have a graph."""


def forget_graph(outputs: Sequence[Tensor]) -> None:
    """Looks at nothing."""


@contextmanager
def layer_by_layer(model: nn.Module, look: Look = forget_graph) -> Iterator[None]:
    """While this is open, the graph of a forward pass begins anew behind each layer.

    What comes out of a pass (the loss) has the graph from the last layer on; a caller looks at that
    itself. A model without layers has its whole graph there.

    Args:
        model: Its layers' ``forward`` are wrapped for the time being.
        look: Called with the outputs of each layer that have a graph. That graph may begin before
            the layer (at embeddings, or at what lies between two layers), so that several looks may
            lead through a part of it: backward passes have to retain it.
    """
    changes = [
        (layer, "forward", partial(_called, layer.forward, look))
        for layer in layer_modules(model).values()
    ]
    with patched(changes):
        yield


def _called(original: Any, look: Look, *arguments: Any, **named: Any) -> Any:
    """Stands in the place of the ``forward`` of a layer."""
    given = {id(a) for a in tree_flatten((arguments, named))[0]}
    results, form = tree_flatten(original(*arguments, **named))
    places = [
        place
        for place, result in enumerate(results)
        if isinstance(result, Tensor) and result.requires_grad and id(result) not in given
    ]
    if not places or not torch.is_grad_enabled():
        return tree_unflatten(results, form)
    look([results[place] for place in places])
    for place in places:  # a copy, because what is behind may write into it
        results[place] = results[place].detach().requires_grad_().clone()
    return tree_unflatten(results, form)


def weighed(outputs: Sequence[Tensor]) -> Tensor:
    """The sum of all entries of outputs, each times a number that is always the same: what stands
    for the loss behind a layer.

    The numbers differ from entry to entry, because equal ones may give a sum that depends on
    nothing (behind a layer norm). They have a graph, as the gradients that arrive in a backward
    pass do.
    """
    return torch.stack([(output * _numbers_like(output)).sum() for output in outputs]).sum()


def _numbers_like(output: Tensor) -> Tensor:
    numbers = torch.arange(1.0, output.numel() + 1, device=output.device)
    return numbers.cos_().to(output.dtype).view(output.shape).requires_grad_()
