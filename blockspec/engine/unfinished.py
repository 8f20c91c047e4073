"""Saves a sweep that is under way, beside the state that it began with."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockspec.engine.state import Keeper, read, write
from blockspec.products.operators import Operator
from blockspec.products.unfinished import Unfinished

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SweepKeeper:
    """Between micro-batches, every ``interval`` seconds of the keeper, where a killed process could
    go on from the sweep's beginning: at the first one, or where its state is saved, as it is after
    each sweep that takes longer than that.

    Args:
        keeper: Of the states; it has restored what there was.
    """

    keeper: Keeper
    _last: float = field(default_factory=time.monotonic)
    _found: Unfinished | None = None

    def __post_init__(self) -> None:
        if self.keeper.folder is not None and self.keeper.unfinished.exists():
            self._found = self._restored()

    def _restored(self) -> Unfinished | None:
        path = self.keeper.unfinished
        try:
            tensors, record = read(path)
        except ValueError as error:
            logger.warning(f"{error}; its sweep begins anew")
            return None
        if record["identity"] != json.loads(json.dumps(dict(self.keeper.identity))):
            logger.warning(f"{path} is of another estimate; the sweep begins anew")
            return None
        return Unfinished.of(tensors, record)

    def taken(self) -> Unfinished | None:
        """See :class:`blockspec.products.unfinished.Between`."""
        found, self._found = self._found, None
        self._last = time.monotonic()
        return found

    def after_batch(self, now: Callable[[], Unfinished]) -> None:
        """The same."""
        keeper = self.keeper
        if not keeper.begun_safely or time.monotonic() - self._last < keeper.interval:
            return
        tensors, record = now().content()
        write(keeper.unfinished, tensors, record | {"identity": dict(keeper.identity)})
        self._last = time.monotonic()


def hooks(operator: Operator, keeper: Keeper) -> list[tuple[Any, str, Any]]:
    """What has to be patched so that an operator's sweeps are saved on the way."""
    if keeper.folder is None:
        return []
    inner: Any = operator
    while hasattr(inner, "inner"):
        inner = inner.inner
    return [(inner, "between", SweepKeeper(keeper))] if hasattr(inner, "between") else []
