"""The one way in which this package changes other people's objects for a while."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


def _own(target: Any, name: str) -> Any:
    """The object's own value; a mark where the class has it and setting it would only hide that."""
    if name in vars(target):
        return vars(target)[name]
    of_the_class = inspect.getattr_static(type(target), name, None)
    if of_the_class is None or hasattr(of_the_class, "__set__"):  # a module's buffer, a property
        return getattr(target, name)
    return _OF_THE_CLASS
