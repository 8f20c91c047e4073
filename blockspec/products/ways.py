"""The two ways to a product: from the graph of the whole model, or a layer at a time.

They give the same numbers to rounding. The whole graph is faster, and its memory grows with the
model's depth; a layer at a time takes the memory of the largest layer and of the tensors between
the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from blockspec.model.containers import layer_modules
from blockspec.model.objective import Objective
from blockspec.products.boundaries import Boundaries, NoCutError, cut
from blockspec.products.layerwise import Layerwise
from blockspec.products.linearisations import ENDS, End, Linearised, Tensors, Whole
from blockspec.products.top import Top

WAYS = ("auto", "whole", "layerwise")


def check_way(name: str) -> None:
    """Raises ValueError for a way that there is not."""
    if name not in WAYS:
        raise ValueError(f"products is one of {WAYS}, got {name!r}")


class Way:
    """How the micro-batches of one objective are linearised.

    Args:
        objective: What is differentiated.
        curvature: One of ENDS.
        name: ``"whole"``; ``"layerwise"``, which goes back to ``"whole"`` with a warning where the
            model cannot be cut; ``"auto"``, which is ``"whole"`` until :meth:`save_memory`.

    Attributes:
        rebuilt: How often a layer was built again.
        top: Layers whose graph is held with the loss's, where products are made a layer at a time.
        why: Why products are made in this way, in words; empty where it was asked for.

    Raises:
        ValueError: For another name.
    """

    def __init__(self, objective: Objective, curvature: str, name: str) -> None:
        check_way(name)
        self.name = name
        self.rebuilt = 0
        self.why = ""
        weights = objective.weights
        self.top = Top(wanted=not (weights.elsewhere or weights.sharded))
        self._objective, self._curvature = objective, curvature
        self._layerwise = name == "layerwise" or objective.weights.elsewhere
        self._tried = False

    @property
    def layerwise(self) -> bool:
        """Whether products are made a layer at a time now."""
        return self._layerwise

    @property
    def told(self) -> str:
        """How products are made, and why, in words."""
        how = "a layer at a time" if self._layerwise else "from the whole graph"
        told = f"{how}, because {self.why}" if self.why else how
        if not self._layerwise or not self.top.held:
            return told
        return f"{told}; the graphs of the last {self.top.held} of {self.top.calls} layers are held"

    @property
    def is_open(self) -> bool:
        """Whether products are made from the whole graph, and a layer at a time is left."""
        return self.name == "auto" and not self._layerwise and not self.why

    def save_memory(self, why: str) -> bool:
        """Goes on a layer at a time from here on; where that is so already, holds no layer.

        Returns:
            False where neither is left.
        """
        if self._layerwise and self.top.held:
            self.top.wanted, self.top.held = False, 0
            return True
        if not self.is_open:
            return False
        self._layerwise, self.why = True, why
        return True

    def linearise(self, batch: Any, parameters: Tensors) -> Linearised:
        """The shared pass of one batch."""
        if self._layerwise:
            try:
                return self._by_layers(batch, parameters)
            except NoCutError as error:
                if self._objective.weights.elsewhere:
                    raise ValueError(
                        "weights that stay elsewhere need products a layer at a time, and the "
                        f"model cannot be cut: {error}"
                    ) from None
                if self._tried:
                    raise ValueError(f"{error}; use products='whole'") from None
                self._layerwise, self.why = False, str(error)
                warnings.warn(
                    f"products are made from the whole graph and not a layer at a time: {error}",
                    stacklevel=2,
                )
        return Whole(ENDS[self._curvature](self._objective, batch), parameters)

    def _by_layers(self, batch: Any, parameters: Tensors) -> Linearised:
        layers = layer_modules(self._objective.model)
        if not layers:
            raise NoCutError("the model has no container of layers that are alike")
        if not self._tried:  # which also tells how many layers there are, for those that are held
            self._cut(layers, batch, twice=True)
            self._tried = True
        boundaries, end = self._cut(layers, batch, twice=False)
        own = self._objective.parameters()
        named = {name: own[name] for name in parameters}
        agreed = self._objective.weights.largest
        return Layerwise(boundaries, end, named, parameters, self._count, agreed)

    def _cut(
        self, layers: Mapping[str, nn.Module], batch: Any, *, twice: bool
    ) -> tuple[Boundaries, End]:
        boundaries, end = cut(
            layers,
            lambda: ENDS[self._curvature](self._objective, batch),
            twice=twice,
            stand_in=self._objective.weights.stand_in,
            top=self.top,
        )
        boundaries.check_end(end.outputs)
        return boundaries, end

    def _count(self) -> None:
        self.rebuilt += 1
