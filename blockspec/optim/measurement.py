"""What AdaHessian measures with: signs that are the same everywhere, the leaves of a loss, a loss
that hands out what is known, and a rule for curvature that is not finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockspec.model.blocks import shaped
from blockspec.model.checkpointing import hiding


def signs(parameters: Sequence[Tensor], key: str) -> list[Tensor]:
    """Random signs in the shapes of the parameters: a function of the key alone, the same on every
    device.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    sizes = [p.numel() for p in parameters]
    packed = torch.randint(-(2**63), 2**63 - 1, (sum(sizes) // 64 + 1,), generator=generator).view(
        torch.uint8
    )
    kinds = {(p.device, p.dtype) for p in parameters}
    flat = {
        kind: unpacked(packed.to(kind[0]), kind[1])[: sum(sizes)].split(sizes) for kind in kinds
    }
    return [shaped(flat[p.device, p.dtype][i], p) for i, p in enumerate(parameters)]


def finite(diagonal: Tensor, last: Tensor | None) -> Tensor | None:
    """The diagonal with something finite in each place that is NaN, infinite, or infinite when
    squared: what stood there last, else the mean of what is finite. None where there is neither.

    Args:
        last: The square of the last diagonal, averaged, as the optimizer keeps it.
    """
    known = is_finite(diagonal)
    if last is not None:
        return torch.where(known, diagonal, last.sqrt())
    if not known.any():
        return None
    return torch.where(known, diagonal, diagonal[known].abs().mean())


def is_finite(diagonal: Tensor) -> Tensor:
    """Which entries are finite, and their squares too."""
    return diagonal.abs() <= torch.finfo(diagonal.dtype).max ** 0.5


def suspects(diagonals: Sequence[Tensor]) -> list[int]:
    """Which diagonals may hold entries that are not finite; the device is asked once."""
    if not diagonals:
        return []
    norms = [norm.to(diagonals[0].device) for norm in torch._foreach_norm(list(diagonals))]
    squares = torch.stack([norm.to(torch.float64) for norm in norms])
    limits = [torch.finfo(diagonal.dtype).max ** 0.5 for diagonal in diagonals]
    return [
        i
        for i, (norm, limit) in enumerate(zip(squares.tolist(), limits, strict=True))
        if not norm <= limit
    ]


def keep_freed_memory() -> None:
    """Lets the allocator of the whole process keep 64 MB of freed memory, from here to its end; for
    small models on a CPU.

    glibc gives freed memory back to the system when it is large: the graph of a small model is
    given back and faulted in anew on every step of an optimizer that measures, a fifth of its time.
    It keeps twice the largest mapping that was freed so far, of which 32 MB count: so one of that
    size is made and freed here. Other allocators (jemalloc, a GPU's) are not affected.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


class Measured(torch.autograd.Function):
    """A loss whose gradients are known already; its backward pass tells by what factor they are
    wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        gradients: list[Tensor],
        gather: Callable[[Tensor], None],
        *leaves: Tensor,
    ) -> Tensor:
        ctx.gradients, ctx.gather = gradients, gather
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        ctx.gather(factor)
        return None, None, None, *torch._foreach_mul(ctx.gradients, factor)


def unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) bytes -> (8 n,) signs: only bits are drawn on the CPU and travel to the device."""
    bits = (
        torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device)
        & 1
    )
    return (2 * bits - 1).to(dtype).index_select(0, packed.int()).view(-1)


def leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor whose ``.grad`` ``loss.backward()`` would fill, those of other optimizers
    too.
    """
    leaves: dict[Tensor, None] = {}
    nodes = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if message := hiding(node):
            raise RuntimeError(
                f"{message}, or compute the loss within optimizer.second_order(model)"
            )
        if type(node).__name__ == "AccumulateGrad":
            leaves[node.variable] = None
        new = [
            child
            for child, _ in getattr(node, "next_functions", ())
            if child is not None and child not in seen
        ]
        seen.update(new)
        nodes.extend(new)
    return list(leaves)


@contextmanager
def explained() -> Iterator[None]:
    """Says what to do about a loss that cannot be differentiated twice."""
    try:
        yield
    except ValueError as error:  # a function of the model has no second derivative
        raise RuntimeError(str(error)) from error
    except (RuntimeError, NotImplementedError) as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "the graph of this loss is gone: an earlier backward pass has freed it. Two losses "
                "that share a part of their "
                "graph are added and differentiated once, optimizer.backward(first + second); or "
                "the first one keeps "
                "the graph, optimizer.backward(first, retain_graph=True)"
            ) from error
        if "not implemented" in str(error) or "double backward" in str(error):
            raise RuntimeError(
                f"the loss cannot be differentiated twice ({error}); compute it within "
                "`with optimizer.second_order(model):`, which replaces fused attention, and runs "
                "compiled models as they were written"
            ) from error
        raise


def num_processes() -> int:
    """Of the process group; 1 without one."""
    several = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if several else 1


def mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor averaged over the processes."""
    if num_processes() == 1:
        return list(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
    return list(torch._foreach_div(tensors, num_processes()))
