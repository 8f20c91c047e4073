"""How much a graph would take at least, without making it.

The graph of a large model may not fit into memory, and on a CPU nothing says so: the system ends
the process. So before it is made, one forward pass is made whose graph is dropped behind each layer
(:mod:`blockspec.model.layer_by_layer`), and what the functions in it keep for a backward pass is
counted. The graph of a gradient, which products need, keeps that and more than as much again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockspec.model.layer_by_layer import layer_by_layer
from blockspec.model.objective import Objective

TIMES = 3  # of what a forward pass keeps; GPT-2 and Llama take 3.8 to 4.5 with their products


def least_of_graph(objective: Objective, batch: Any) -> int:
    """Bytes that the graph of a gradient of one batch takes at least, beside the gradient itself;
    the objective must be prepared.
    """
    own = {p.untyped_storage().data_ptr() for p in objective.model.parameters()}
    seen: set[tuple[int, int]] = set()
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        place = tensor.untyped_storage().data_ptr(), tensor.nbytes
        if place[0] not in own and place not in seen:
            seen.add(place)
            total += tensor.nbytes
        return tensor

    def behind_a_layer(_: Sequence[Tensor]) -> None:
        seen.clear()  # its tensors are gone, and others may lie where they were

    with (
        layer_by_layer(objective.model, behind_a_layer),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        objective.loss_sum(batch)
    return TIMES * total
