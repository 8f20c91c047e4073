"""Parts of a model that compute in 16 bits though its parameters have more.

A model may round inside its own forward pass (an autocast within it, a cast of its activations, as
nanochat does). Its products then have that rounding, which no error bar of ours holds: eigenvalues
were off by 1.2 %. So it is said, with the module and the remedy.
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
def told_if_narrow(model: nn.Module) -> Iterator[None]:
    """Warns if what runs while this is open computes in 16 bits, and no parameter has so few."""
    if any(p.dtype in NARROW for p in model.parameters()):
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
        where, dtype = watch.found
        short = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{where} computes in {short} though the parameters have more bits: every number there "
            f"is rounded by up to {ROUNDING[dtype]}, eigenvalues may be off by a few times that, "
            "and stated errors do not hold it. Switch the cast off while the curvature is "
            "measured; precision='bfloat16' is rounding that is measured",
            stacklevel=2,
        )


def _drop(running: list[str]) -> None:
    if running:
        running.pop()
