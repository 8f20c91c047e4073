"""What groups of units of data have in a sum of products: from this, numbers that are made of
products get errors of the data without one product more.

The operator gives the products of single units before it sums them, see
:mod:`blockspec.products.units`. Of each one something small is kept that is linear in the product:
a dot product, a few sums, a :class:`Sketch`. So what is kept of units adds up to that of groups,
and what the mean of all other units has follows by subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.numerics.jackknife import FEWEST_UNITS
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.units import Layout
from blockspec.products.operators import Operator
from blockspec.products.units import ByUnit, ColumnsByUnit, Unit

Requests = Sequence[tuple[Block, Tensor]]
Keep = Callable[[int, list[Tensor]], np.ndarray]
"""``keep(number, parts)``: what to keep of one unit's products with the request of that number;
linear in them.
"""
Kept = list[np.ndarray] | None
"""Of each request, (n, ...) what was kept, summed over the units of each of n groups; None where
the units are too few, or are not told apart.
"""


@dataclass(eq=False)
class Groups:
    """The group of each unit of a sweep: settled by the first sweep, and the same where memory ran
    out and units are cut finer.

    Args:
        ranks: Processes that split the units.
        layout: None before the first sweep.
    """

    ranks: Ranks
    layout: Layout | None = None
    _own: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    _cut: tuple[int | None] | None = None

    @property
    def too_few(self) -> bool:
        """The units are known, and they are too few for an error."""
        return self.layout is not None and self.layout.units < FEWEST_UNITS

    @property
    def units(self) -> int:
        """How many units there are; 0 where that is not known yet."""
        return 0 if self.layout is None else self.layout.units

    def own(self, units: Sequence[tuple[int, Unit]], micro_batch: int | None) -> np.ndarray:
        """(U,) the groups of this process's units. All processes call this together.

        They are found once, and again where the micro-batch was halved on the way, which all
        processes do together.
        """
        if self._cut == (micro_batch,):
            return self._own
        own = [
            (number, self.ranks.row, place, unit.terms)
            for place, (number, unit) in enumerate(units)
        ]
        told = sorted(unit for part in self.ranks.of_column(own) for unit in part)
        terms = [unit[-1] for unit in told]
        if self.layout is None:
            self.layout = Layout.of(terms)
        groups = self.layout.groups(terms)
        self._own = groups[[unit[1] == self.ranks.row for unit in told]]
        self._cut = (micro_batch,)
        return self._own


class Shares:
    """Asks an operator for products, and keeps what each group of units has in them.

    Args:
        operator: Where it does not tell units apart, nothing is kept.
        wanted: False: nothing is kept.
    """

    def __init__(self, operator: Operator, *, wanted: bool = True) -> None:
        self.operator = operator
        self.groups = Groups(operator.ranks)
        self._wanted = wanted

    @property
    def units(self) -> int:
        """Units of data; 0 where they are not told apart."""
        return self.groups.units

    @property
    def terms(self) -> np.ndarray:
        """(n,) loss terms of each group; known once something was kept."""
        assert self.groups.layout is not None
        return self.groups.layout.terms

    def sweep(self, requests: Requests, keep: Keep) -> tuple[list[Tensor], Kept]:
        """The products of ``operator.sweep``, and what was kept of them."""
        operator = self.operator
        if not self._wanted or self.groups.too_few or not isinstance(operator, ByUnit):
            return operator.sweep(requests), None
        found, units = operator.sweep_by_unit(requests, keep)
        return found, self._kept(units)

    def columns(
        self, requests: Requests, targets: Sequence[Block], keep: Keep
    ) -> tuple[list[list[Tensor]], Kept]:
        """The products of ``operator.columns``, and what was kept of them."""
        operator = self.operator
        if not self._wanted or self.groups.too_few or not isinstance(operator, ColumnsByUnit):
            return operator.columns(requests, targets), None
        found, units = operator.columns_by_unit(requests, targets, keep)
        return found, self._kept(units)

    def _kept(self, units: Sequence[tuple[int, Unit]]) -> Kept:
        """Sums over the groups, from the units of all processes."""
        own = self.groups.own(units, self.operator.micro_batch)  # type: ignore[attr-defined]
        sums = self._sums(own, [unit.values for _, unit in units])
        parts = [part for part in self.operator.ranks.of_column(sums) if part is not None]
        if self.groups.too_few:
            return None
        return [np.sum(each, axis=0) for each in zip(*parts, strict=True)]

    def _sums(self, groups: np.ndarray, values: Sequence[Sequence[np.ndarray]]) -> Kept:
        """None where this process has no units."""
        kept = []
        for rows in zip(*values, strict=True):
            sums = np.zeros((len(self.terms), *rows[0].shape))
            np.add.at(sums, groups, np.stack(rows))
            kept.append(sums)
        return kept or None


SIZE = 128  # numbers of a sketch: squared norms of single products are right to 1/8, means to less


class Sketch:
    """A few numbers of a long vector that have its squared norm in expectation, and its dot
    products with others: sums of its entries with random signs (a random projection; Johnson,
    Lindenstrauss 1984). A short vector is kept whole. What is kept has float32, which is closer
    than an error of the data is known: there is one sketch for every unit.

    Args:
        name: Of the block; the signs depend on it.
        numel: Of the vector.
        device: Where vectors live.
    """

    def __init__(self, name: str, numel: int, device: torch.device) -> None:
        self._signs = None
        if numel > SIZE:
            signs = draw_probe(f"{name}/sketch", numel, seed=0, probe=0, distribution="rademacher")
            self._signs = signs.to(device, torch.int8)

    def __call__(self, vector: Tensor) -> np.ndarray:
        """(SIZE,), or (P,) of a short vector (P,)."""
        if self._signs is None:
            return vector.float().cpu().numpy()
        signed = vector * self._signs
        whole = len(signed) // SIZE * SIZE
        wide = torch.promote_types(vector.dtype, torch.float32)  # float64 takes twenty times longer
        sums = signed[:whole].view(-1, SIZE).sum(0, dtype=wide)
        sums[: len(signed) - whole] += signed[whole:]
        return sums.float().cpu().numpy()
