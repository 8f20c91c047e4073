"""Bars with the time left, on standard error, for whatever takes a ``progress`` function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(label: str, *, unit: str = "products") -> Iterator[Callable[..., None]]:
    """A bar for one call: ``with progress_bar("loss", unit="points") as bar: landscape(...,
    progress=bar)``.

    Where the caller does not know its end (traces that stop at a tolerance), the bar has none.
    """
    with progress_bars(unit=unit) as update:
        yield lambda done, total=None: update(label, done, total)


@contextmanager
def progress_bars(
    *, unit: str = "products", shown: bool = True
) -> Iterator[Callable[[str, int, int | None], None]]:
    """A function ``(label, done, total)`` that draws a bar for each label."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counted]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def update(label: str, done: int, total: int | None) -> None:
            counted = f"{done}/{total} {unit}" if total else f"{done} {unit}"
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total, counted=counted)
            bars.update(tasks[label], completed=done, total=total, counted=counted)

        yield update
