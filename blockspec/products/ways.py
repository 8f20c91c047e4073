"""The two ways to a product: from the graph of the whole model, or a layer at a time.

They give the same numbers to rounding. The whole graph is faster, and its memory grows with the
model's depth; a layer at a time takes the memory of the largest layer and of the tensors between
the layers.
"""

from __future__ import annotations

import warnings
from typing import Any

from blockspec.model.containers import layer_modules
from blockspec.model.objective import Objective
from blockspec.products.boundaries import NoCutError, cut
from blockspec.products.layerwise import Layerwise
from blockspec.products.linearisations import ENDS, Linearised, Tensors, Whole

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
        why: Why products are made in this way, in words; empty where it was asked for.

    Raises:
        ValueError: For another name.
    """

    def __init__(self, objective: Objective, curvature: str, name: str) -> None:
        check_way(name)
        self.name = name
        self.rebuilt = 0
        self.why = ""
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
        return f"{how}, because {self.why}" if self.why else how

    @property
    def is_open(self) -> bool:
        """Whether products are made from the whole graph, and a layer at a time is left."""
        return self.name == "auto" and not self._layerwise and not self.why

    def save_memory(self, why: str) -> bool:
        """Goes on a layer at a time from here on.

        Returns:
            False where that is so already, was not left open, or is not possible.
        """
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
        boundaries, end = cut(
            layers,
            lambda: ENDS[self._curvature](self._objective, batch),
            twice=not self._tried,
            stand_in=self._objective.weights.stand_in,
        )
        boundaries.check_end(end.outputs)
        self._tried = True
        own = self._objective.parameters()
        named = {name: own[name] for name in parameters}
        return Layerwise(boundaries, end, named, parameters, self._count)

    def _count(self) -> None:
        self.rebuilt += 1
