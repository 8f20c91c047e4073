"""Activation checkpointing, switched off.

``torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`` runs its part of the model inside a
function of its own that autograd cannot look into: ``torch.autograd.grad`` finds no way to the
parameters in there and takes them for unused, without a word, and whatever was computed from inputs
without a gradient (token embeddings) is cut off altogether. Models switch it off in eval mode only
if they ask for it themselves. The other kind computes its part again in the backward pass, where
what replaces kernels for the forward pass may not be at work. A double backward keeps all
activations anyway, so nothing is lost by calling that part directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch.autograd.graph import Node

from blockspec.model.patching import shared

REENTRANT = "CheckpointFunction"  # what torch, fairscale, DeepSpeed and Megatron call theirs
REVERSIBLE = "Revers"  # Reformer's _ReversibleFunction and its like


def hiding(node: Node) -> str:
    """What to say of a node of the graph that hides parameters; empty for other nodes."""
    if REVERSIBLE in node.name():
        return (
            f"the model has reversible layers ({node.name()}), which compute themselves anew in a "
            "backward pass of their own and hide the parameters in there from second derivatives: "
            "it cannot be measured, unless the layers are called as ordinary ones"
        )
    if REENTRANT not in node.name():
        return ""
    return (
        f"the model checkpoints activations in the reentrant way ({node.name()}), which hides the "
        "parameters in there from "
        "second derivatives; use checkpoint(..., use_reentrant=False) or switch checkpointing off"
    )


class _Direct:
    """In the place of torch's reentrant function."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *arguments: Any) -> Any:
        return function(*arguments)


def _direct_generator(*arguments: Any, **settings: Any) -> Iterator[None]:
    """In the place of what torch's other kind does before and after the call."""
    yield


DIRECT = {
    "CheckpointFunction": _Direct,
    "_checkpoint_without_reentrant_generator": _direct_generator,
}
"""Names in ``torch.utils.checkpoint`` -> what stands there for the time being."""


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """While this is open, what torch would checkpoint is called directly."""
    with shared("checkpoints", _call_directly):
        yield


def _call_directly() -> Callable[[], None]:
    module: Any = torch.utils.checkpoint
    before = {name: getattr(module, name) for name in DIRECT if hasattr(module, name)}
    vars(module).update({name: DIRECT[name] for name in before})
    return partial(vars(module).update, before)
