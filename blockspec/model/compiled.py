"""Compiled parts of a model or a loss, which compute as they were written while they are measured.

What ``torch.compile`` makes has no second derivative, and is compiled anew for each of the
functions that stand in for PyTorch's own: that takes minutes, and ends in an error. Its
``force_eager`` stance calls the function that was compiled, without compiling anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from blockspec.model.patching import shared

COMPILER = "torch._dynamo"  # importing it takes seconds; nothing is compiled where nobody has


@contextmanager
def uncompiled() -> Iterator[None]:
    """While this is open, nothing in the process runs compiled, and nothing is compiled."""
    if COMPILER not in sys.modules:
        yield
        return
    with shared("stance of the compiler", _force_eager):
        yield


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    return partial(stance.__exit__, None, None, None)
