"""Stages of training in figures: their axis, and what they are called in titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from blockspec.spectra.stages import shortened

Labels = Mapping[int, str]
"""Place -> what a stage is called, where its training step is not known; else empty. See
:func:`blockspec.spectra.stages.stage_labels`."""

LINE = 0.18  # inches that a label takes, turned


def step_axis(
    axes: Axes, steps: Sequence[int], *, width: float, labels: Labels | None = None
) -> None:
    """A logarithmic axis of steps with a place for step 0; ticks at the steps that find room in
    ``width`` inches. With labels, steps are places in an order, one as far from the next as any
    other.
    """
    steps = sorted(steps)
    if labels:
        _axis_of_places(axes, steps, labels, width)
        return
    first = next((step for step in steps if step > 0), 1)
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    place = axes.xaxis.get_transform()
    position = dict(zip(steps, place.transform(np.array(steps, float)), strict=True))
    margin = 0.06 * (position[steps[-1]] - position[steps[0]]) or 0.5
    low, high = position[steps[0]] - margin, position[steps[-1]] + margin
    axes.set_xlim(*place.inverted().transform(np.array([low, high])))
    room = 0.4 / width * (high - low)  # what "1,000" takes, with a gap
    shown: list[int] = []
    for step in [steps[0], *reversed(steps[1:])]:
        if all(abs(position[step] - position[other]) >= room for other in shown):
            shown.append(step)
    axes.set_xticks(shown, [step_label(step) for step in shown])
    axes.xaxis.set_minor_locator(FixedLocator(steps))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training step")


def _axis_of_places(axes: Axes, places: Sequence[int], labels: Labels, width: float) -> None:
    """Of stages that are called by their checkpoints."""
    stride = -(-len(places) // max(int(width / LINE), 1))
    shown, called = places[::stride], _written(labels)
    axes.set_xscale("linear")
    axes.set_xlim(places[0] - 0.3, places[-1] + 0.3)
    axes.set_xticks(shown, [called.get(place, str(place)) for place in shown])
    axes.tick_params(axis="x", labelrotation=30)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    axes.xaxis.set_minor_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("stage, in the order as given")


def step_label(step: int) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:,}"


def stage_title(step: int, labels: Labels | None) -> str:
    """``step 10k``, or the label of a stage whose step is not known."""
    return _written(labels).get(step, f"stage {step}") if labels else f"step {step_label(step)}"


def _written(labels: Labels) -> dict[int, str]:
    short = shortened(labels.values())
    return {place: short[label].replace("$", r"\$") for place, label in labels.items()}
