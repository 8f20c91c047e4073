"""What every callback does: which steps are due, what is checked before training, a measurement,
and a figure of it. A trainer's own callback brings the model, the number of the step and a place
for scalars.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from blockspec.engine.settings import EstimateSettings
from blockspec.figures.style import save
from blockspec.figures.tracking import tracked_eigenvalues
from blockspec.integrations.recording import check, record
from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.model.training import undisturbed
from blockspec.numerics.ranks import is_first
from blockspec.runs.loading import load_run
from blockspec.runs.settings import BlockSettings
from blockspec.runs.stages import choose_blocks
from blockspec.toolbox.tracking import Tracker, Tracking
from blockspec.toolbox.tracking import track as start_tracking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = "spectrum/blocks"
SAVE_EVERY = 60.0  # seconds between two writes of what is followed


@dataclass(frozen=True)
class TrackSettings(Tracking):
    """What is followed at every n-th step of a training, see :func:`blockspec.track`.

    Args:
        blocks: Which blocks; None: the whole model, as one block.
        examples: Of the first held-out batch, on which the eigenvalues are measured; None: all of
            all batches. A measurement costs about as much as six gradients of them.
        preconditioned: Follow the curvature that the optimizer sees beside that of the loss.
    """

    blocks: BlockSettings | None = None
    examples: int | None = 4
    preconditioned: bool = False


@dataclass(frozen=True)
class CallbackSettings:
    """What every callback takes beside its trainer, its folder, its batches and its loss.

    Args:
        steps: Numbers of updates after which to measure; 0 is the beginning.
        fractions: The same as shares of the whole training.
        blocks: Which blocks; ``BlockSettings(full=False)`` leaves out the full matrix.
        estimate: How well.
        images: Hand a figure of each measurement to the trackers that take one (TensorBoard,
            Weights & Biases).
        track: ``TrackSettings(k=2, every=10)`` follows the top eigenvalues at every 10th step as
            well, see :func:`blockspec.track`; they are logged, and go to ``tracking.parquet``,
            ``localisation.parquet`` and a figure in ``out``.
        memory: See :func:`blockspec.estimate_spectra`.
        columns: See :func:`blockspec.estimate_spectra`.
    """

    steps: Sequence[int] = ()
    fractions: Sequence[float] = (0.0, 1.0)
    blocks: BlockSettings = field(default_factory=BlockSettings)
    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    images: bool = True
    track: TrackSettings | None = None
    memory: int | float | str | None = None
    columns: int | None = None

    def __post_init__(self) -> None:
        due_steps(self.steps, self.fractions, total=1)


class Measuring:
    """Measurements of one training.

    Args:
        out: A folder as ``blockspec run`` leaves it.
        batches: Fixed batches, held out from training.
        loss: See :mod:`blockspec.losses`.
        settings: When, what, and how well.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        batches: Iterable[Any],
        loss: Any,
        settings: CallbackSettings,
    ) -> None:
        self.out, self.batches, self.loss, self.settings = out, batches, loss, settings
        self.due: frozenset[int] = frozenset()
        self.last = -1

    def begin(
        self,
        model: nn.Module,
        *,
        total: int,
        step: int,
        training: Mapping[str, Any],
        optimizer: Any = None,
    ) -> None:
        """Raises before training what would fail in the middle of it."""
        wanted = self.settings
        self.due = due_steps(wanted.steps, wanted.fractions, total=total)
        self.objective = Objective(model, self.batches, self.loss)
        self.chosen: tuple[Block, ...] = choose_blocks(self.objective, wanted.blocks)
        begins = step == 0
        self.training = dict(training)
        told = self.training if begins else None
        check(self.out, self.objective, self.chosen, wanted.estimate, training=told)
        self.replace = not begins  # a resumed training may not be bit by bit the one before
        self.tracker = None
        if wanted.track is not None:
            self.tracker = started(wanted.track, self.objective, optimizer)
        if self.tracker is not None and not begins:
            self.tracker.go_on_from(self.out, step)
        self._saved = time.monotonic()

    def end(self) -> None:
        """After the last step: writes what was followed, and draws it."""
        if self.tracker is not None:
            finished(self.tracker, self.out)

    def measure(self, step: int) -> dict[str, float] | None:
        """The scalars of a step; None where it is not due, or was the last one that was asked
        for.
        """
        if step == self.last:
            return None
        self.last = step
        return ((self._spectra(step) or {}) | self._followed(step)) or None

    def _followed(self, step: int) -> dict[str, float]:
        if self.tracker is None:
            return {}
        found = self.tracker(step)
        if time.monotonic() - self._saved > SAVE_EVERY and is_first():
            self.tracker.save(self.out)
            self._saved = time.monotonic()
        return found

    def _spectra(self, step: int) -> dict[str, float] | None:
        if step not in self.due:
            return None
        return record(
            self.out,
            step,
            self.objective,
            self.chosen,
            memory=self.settings.memory,
            columns=self.settings.columns,
            replace=self.replace,
            training=self.training,
            **asdict(self.settings.estimate),
        )

    def figure(self, step: int) -> Figure | None:
        """Tail counts of the blocks at a step, for a tracker; None but on the first process, and
        where no spectra are due.
        """
        return load_run(self.out)[step].plot() if step in self.due and is_first() else None


def started(track: TrackSettings, objective: Objective, optimizer: Any) -> Tracker:
    """The tracker that the settings ask for.

    Args:
        track: What is followed.
        objective: On all batches that are held out.
        optimizer: The training's own, or several.
    """
    model = objective.model
    with undisturbed(model):  # a loader draws a random number whenever it is read
        if track.examples is not None:
            few = next(objective.batches(track.examples))
            objective = Objective(model, [few], objective.loss)
        blocks = None if track.blocks is None else choose_blocks(objective, track.blocks)
    settings = {f.name: getattr(track, f.name) for f in fields(Tracking)}
    seen = optimizer if track.preconditioned else None
    return start_tracking(objective, blocks, optimizer=seen, **settings)


def finished(tracker: Tracker, out: str | os.PathLike[str]) -> None:
    """Writes what was followed, and draws it; on the first process."""
    if not is_first():
        return
    tracker.save(out)
    if not (table := tracker.table).empty:
        save(tracked_eigenvalues(table), Path(out) / "figures", "tracking")


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
