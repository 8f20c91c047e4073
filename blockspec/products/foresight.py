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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockspec.model.layer_by_layer import layer_by_layer
from blockspec.model.objective import SAVED, Objective
from blockspec.numerics import memory

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


def fitting(
    objective: Objective, size: int | None, beside: int, *, cut: bool
) -> tuple[int | None, str]:
    """How many examples at once have a whole graph that is foreseen to fit into what is free.

    Args:
        objective: The first of its batches speaks for all.
        size: Of a micro-batch now; None: batches as they come.
        beside: Bytes that the graph of a gradient takes beside what functions keep.
        cut: Fewer examples may go through at once.

    Returns:
        Their number, and why it cannot be the whole graph: empty where it fits.
    """
    room = memory.free(objective.device)
    while (needed := _of_first(objective, size) + beside) > room:
        now = size or objective.largest_batch()
        if not cut or now <= 1 or objective.batch_norm == "train":
            what = "one example" if now == 1 else "one micro-batch"
            told = f"takes {memory.readable(needed)} at least, and {memory.readable(room)}"
            return size, f"the whole graph of {what} {told} are free"
        size = now // 2
    return size, ""


_found: WeakKeyDictionary[Objective, dict[int | None, int]] = WeakKeyDictionary()


def _of_first(objective: Objective, size: int | None) -> int:
    """Bytes of the first micro-batch of that size; they do not change with the weights."""
    found = _found.setdefault(objective, {})
    if size not in found:
        with objective.prepared():
            try:
                found[size] = least_of_graph(objective, next(iter(objective.batches(size))))
            except RuntimeError as error:
                if SAVED not in str(error):
                    raise
                found[size] = 0  # a transform of torch.func in the loss lets nobody look
    return found[size]


def _numbers(tensor: Tensor) -> Tensor:
    """The entries that a tensor stores: of a sparse one, those that are not zero."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.is_sparse else tensor.values()


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
        numbers = _numbers(tensor)
        place = numbers.untyped_storage().data_ptr(), numbers.nbytes
        if place[0] not in self._own and place not in self._seen:
            self._seen.add(place)
            self.total += numbers.nbytes
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
