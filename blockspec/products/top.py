"""The last layers of a pass, whose graph is held with that of the loss behind them.

A layer that is cut out costs a direction three passes, one that is held two, and nothing has to be
built again. The last layers are those that all directions pass: whatever memory there is serves
best there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from blockspec.products.foresight import counted

BUDGET = 2**29  # bytes, where nobody says how much memory there is
MOST = 2  # layers then: a deeper model takes no more
TIMES = 2  # of what a layer's forward pass keeps: GPT-2 and Llama were seen to take 1 to 2


@dataclass(eq=False)
class Top:
    """Says of each call of a layer whether its graph is held.

    Args:
        budget: Bytes for their graphs; None: BUDGET, and no more than MOST layers.
        wanted: False: no layer is held.

    Attributes:
        calls: Of layers, in one pass; 0 where it is not known yet, and none is held.
        held: How many were held in the latest pass.
    """

    budget: int | None = None
    wanted: bool = True
    calls: int = 0
    held: int = 0
    _number: int = 0
    _largest: int = 0

    def begin(self) -> None:
        """A pass begins."""
        self._number = self._largest = self.held = 0

    def end(self) -> None:
        """It has ended: from now on it is known how many calls it has."""
        self.calls = self._number

    def holds_next(self) -> bool:
        """Whether the graph of the next call is held. Half of the layers at least are not: the
        largest of those before it stands for its size.
        """
        self._number += 1
        left = self.calls - self._number + 1
        held = self.wanted and 0 < left <= min(self._fitting(), self.calls // 2)
        self.held += held
        return held

    def _fitting(self) -> int:
        size = max(TIMES * self._largest, 1)
        return min(BUDGET // size, MOST) if self.budget is None else self.budget // size

    @contextmanager
    def measured(self, module: nn.Module) -> Iterator[None]:
        """A layer is called, and what its forward pass keeps is counted."""
        if not self.wanted:
            yield
            return
        with counted(module) as kept:
            yield
        self._largest = max(self._largest, kept.total)
