"""Products in less than the parameters' precision, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
def reduced_multiplication(precision: str | None) -> Iterator[None]:
    """``tf32``: matrix products and convolutions of a GPU round their factors to 10 bits; nothing
    changes elsewhere.
    """
    if precision != "tf32":
        yield
        return
    with shared("tf32", _allow_tf32):
        yield


def _allow_tf32() -> Callable[[], None]:
    flags: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = True

    def undo() -> None:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value

    return undo


def reduced_model(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """``bfloat16``: the model is linearised under autocast; the products follow the types that it
    has chosen.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
