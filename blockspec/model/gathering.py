"""Whole tensors of those that are spread over processes.

FSDP2 cuts every parameter along its first axis, a part a process. ``full_tensor`` brings the parts
of one parameter together by a message of its own, and a layer has a dozen of them: the messages
would take longer than the layer. Here the parts of many go in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST = 2**26  # bytes that a message brings, unless one tensor has more: they lie beside the tensors


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those that are spread over processes brought together.

    All processes call this with the same parameters in the same order.
    """
    found = list(tensors)
    with torch.no_grad(), torch._C.DisableTorchFunction():  # no mode has to look at this
        for places in _messages(tensors):
            parts = [tensors[place] for place in places]
            group = _group(parts[0])
            brought = [t.full_tensor() for t in parts] if group is None else _brought(parts, group)  # type: ignore[attr-defined]
            for place, tensor in zip(places, brought, strict=True):
                found[place] = tensor
    return found


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of tensors that go together."""
    open_ones: dict[Any, tuple[list[int], int]] = {}
    for place, tensor in enumerate(tensors):
        if not hasattr(tensor, "full_tensor"):
            continue
        key = (id(_group(tensor)), tensor.dtype, tensor.device)
        places, size = open_ones.pop(key, ([], 0))
        if places and size + tensor.nbytes > MOST:
            yield places
            places, size = [], 0
        open_ones[key] = ([*places, place], size + tensor.nbytes)
    yield from (places for places, _ in open_ones.values())


def _group(tensor: Any) -> Any:
    """The processes that hold equal parts of the first axis; None where it is spread otherwise."""
    mesh, placements = tensor.device_mesh, tensor.placements
    plain = mesh.ndim == 1 and type(placements[0]).__name__ == "Shard" and placements[0].dim == 0
    return mesh.get_group() if plain and tensor.ndim else None


def _brought(tensors: Sequence[Any], group: Any) -> list[Tensor]:
    """Each whole: every process has equally many rows of it, but for the last ones."""
    processes = dist.get_world_size(group)
    rows = [-(-tensor.shape[0] // processes) for tensor in tensors]
    sizes = [n * math.prod(tensor.shape[1:]) for n, tensor in zip(rows, tensors, strict=True)]
    sent_from = torch.device("cuda") if dist.get_backend(group) == "nccl" else tensors[0].device
    sent = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=sent_from)
    for part, tensor in zip(sent.split(sizes), tensors, strict=True):
        own = tensor.to_local().detach().flatten()
        part[: len(own)] = own
    received = sent.new_empty(processes, len(sent))
    dist.all_gather(list(received), sent, group=group)
    parts = received.split(sizes, dim=1)
    return [
        part.reshape(-1)[: tensor.numel()].view(tensor.shape).to(tensor.device, copy=True)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
