"""Compiled parts of a model or a loss, which compute as they were written while they are measured.

What ``torch.compile`` makes has no second derivative, and is compiled anew for each of the
functions that stand in for PyTorch's own: that takes minutes, and ends in an error. Its
``force_eager`` stance calls the function that was compiled, without compiling anything.

``flex_attention`` is compiled by itself, whoever calls it, and has no first derivative on a CPU and
no second one anywhere. PyTorch has what it computes in differentiable parts too, which take its
place: it keeps matrices of queries x keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from blockspec.model.patching import patched, shared

COMPILER = "torch._dynamo"  # importing it takes seconds; nothing is compiled where nobody has
FLEX = "torch.nn.attention.flex_attention"


@contextmanager
def uncompiled() -> Iterator[None]:
    """While this is open, nothing in the process runs compiled, and nothing is compiled."""
    if COMPILER not in sys.modules:
        yield
        return
    with shared("stance of the compiler", _force_eager):
        yield


def _force_eager() -> Callable[[], None]:
    stack = ExitStack()
    stack.push(torch.compiler.set_stance("force_eager"))
    if FLEX in sys.modules:
        stack.callback(_flex_in_parts())
    return stack.close


def _flex_in_parts() -> Callable[[], None]:
    import torch._dynamo._trace_wrapped_higher_order_op as indexing
    from torch._higher_order_ops.flex_attention import math_attention

    changes = [
        (sys.modules[FLEX], "flex_attention_hop", math_attention),
        (sys.modules[FLEX], "_validate_device", _allow_gradients),  # it refuses them on a CPU
        (sys.modules[FLEX], "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        (indexing, "mod_index", torch.ops.aten.index),  # of a bias[i - j]: one derivative alone
    ]
    stack = ExitStack()
    stack.enter_context(patched(c for c in changes if hasattr(c[0], c[1])))
    return stack.close


def _allow_gradients(query: Tensor, key: Tensor, value: Tensor) -> None:
    pass
