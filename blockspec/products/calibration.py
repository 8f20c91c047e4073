"""What products cost: seconds, operations and memory, measured on one micro-batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blockspec.model.blocks import Block
from blockspec.products.operators import Operator

MEASURED = 60  # products that are timed; the others take the time of the nearest one


def _of_added_product(_: Tensor, a: Tensor, b: Tensor, **__: object) -> int:
    return 2 * math.prod(a.shape) * b.shape[-1]


IN_PLACE = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _of_added_product)
"""Products that PyTorch's table does not know: heads in chunks and attention in strips are made of
them.
"""


class Operations(TorchDispatchMode):
    """Counts floating-point operations of products of matrices while it is open, as PyTorch's table
    says.

    PyTorch's own counter follows modules too, by hooks that keep every graph to the end: for layers
    that are built one after the other, those are all of them.

    Attributes:
        total: Operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        result = function(*args, **named)
        packet: Any = getattr(function, "overloadpacket", None)
        if count := IN_PLACE.get(packet):
            self.total += count(*args, **named)
        elif formula := flop_registry.get(packet):
            self.total += formula(*args, **named, out_val=result)
        return result


@dataclass(frozen=True)
class Costs:
    """Of one micro-batch.

    Args:
        gradient: Seconds of one gradient of the whole objective.
        shared: Seconds of the pass that all products of a sweep share.
        blocks: Block name -> (seconds, floating-point operations) of one product.
    """

    gradient: float
    shared: float
    blocks: Mapping[str, tuple[float, float]]


@runtime_checkable
class Calibrated(Operator, Protocol):
    """An operator whose cost can be foreseen and bounded.

    Attributes:
        micro_batch: Examples that go through the model at once; None: batches as they come.
        graphs: Where there are at most so many micro-batches, their graphs are kept from sweep to
            sweep.
        told: How products are made, and why, in words.
    """

    micro_batch: int | None
    graphs: int

    @property
    def told(self) -> str: ...

    def save_memory(self, why: str) -> bool:
        """Takes another way to the products that needs less memory; False where there is none."""
        ...

    def least_memory(self, blocks: Sequence[Block]) -> int:
        """Bytes that one example takes at least, found without taking them, where
        :meth:`save_memory` is possible; else 0.
        """
        ...

    def num_batches(self) -> int:
        """Number of micro-batches."""
        ...

    def largest_batch(self) -> int:
        """Examples of the largest batch."""
        ...

    def rehearse(self, blocks: Sequence[Block], size: int | None) -> None:
        """One shared pass and the product of the deepest block, or as many as are made together,
        on ``size`` examples; None: on a micro-batch.
        """
        ...

    def calibrate(self, blocks: Sequence[Block]) -> Costs:
        """Measures products of the blocks on one micro-batch."""
        ...


def time_products(
    products: Mapping[tuple[str, ...], Callable[[], object]], device: torch.device
) -> dict[tuple[str, ...], tuple[float, float]]:
    """Seconds and floating-point operations of products; of many, every n-th is measured and speaks
    for those behind it.
    """
    stride = -(-len(products) // MEASURED)
    measured = {}
    nearest = (0.0, 0.0)
    for index, (key, product) in enumerate(products.items()):
        if index % stride == 0:
            with Operations() as counter:  # first: on a GPU, each kernel is loaded when it is met
                product()
            seconds = seconds_of(product, device)
            nearest = (seconds, float(counter.total))
        measured[key] = nearest
    return measured


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, from when the device is free until it has finished."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start
