"""Models that compute in 16 bits, in all or in parts.

Its parameters may have 16 bits, or it rounds inside its own forward pass (an autocast within it, a
cast of its activations, as nanochat does). Its products then have that rounding, which no error bar
of ours holds: eigenvalues were off by 0.5 and 1.2 %. So it is said, with the place and the remedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NARROW = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: "0.4 %", torch.float16: "0.05 %"}


class _Watch(TorchFunctionMode):
    """Notes the first function whose result has fewer bits."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: tuple[str, torch.dtype] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.found is None and isinstance(result, Tensor) and result.dtype in NARROW:
            self.found = (self.running[-1] if self.running else "the loss", result.dtype)
        return result


@contextmanager
def told_if_narrow(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Warns if what runs while this is open computes in 16 bits.

    Args:
        model: What is called.
        dtype: That its parameters are brought to for it; None: they are used as they are.
    """
    narrow = {n: p.dtype for n, p in model.named_parameters() if p.dtype in NARROW}
    if narrow:
        used = dtype or next(iter(narrow.values()))
        if used in NARROW:
            _say(
                f"parameters are computed with in {_short(used)} ({next(iter(narrow))!r} and "
                f"{len(narrow) - 1} more)",
                used,
                "Measure model.float(), or give Objective dtype=torch.float32, which brings a "
                "layer at a time to 32 bits",
            )
        yield
        return
    watch, handles = _Watch(), []
    for name, module in model.named_modules():
        said = f"{name or 'the model'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda *_, s=said: watch.running.append(s)))
        handles.append(
            module.register_forward_hook(lambda *_: _drop(watch.running), always_call=True)
        )
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()
    if watch.found is not None:
        where, rounded = watch.found
        _say(
            f"{where} computes in {_short(rounded)} though the parameters have more bits",
            rounded,
            "Switch the cast off while the curvature is measured; precision='bfloat16' is rounding "
            "that is measured",
        )


def _say(what: str, dtype: torch.dtype, remedy: str) -> None:
    warnings.warn(
        f"{what}: every number there is rounded by up to {ROUNDING[dtype]}, eigenvalues may be off "
        f"by a few times that, and stated errors do not hold it. {remedy}",
        stacklevel=4,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _drop(running: list[str]) -> None:
    if running:
        running.pop()
