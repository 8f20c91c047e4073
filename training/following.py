"""Curvature beside the losses: the top eigenvalues at every n-th step of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import blockspec
from blockspec.integrations import TrackSettings
from blockspec.integrations.measuring import finished, started
from blockspec.numerics.ranks import is_first


@dataclass
class Follower:
    """What a training follows, see :func:`blockspec.track`; the training is the same without.

    Values go into the log beside the losses; ``tracking.parquet``, ``localisation.parquet`` and
    ``figures/tracking.png`` are written into the run's folder.

    Args:
        track: What, how often, and on how many examples.
        batches: That are held out.
        loss: As for the training.
    """

    track: TrackSettings
    batches: Iterable[Any]
    loss: Any

    def begin(self, model: nn.Module, optimizer: Any, out: Path, step: int) -> None:
        """Before the first update.

        Args:
            model: In training, not wrapped.
            optimizer: Of the training.
            out: The run's folder.
            step: Updates that were made already; what is known of the steps before is kept.
        """
        self.out = out
        objective = blockspec.Objective(model, self.batches, self.loss)
        self.tracker = started(self.track, objective, optimizer)
        if step:
            self.tracker.go_on_from(out, step)

    def __call__(self, step: int) -> Mapping[str, float]:
        """Scalars for the log; empty where the step is not due."""
        found = self.tracker(step)  # the first measurement has no overlap with one before
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def save(self) -> None:
        """What is known so far, for a training that goes on from a state."""
        if is_first():
            self.tracker.save(self.out)

    def end(self) -> None:
        """After the last step: tables and figure."""
        finished(self.tracker, self.out)


def follower(track: TrackSettings | None, batches: Iterable[Any], loss: Any) -> Follower | None:
    """None where nothing is to be followed."""
    return None if track is None else Follower(track, batches, loss)
