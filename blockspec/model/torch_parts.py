"""Parts of torch that have no public name and that this package is better with.

Each is looked for here, once, when the package is imported. Where a version of torch has lost one,
something slower stands in for it, the numbers stay the same, and one warning says what is lost.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

PARTS: dict[str, tuple[str, Any, str]] = {
    "will_execute": (
        "_C._will_engine_execute_node",
        lambda node: True,
        "products through a chunked language-model head compute parts that nobody asked for",
    ),
    "transforms_active": (
        "_C._are_functorch_transforms_active",
        lambda: False,
        "losses that use torch.func need Objective(..., replacements=False)",
    ),
    "batched": (
        "_C._functorch.is_legacy_batchedtensor",
        lambda tensor: False,
        "torch.autograd.grad(..., is_grads_batched=True) needs Objective(..., replacements=False)",
    ),
    "wrapper": (
        "Tensor._make_wrapper_subclass",
        None,
        "the logits of a language model are held whole",
    ),
    "function_mode_at": (
        "_C._get_function_stack_at",
        lambda place: None,
        "products of small models take longer",
    ),
    "function_modes": (
        "_C._len_torch_function_stack",
        lambda: 0,
        "products of small models take longer",
    ),
}
"""Our name -> where torch has it, what stands in for it, and what is lost by that."""


def found(root: Any = torch) -> dict[str, Any]:
    """Our names and what stands behind them; warns once of all that torch does not have."""
    parts, lost = {}, []
    for name, (path, stand_in, price) in PARTS.items():
        try:
            parts[name] = operator.attrgetter(path)(root)
        except AttributeError:
            parts[name] = stand_in
            lost.append(f"torch.{path} ({price})")
    if lost:
        warnings.warn(
            f"torch {torch.__version__} lacks what blockspec is faster with: {'; '.join(lost)}. "
            "The numbers stay the same.",
            stacklevel=2,
        )
    return parts


_found = found()

will_execute: Callable[[Node], bool] = _found["will_execute"]
"""Whether the backward pass that is running needs a node."""
transforms_active: Callable[[], bool] = _found["transforms_active"]
"""Whether a transform of ``torch.func`` (vmap, grad, jvp, …) is being carried out."""
batched: Callable[[Tensor], bool] = _found["batched"]
"""Whether a tensor stands for many, as in ``torch.autograd.grad(..., is_grads_batched=True)``."""
wrapper: Callable[..., Any] | None = _found["wrapper"]
"""Makes a tensor that has a shape and no storage."""
function_modes: Callable[[], int] = _found["function_modes"]
"""How many ``TorchFunctionMode``s are open in this thread."""
function_mode_at: Callable[[int], Any] = _found["function_mode_at"]
"""One of them; 0 is the outermost."""


def function_mode() -> Any:
    """The innermost ``TorchFunctionMode`` that is open in this thread; None where none is."""
    number = function_modes()
    return function_mode_at(number - 1) if number else None
