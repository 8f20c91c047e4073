"""The two ways in which this package changes other people's objects for a while: its own, and those
that threads share.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

_OF_THE_CLASS = object()


@contextmanager
def patched(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes, and puts every one of them back on leaving, also when something raises.

    Attributes are put back in the order in which they were set: the setter of an outer object (a
    model's config) may write to inner ones, whose own former values then stand.

    Args:
        changes: ``(object, name of an attribute, value)``, each attribute at most once. The
            attribute must exist. One that belongs to the class (a method) hides behind the new
            value for the time being.
    """
    changes = list(changes)
    before = [(target, name, _own(target, name)) for target, name, _ in changes]
    try:
        for target, name, value in changes:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in before:
            if value is not _OF_THE_CLASS:
                setattr(target, name, value)
            elif name in vars(target):
                delattr(target, name)


_LOCK = Lock()
_HELD: dict[Hashable, tuple[int, Callable[[], None]]] = {}
"""key -> how many hold the change, and what undoes it."""


@contextmanager
def shared(key: Hashable, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """A change of what threads share: made for the first that asks, undone when the last one
    leaves.

    Each of two threads that noted for itself what it found would note what the other one had set,
    and the last to leave would put that back for good.

    Args:
        key: Names the change.
        change: Makes it, and returns what undoes it.
    """
    with _LOCK:
        count, undo = _HELD.get(key) or (0, change())
        _HELD[key] = (count + 1, undo)
    try:
        yield
    finally:
        with _LOCK:
            count, undo = _HELD.pop(key)
            if count > 1:
                _HELD[key] = (count - 1, undo)
            else:
                undo()


def _own(target: Any, name: str) -> Any:
    """The object's own value; a mark where the class has it and setting it would only hide that."""
    if name in vars(target):
        return vars(target)[name]
    of_the_class = inspect.getattr_static(type(target), name, None)
    if of_the_class is None or hasattr(of_the_class, "__set__"):  # a module's buffer, a property
        return getattr(target, name)
    return _OF_THE_CLASS
