"""What the stages of a run are called.

A stage is a training step, and is called by it. Where a step is not known, its number is only the
place in the order in which the checkpoints were given, and the stage is called by its checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pandas as pd

LONGEST = 24  # characters of a label in a figure or a printed table


def stage_label(step: int) -> str:
    """Of a stage whose training step is known."""
    return f"step {step}"


def stage_labels(table: pd.DataFrame) -> dict[int, str]:
    """Place -> what a stage is called, of a run's table; empty where the training steps are
    known.
    """
    if "label" not in table:
        return {}
    stages = table[["step", "label"]].drop_duplicates("step").sort_values("step")
    labels = dict(zip(stages["step"].tolist(), stages["label"].tolist(), strict=True))
    return {} if all(label == stage_label(step) for step, label in labels.items()) else labels


def short_labels(table: pd.DataFrame) -> dict[int, str]:
    """:func:`stage_labels`, :func:`shortened`."""
    labels = stage_labels(table)
    short = shortened(labels.values())
    return {place: short[label] for place, label in labels.items()}


def shortened(labels: Iterable[str]) -> dict[str, str]:
    """Label -> what of it finds room: without the folders that all of them share, and without its
    middle where that is still too long; no two are the same.
    """
    paths = {label: label.split("/") for label in labels}
    depth = min((len(parts) for parts in paths.values()), default=1) - 1
    shared = next(
        (i for i in range(depth) if len({parts[i] for parts in paths.values()}) > 1), depth
    )
    texts = {label: _without_middle("/".join(parts[shared:])) for label, parts in paths.items()}
    counts = Counter(texts.values())
    return {label: text if counts[text] == 1 else label for label, text in texts.items()}


def _without_middle(text: str) -> str:
    half = LONGEST // 2 - 1
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"
