"""Parameters that are moved for a moment, and put back bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blockspec.model.blocks import Block, scatter


@contextmanager
def shifted(
    parameters: Mapping[str, Tensor], changes: Mapping[str, Tensor], scale: float = 1.0
) -> Iterator[None]:
    """While this is open, every parameter named in ``changes`` has moved by ``scale`` times its
    change.
    """
    first = {name: parameters[name].detach().clone() for name in changes}
    try:
        with torch.no_grad():
            for name, change in changes.items():
                parameters[name].add_(_placed(change, parameters[name]), alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for name, value in first.items():
                parameters[name].copy_(value)


def _placed(change: Tensor, parameter: Tensor) -> Tensor:
    """As the parameter lies: in its type, on its device, and spread over processes as it is."""
    if not hasattr(parameter, "full_tensor"):
        return change.to(parameter)
    from torch.distributed.tensor import distribute_tensor

    whole = change.to(parameter.device, parameter.dtype)
    own: Any = parameter
    return distribute_tensor(  # all processes have the whole of it
        whole, own.device_mesh, own.placements, src_data_rank=None
    )


def joined(vectors: Mapping[Block, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors (P_b,) of disjoint blocks as one set of tensors in the shapes of the parameters; zero
    outside of the blocks.
    """
    tensors: dict[str, Tensor] = {}
    for block, vector in vectors.items():
        for name, part in scatter(block, vector, parameters).items():
            tensors[name] = tensors[name] + part if name in tensors else part
    return tensors
