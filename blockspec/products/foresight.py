"""How much a graph would take at least, without making it.

The graph of a large model may not fit into memory, and on a CPU nothing says so: the system ends
the process. So before it is made, one forward pass is made whose graph is dropped behind each layer
(:mod:`blockspec.model.layer_by_layer`), and what the functions in it keep for a backward pass is
counted. The graph of a gradient, which products need, keeps that and more than as much again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.layer_by_layer import layer_by_layer
from blockspec.model.objective import Objective

TIMES = 3  # of what a forward pass keeps; GPT-2 and Llama take 3.8 to 4.5 with their products


def least_of_graph(objective: Objective, batch: Any) -> int:
    """Bytes that the graph of a gradient of one batch takes at least, beside the gradient itself;
    the objective must be prepared.
    """
    with counted(objective.model) as kept:

        def behind_a_layer(_: Sequence[Tensor]) -> None:
            kept.forget()  # its tensors are gone, and others may lie where they were

        with layer_by_layer(objective.model, behind_a_layer):
            objective.loss_sum(batch)
    return TIMES * kept.total


class Kept:
    """What functions keep for a backward pass, beside a module's parameters.

    Attributes:
        total: Bytes so far; a tensor that several functions keep counts once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self._own = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._seen: set[tuple[int, int]] = set()

    def add(self, tensor: Tensor) -> Tensor:
        """Counts a tensor, and returns what is kept of it: an output that a function kept with its
        graph would keep the function in turn, and nothing frees the two.
        """
        place = tensor.untyped_storage().data_ptr(), tensor.nbytes
        if place[0] not in self._own and place not in self._seen:
            self._seen.add(place)
            self.total += tensor.nbytes
        return tensor.detach()

    def forget(self) -> None:
        """From here on a tensor at the place of an earlier one is another one."""
        self._seen.clear()


@contextmanager
def counted(module: nn.Module) -> Iterator[Kept]:
    """Counts what functions keep while it is open."""
    kept = Kept(module)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept
