"""How far a long call is, on standard error: bars with the time left in a terminal; elsewhere, in a
log or a notebook, now and then a line.

A call that takes long shows itself without being asked. Bars are not nested: what is called within
a call that shows itself stays silent.

A sweep over the data can take minutes, and is one call of an operator's. What works within it says
how far it is by :func:`moved`. Whoever shows progress has asked for it by :func:`moving`; nobody in
between hands anything on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from blockspec.numerics.algorithms import Progress
from blockspec.numerics.ranks import is_first

R = TypeVar("R")
Update = Callable[[str, float, float | None], None]
Shown = Progress | bool | None
"""What ``progress=`` takes: a function ``(done, total)``; None for the default, a bar after some
seconds; False for silence.
"""

PATIENCE = 5.0  # seconds until a call that nobody asked about shows itself
EVERY = {"log": 60.0, "notebook": 1.0}  # seconds from one line to the next, where there is no bar

OFTEN = 5.0  # seconds from one word about a sweep that is under way to the next

_within: ContextVar[bool] = ContextVar("within", default=False)
_where: ContextVar[str] = ContextVar("where", default="")


@dataclass(eq=False)
class Sweeps:
    """What is known of a call that makes sweeps.

    Args:
        tell: Called with (products done, in all).
        done: Products before the sweep that is under way.
        total: Of the whole call, as far as known.
        latest: When something was told last.
    """

    tell: Progress
    done: float = 0
    total: float | None = None
    latest: float = field(default_factory=time.monotonic)

    def told(self, done: float, total: float | None = None) -> None:
        """A sweep has ended."""
        self.expect(done, total)
        self.tell(done, total)

    def expect(self, done: float, total: float | None) -> None:
        """So much is done before the first sweep, and so much in all."""
        self.done, self.total, self.latest = done, total, time.monotonic()


@dataclass(eq=False)
class Part:
    """Where a sweep is.

    Args:
        sweeps: That it is one of.
        products: That it makes.
        of: Counts its micro-batches, once somebody wants to know.
        number: Of micro-batches that are done.
    """

    sweeps: Sweeps | None
    products: int = 1
    of: Callable[[], int] = lambda: 1
    number: int = 0


_part: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def moving(tell: Progress) -> Iterator[Progress]:
    """While this is open, ``tell`` is also called within sweeps, now and then. What is handed out
    is called in its place after each.
    """
    sweeps = Sweeps(tell)
    with _opened(Part(sweeps)):
        yield sweeps.told


def expect(done: int, total: int) -> None:
    """Tells, before the first sweep, how many products are done and how many there will be."""
    if (part := _part.get()) is not None and part.sweeps is not None:
        part.sweeps.expect(done, total)


@contextmanager
def sweeping(products: int, of: Callable[[], int]) -> Iterator[Part]:
    """While this is open, a sweep of so many products over ``of()`` micro-batches is made. What is
    handed out has the number of those that are done, which the sweep counts up.
    """
    around = _part.get()
    part = Part(None if around is None else around.sweeps, products, of)
    with _opened(part):
        yield part


@contextmanager
def _opened(part: Part) -> Iterator[None]:
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def moved(share: float, told: str = "") -> None:
    """So much of a micro-batch is done, and here the work is."""
    part = _part.get()
    sweeps = part and part.sweeps
    if not part or not sweeps or time.monotonic() - sweeps.latest < OFTEN:
        return
    sweeps.latest = time.monotonic()
    of = part.of()
    batches = f"micro-batch {part.number + 1} of {of}" if of > 1 else ""
    token = _where.set(", ".join(filter(None, (told, batches))))
    try:
        sweeps.tell(sweeps.done + part.products * (part.number + share) / of, sweeps.total)
    finally:
        _where.reset(token)


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
                with moving(progress) as told:
                    return function(*arguments, progress=told, **named)
            shown = progress is not False and is_first()
            with progress_bars(unit=unit, shown=shown, patience=PATIENCE) as update:

                def show(done: float, total: float | None = None) -> None:
                    update(label, done, total)

                with moving(show) as told:
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

    def update(label: str, done: float, total: float | None) -> None:
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

    def update(label: str, done: float, total: float | None) -> None:
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


def _counted(done: float, total: float | None, unit: str) -> str:
    so_far = f"{done:.1f}" if isinstance(done, float) else f"{done}"
    where = f" ({_where.get()})" if _where.get() else ""
    return f"{so_far}/{total} {unit}{where}" if total else f"{so_far} {unit}{where}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
