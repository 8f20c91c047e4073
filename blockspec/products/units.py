"""Products of single units of data, before they are summed: what an operator may offer beside
:class:`blockspec.products.operators.Operator`.

A unit is a micro-batch as it goes through the model. Estimators that find :class:`ByUnit` measure
how much their numbers would differ on another sample of data; without it that error is None. An
operator around another one hands the units on::

    def sweep_by_unit(self, requests, each):
        inner = [(block, self.before(block, vector)) for block, vector in requests]
        return self.around.sweep_by_unit(
            inner, lambda number, parts: each(number, [self.after(p) for p in parts])
        )
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.products.operators import Operator

Reduce = Callable[[int, list[Tensor]], Any]
"""``each(number, parts)``: what to keep of the products of one unit with the request of that
number.
"""


class Unit(NamedTuple):
    """One micro-batch: its number of loss terms, and what was kept of its products, request by
    request.
    """

    terms: float
    values: list[Any]


@runtime_checkable
class ByUnit(Operator, Protocol):
    """An operator whose matrix is a mean over units of data that it can tell apart.

    Attributes:
        micro_batch: Examples of a unit; None: batches as they come.
    """

    @property
    def micro_batch(self) -> int | None: ...

    def sweep_by_unit(
        self, requests: Sequence[tuple[Block, Tensor]], each: Reduce
    ) -> tuple[list[Tensor], list[tuple[int, Unit]]]:
        """The products of ``sweep``, to the bit, and the units of this process, each with the
        number of its batch, in the order of the data.

        ``each`` is given every unit's own product, a sum over its loss terms.
        """
        ...


@runtime_checkable
class ColumnsByUnit(Operator, Protocol):
    """An operator that tells the units of its data apart in whole columns of blocks.

    Attributes:
        micro_batch: Examples of a unit; None: batches as they come.
    """

    @property
    def micro_batch(self) -> int | None: ...

    def columns_by_unit(
        self,
        requests: Sequence[tuple[Block, Tensor]],
        targets: Sequence[Block],
        each: Reduce,
        *,
        summed: bool = True,
    ) -> tuple[list[list[Tensor]], list[tuple[int, Unit]]]:
        """The products of ``columns``, to the bit, and the units of this process, each with the
        number of its batch, in the order of the data.

        ``each`` is given every unit's own products with the targets, sums over its loss terms. With
        ``summed=False`` the lists of products are empty: one sweep then serves any number of
        requests in the memory of a few.
        """
        ...
