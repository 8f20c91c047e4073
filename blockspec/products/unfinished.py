"""A sweep that is under way: what its finished micro-batches have summed up to.

A sweep over much data can take hours. Its sums so far are all that a killed process would lose:
with them, the same sweep goes on from the next micro-batch, and comes to the same numbers bit by
bit, because they are added up in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from blockspec.products.units import Unit


@dataclass(frozen=True, eq=False)
class Unfinished:
    """Of one process.

    Args:
        done: Micro-batches that are in the sums.
        micro_batch: Examples of each; None: batches as they come.
        terms: Loss terms in the sums.
        sums: Of each request, in each target.
        units: What was kept of each micro-batch, with the number of its batch; values are tensors
            or None.
    """

    done: int
    micro_batch: int | None
    terms: float
    sums: Iterable[Sequence[Tensor]]
    units: Sequence[tuple[int, Unit]]

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As tensors by name, and what can be written as JSON."""
        sums = list(self.sums)
        tensors = {
            f"sums/{number}/{place}": part.cpu().contiguous()
            for number, parts in enumerate(sums)
            for place, part in enumerate(parts)
        }
        tensors |= {
            f"units/{number}/{place}": torch.as_tensor(value).cpu().contiguous()
            for number, (_, unit) in enumerate(self.units)
            for place, value in enumerate(unit.values)
            if value is not None
        }
        record = {
            "done": self.done,
            "micro_batch": self.micro_batch,
            "terms": self.terms,
            "targets": [len(parts) for parts in sums],
            "units": [[batch, unit.terms, len(unit.values)] for batch, unit in self.units],
        }
        return tensors, record

    @classmethod
    def of(cls, tensors: dict[str, Tensor], record: dict[str, Any]) -> Unfinished:
        """From :meth:`content`."""
        sums = [
            [tensors[f"sums/{number}/{place}"] for place in range(count)]
            for number, count in enumerate(record["targets"])
        ]
        units = [
            (batch, Unit(terms, [tensors.get(f"units/{number}/{i}") for i in range(count)]))
            for number, (batch, terms, count) in enumerate(record["units"])
        ]
        return cls(record["done"], record["micro_batch"], record["terms"], sums, units)


class Between(Protocol):
    """Is told between the micro-batches of sweeps."""

    def taken(self) -> Unfinished | None:
        """What the sweep that begins goes on from; handed out once."""
        ...

    def after_batch(self, now: Callable[[], Unfinished]) -> None:
        """A micro-batch is done; ``now`` gives what there is."""
        ...


def left(
    between: Between | None, micro_batch: int | None, requests: int, *, by_unit: bool
) -> Unfinished:
    """What a killed sweep has left for one of so many products, cut alike, which keeps something of
    each unit or not; nothing where it does not fit.
    """
    nothing = Unfinished(0, micro_batch, 0.0, [], [])
    found = None if between is None else between.taken()
    if found is None or found.micro_batch != micro_batch:
        return nothing
    units = found.done if by_unit else len(found.units)
    fits = len(list(found.sums)) == requests and len(found.units) == units
    return found if fits else nothing
