"""Products in less than the parameters' precision, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from blockspec.model.patching import shared

PRECISIONS = ("tf32", "bfloat16")


def check(precision: str | None) -> None:
    """Raises ValueError for a precision that there is not."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"precision is one of {PRECISIONS}, or None for that of the parameters; got "
            f"{precision!r}"
        )


@contextmanager
def reduced_multiplication(precision: str | None, device: torch.device) -> Iterator[None]:
    """``tf32``: matrix products and convolutions of a GPU round their factors to 10 bits. Without
    it they do not, whatever is set for training: PyTorch lets convolutions do so from the start.
    """
    allowed = precision == "tf32"
    if not (allowed or device.type == "cuda"):
        yield
        return
    with shared(f"tf32 {allowed}", partial(_let_tf32, allowed)):
        yield


def _let_tf32(allowed: bool) -> Callable[[], None]:
    """PyTorch has two ways to say it, and an error for who reads one after having set the other."""
    backends: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    places: tuple[Any, ...] = (backends[0], backends[1].conv, backends[1].rnn)
    named = [place.fp32_precision for place in places]
    try:
        before = [backend.allow_tf32 for backend in backends]
    except RuntimeError:  # set by name
        before = []
        for place in places:
            place.fp32_precision = "tf32" if allowed else "ieee"
    for backend, _ in zip(backends, before, strict=False):
        backend.allow_tf32 = allowed

    def undo() -> None:
        for backend, value in zip(backends, before, strict=False):
            backend.allow_tf32 = value
        for place, name in zip(places, named, strict=True):
            place.fp32_precision = name

    return undo


def reduced_model(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """``bfloat16``: the model is linearised under autocast; the products follow the types that it
    has chosen.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
