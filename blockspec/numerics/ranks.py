"""Many processes: which of them hold which blocks and which batches.

Processes form groups. Those of one group share the same blocks and split the batches: their
products are summed once per sweep, and each keeps a part of the Krylov vectors. Groups hold
different blocks and do not talk until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions keep the world of processes that they find when they are imported, and its
    # threads with it, which abort a program at its end. Here there is none yet, most often.
    import torch.distributed.nn

T = TypeVar("T")
Shared = Generator[Tensor, Tensor, T]
"""A computation that yields its own part of a sum over processes, and is sent the whole."""
MANY = 4  # blocks per process from which splitting the blocks alone is balanced


@dataclass(frozen=True)
class Ranks:
    """This process's place: ``column`` of ``columns`` (blocks), ``row`` of ``rows`` (batches)."""

    column: int = 0
    columns: int = 1
    row: int = 0
    rows: int = 1
    group: Any = None  # of the processes of this group

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the processes of the group; one message for all of a dtype."""
        if self.rows == 1:
            return list(tensors)
        results = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[i].flatten().to(self.carrier(tensors[i])) for i in places])
            with _explained():
                dist.all_reduce(flat, group=self.group)
            for i, part in zip(
                places, flat.split([tensors[i].numel() for i in places]), strict=True
            ):
                # A copy: cut from a message it would begin anywhere, and keep all of the message
                results[i] = part.view_as(tensors[i]).to(tensors[i].device, copy=True)
        return results

    def carrier(self, tensor: Tensor) -> torch.device:
        """Where a tensor can be sent from."""
        return torch.device("cuda") if dist.get_backend(self.group) == "nccl" else tensor.device

    def together(self, computations: Sequence[Shared[T]]) -> list[T]:
        """The results of computations that sum over the processes; their messages are sent
        together, round by round.
        """
        results: dict[int, T] = {}
        received: dict[int, Tensor | None] = dict.fromkeys(range(len(computations)))
        while received:
            asked = {}
            for i, tensor in received.items():
                try:
                    asked[i] = computations[i].send(tensor)  # type: ignore[arg-type]
                except StopIteration as end:
                    results[i] = end.value
            received = dict(zip(asked, self.sums(list(asked.values())), strict=True))
        return [results[i] for i in range(len(computations))]

    def share(self, numel: int, row: int | None = None) -> slice:
        """The part of a vector that this process, or another one of the group, keeps."""
        row = self.row if row is None else row
        return slice(row * numel // self.rows, (row + 1) * numel // self.rows)

    def all_of(self, item: T) -> list[T]:
        """Every process's item, in the order of the ranks."""
        return [item] if self.columns * self.rows == 1 else gathered(item)

    def of_column(self, item: T) -> list[T]:
        """The items of the processes of this group."""
        if self.rows == 1:
            return [item]
        items: list[Any] = [None] * self.rows
        with _explained():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def agreed(self, *, first: bool, anyone: bool) -> tuple[bool, bool]:
        """The same two flags on all processes of the group, by one message.

        Args:
            first: That of the group's first process counts: a decision by the clock.
            anyone: That of any process does: one of them was told to stop.
        """
        if self.rows == 1:
            return first, anyone
        flags = torch.tensor([float(first and self.row == 0), float(anyone)])
        due, stop = self.sums([flags])[0].tolist()
        return due > 0, stop > 0


def arrange(num_blocks: int, *, columns: int | None = None) -> Ranks:
    """The grid of the processes that ``torch.distributed`` knows; a single one where it was not
    started.

    Args:
        columns: How many ways to split the blocks; None: all ways where there are many blocks, else
            none.
    """
    if not _several():
        return Ranks()
    world = dist.get_world_size()
    if len(different := set(gathered((num_blocks, columns)))) > 1:
        raise ValueError(
            "processes ask for different numbers of (blocks, columns): "
            f"{sorted(different, key=str)}; every process has to "
            "make the same call"
        )
    columns = columns or (world if num_blocks >= MANY * world else 1)
    if world % columns or columns > num_blocks:
        raise ValueError(
            f"{world} processes cannot split {num_blocks} blocks {columns} ways: give a divisor of "
            f"{world}"
        )
    rows = world // columns
    column, row = divmod(dist.get_rank(), rows)
    return Ranks(column, columns, row, rows, _groups(columns, rows)[column])


_MADE: WeakKeyDictionary[Any, dict[tuple[int, int], list[Any]]] = WeakKeyDictionary()
"""The groups made beside each world of processes. They go when the world is destroyed: a group that
outlived it would keep its threads until the interpreter ends, and abort the program there."""


def _groups(columns: int, rows: int) -> list[Any]:
    """The communication group of each group; made once, because each one holds sockets and threads
    as long as the world of processes stands.
    """
    if columns == 1:
        return [None]  # all processes
    made = _MADE.setdefault(dist.group.WORLD, {})
    if (columns, rows) not in made:
        places = [list(range(c * rows, (c + 1) * rows)) for c in range(columns)]
        made[columns, rows] = [dist.new_group(place) for place in places]
    return made[columns, rows]


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return not _several() or dist.get_rank() == 0


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first process, on all of them; an error there is an error
    everywhere.
    """
    if not _several():
        return make()
    item: list[Any] = [None, None]
    error: Exception | None = None
    if is_first():
        try:
            item[0] = make()
        except Exception as raised:  # the others wait for a word, whatever went wrong
            item[1], error = str(raised) or type(raised).__name__, raised
    with _explained():
        dist.broadcast_object_list(item, src=0)
    if error is not None:
        raise error
    if item[1] is not None:
        raise ValueError(item[1])
    return item[0]


def everywhere(make: Callable[[], T]) -> T:
    """What ``make`` gives on this process; an error on one of them is an error on all, and none
    waits for it.
    """
    try:
        result, error = make(), None
    except Exception as raised:  # the others must hear of it, whatever went wrong
        result, error = None, raised
    told = gathered(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    for number, text in enumerate(told):
        if text is not None:
            raise ValueError(f"process {number} has stopped: {text}")
    return result  # type: ignore[return-value]


def gathered(item: T) -> list[T]:
    """Every process's item, in the order of the processes."""
    if not _several():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    with _explained():
        dist.all_gather_object(items, item)
    return items


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _explained() -> Iterator[None]:
    """Says what a broken connection means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of this run has died or does not answer ({error}); its own message "
            "says why; "
            "the same command goes on from the last saved state"
        ) from error
