"""How far a long call is, on standard error: bars with the time left in a terminal; elsewhere, in a
log or a notebook, now and then a line.

A call that takes long shows itself without being asked. Bars are not nested: what is called within
a call that shows itself stays silent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from blockspec.numerics.algorithms import Progress
from blockspec.numerics.ranks import is_first

R = TypeVar("R")
Update = Callable[[str, int, int | None], None]
Shown = Progress | bool | None
"""What ``progress=`` takes: a function ``(done, total)``; None for the default, a bar after some
seconds; False for silence.
"""

PATIENCE = 5.0  # seconds until a call that nobody asked about shows itself
EVERY = {"log": 60.0, "notebook": 1.0}  # seconds from one line to the next, where there is no bar

_within: ContextVar[bool] = ContextVar("within", default=False)


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
    *, unit: str = "products", shown: bool = True, patience: float = 0.0
) -> Iterator[Update]:
    """A function ``(label, done, total)`` that draws a bar for each label, or writes lines.

    Args:
        unit: Of what is counted.
        shown: False: the function does nothing.
        patience: Seconds in which nothing is shown.
    """
    if not shown or _within.get():
        yield lambda label, done, total: None
        return
    token = _within.set(True)
    try:
        with (_bars if _place() == "terminal" else _lines)(unit, patience) as update:
            yield update
    finally:
        _within.reset(token)


def shows_progress(label: str, unit: str = "products") -> Callable[..., Callable[..., Any]]:
    """Lets a function that takes ``progress`` show itself where it is given none."""

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        @wraps(function)
        def call(*arguments: Any, progress: Shown = None, **named: Any) -> R:
            if callable(progress):
                return function(*arguments, progress=progress, **named)
            shown = progress is not False and is_first()
            with progress_bars(unit=unit, shown=shown, patience=PATIENCE) as update:

                def told(done: int, total: int | None = None) -> None:
                    update(label, done, total)

                return function(*arguments, progress=told, **named)

        return call

    return decorate


def _place() -> str:
    """Where standard error goes to: a terminal, a notebook, or a log.

    A notebook is written to as text: bars there would need ipywidgets.
    """
    shell = sys.modules.get("IPython")
    if shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell":
        return "notebook"
    return "terminal" if sys.stderr.isatty() else "log"


@contextmanager
def _bars(unit: str, patience: float) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counted]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, *times, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}
    begun = time.monotonic()

    def update(label: str, done: int, total: int | None) -> None:
        counted = _counted(done, total, unit)
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total, counted=counted)
        bars.update(tasks[label], completed=done, total=total, counted=counted)
        if not bars.live.is_started and time.monotonic() - begun >= patience:
            bars.start()

    try:
        yield update
    finally:
        if bars.live.is_started:
            bars.stop()


@contextmanager
def _lines(unit: str, patience: float) -> Iterator[Update]:
    place = _place()
    last = time.monotonic() + patience - EVERY[place]
    begun: dict[str, float] = {}
    end = "\r" if place == "notebook" else "\n"
    written = False

    def update(label: str, done: int, total: int | None) -> None:
        nonlocal last, written
        now = time.monotonic()
        begun.setdefault(label, now)
        if now - last < EVERY[place]:
            return
        last, written = now, True
        passed = now - begun[label]
        left = f", {_clock(passed * (total - done) / done)} left" if total and done else ""
        line = f"{label}: {_counted(done, total, unit)}, {_clock(passed)} passed{left}"
        print(f"{line:<70}" if end == "\r" else line, end=end, file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        if written and end == "\r":
            print(file=sys.stderr)


def _counted(done: int, total: int | None, unit: str) -> str:
    return f"{done}/{total} {unit}" if total else f"{done} {unit}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
