"""One walk over the modules of a model, for all who want something of them.

Preparing a model asks every module some ten questions: is it in training mode, has it a config, a
buffer, a weight norm? Each question in a file of its own is readable, but ten walks take as long as
a tenth of a small model's product. So whoever opens several such contexts walks once
(:func:`walked`), and each of them takes what was found (:func:`modules_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_WALKED: ContextVar[tuple[nn.Module, Sequence[nn.Module]] | None] = ContextVar(
    "walked", default=None
)


@contextmanager
def walked(model: nn.Module) -> Iterator[None]:
    """While this is open, :func:`modules_of` gives the modules that the model has now."""
    token = _WALKED.set((model, tuple(model.modules())))
    try:
        yield
    finally:
        _WALKED.reset(token)


def modules_of(model: nn.Module) -> Sequence[nn.Module]:
    """Every module of a model once, the model itself first."""
    known = _WALKED.get()
    return known[1] if known is not None and known[0] is model else tuple(model.modules())
