"""What every callback does: which steps are due, what is checked before training, a measurement,
and a figure of it. A trainer's own callback brings the model, the number of the step and a place
for scalars.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from blockspec.engine.settings import EstimateSettings
from blockspec.integrations.recording import check, record
from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.ranks import is_first
from blockspec.runs.loading import load_run
from blockspec.runs.settings import BlockSettings
from blockspec.runs.stages import choose_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = "spectrum/blocks"


@dataclass
class Measuring:
    """Measurements of one training.

    Args:
        out: A folder as ``blockspec run`` leaves it.
        batches: Fixed batches, held out from training.
        loss: See :mod:`blockspec.losses`.
        steps: Numbers of updates after which to measure; 0 is the beginning.
        fractions: The same as shares of the whole training.
        blocks: Which blocks.
        estimate: How well.
        resources: ``memory`` and ``columns`` of :func:`blockspec.integrations.record`.
    """

    out: str | os.PathLike[str]
    batches: Iterable[Any]
    loss: Any
    steps: Sequence[int]
    fractions: Sequence[float]
    blocks: BlockSettings
    estimate: EstimateSettings
    resources: Mapping[str, Any]
    due: frozenset[int] = field(default=frozenset(), init=False)
    last: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        due_steps(self.steps, self.fractions, total=1)

    def begin(
        self, model: nn.Module, *, total: int, step: int, training: Mapping[str, Any]
    ) -> None:
        """Raises before training what would fail in the middle of it."""
        self.due = due_steps(self.steps, self.fractions, total=total)
        self.objective = Objective(model, self.batches, self.loss)
        self.chosen: tuple[Block, ...] = choose_blocks(self.objective, self.blocks)
        begins = step == 0
        self.training = dict(training)
        told = self.training if begins else None
        check(self.out, self.objective, self.chosen, self.estimate, training=told)
        self.replace = not begins  # a resumed training may not be bit by bit the one before

    def measure(self, step: int) -> dict[str, float] | None:
        """The scalars of a step; None where it is not due, or was the last one that was asked
        for.
        """
        if step not in self.due or step == self.last:
            return None
        self.last = step
        settings = asdict(self.estimate) | dict(self.resources)
        settings |= {"replace": self.replace, "training": self.training}
        return record(self.out, step, self.objective, self.chosen, **settings)

    def figure(self, step: int) -> Figure | None:
        """Tail counts of the blocks at a step, for a tracker; None but on the first process."""
        return load_run(self.out)[step].plot() if is_first() else None


def due_steps(steps: Sequence[int], fractions: Sequence[float], *, total: int) -> frozenset[int]:
    """The numbers of updates after which to measure; a fraction above 0 is at least one update."""
    if wrong := [step for step in steps if operator.index(step) < 0]:
        raise ValueError(f"steps are numbers of updates, at least 0; got {wrong[0]}")
    if outside := [fraction for fraction in fractions if not 0 <= fraction <= 1]:
        raise ValueError(
            f"fractions of training lie between 0 and 1; got {outside[0]}: give numbers of updates "
            "as steps"
        )
    return frozenset(steps) | {
        max(round(fraction * total), int(fraction > 0)) for fraction in fractions
    }
