"""Models whose attention can be differentiated twice, whichever kernel they call.

Fused attention kernels have no second derivative. Here every call of
``scaled_dot_product_attention`` is answered by one of two functions that have one: PyTorch's own
composition of differentiable parts (its MATH backend), which keeps several matrices of queries x
keys, and :func:`blockspec.model.attention.attention`, which keeps none. The second is chosen where
sequences are so long that it is faster or takes much less memory.

PyTorch's choice of a backend is a flag of the whole process: another thread that sets and restores
it at the wrong moment leaves flash attention switched off for good, and a model that opens its own
``sdpa_kernel`` overrides it. So flags are left alone here (but for compiled models). A
``TorchFunctionMode`` belongs to one thread, and sees the call before a backend is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from blockspec.model import torch_parts
from blockspec.model.attention import attention, transformed
from blockspec.model.implementations import switched
from blockspec.model.lengths import is_long, say_once
from blockspec.model.normalisation import NORMS
from blockspec.model.patching import shared
from blockspec.model.walks import modules_of


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """While this is open, attention in ``model`` can be differentiated twice; afterwards all is as
    it was.

    Works for everything that calls ``torch.nn.functional.scaled_dot_product_attention`` in this
    thread (nanoGPT, timm, torchtitan, Hugging Face's default), within a ``sdpa_kernel`` context of
    its own too, and for Hugging Face models of any implementation. The values are the same up to
    rounding. A kernel of another library that is called directly cannot be replaced; the error of
    its backward pass is explained by :mod:`blockspec.products.curvature`.
    """
    with switched(model), _matrices_alone(model), _Replaced():
        yield


class _Replaced(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return REPLACED.get(function, function)(*args, **(kwargs or {}))


_PAUSED: ContextVar[_Replaced | None] = ContextVar("paused", default=None)


@contextmanager
def paused() -> Iterator[None]:
    """While this is open, functions are PyTorch's own again, where no forward pass is made.

    The mode sees every call of a function or a property of tensors, and each costs 4 microseconds
    more: for a small model as much in all as its products.
    """
    mode = torch_parts.function_mode()
    if not isinstance(mode, _Replaced):
        yield
        return
    mode.__exit__(None, None, None)
    token = _PAUSED.set(mode)
    try:
        yield
    finally:
        _PAUSED.reset(token)
        mode.__enter__()


@contextmanager
def resumed() -> Iterator[None]:
    """Within :func:`paused`: a forward pass is made all the same."""
    mode = _PAUSED.get()
    if mode is None:
        yield
        return
    token = _PAUSED.set(None)
    try:
        with mode:
            yield
    finally:
        _PAUSED.reset(token)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As that of PyTorch, differentiable twice."""
    if query.is_nested:
        return _nested(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and hasattr(
        attn_mask, "_materialize"
    ):  # a CausalBias, whose module takes a second to import
        attn_mask = attn_mask._materialize(query.device)
    query, key, value, attn_mask = _as_autocast_has_them(query, key, value, attn_mask)
    if is_long(query.shape[-2], key.shape[-2], query.device, causal=is_causal):
        reason = _beyond(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if reason is None:
            return _linear(query, key, value, attn_mask, is_causal, scale)
        say_once(reason)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        seen = attn_mask
        attn_mask = query.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)
    with torch.autocast(query.device.type, enabled=False):
        return torch._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _beyond(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """What :func:`attention` cannot express in a call, or None."""
    if dropout_p > 0:
        return "dropout of attention weights"
    if attn_mask is not None and (attn_mask.requires_grad or is_causal):
        return (
            "a mask that requires gradients" if attn_mask.requires_grad else "a mask beside causal"
        )
    if transformed():
        return "a transform of torch.func"
    if attn_mask is not None and attn_mask.dim() > (4 if query.dim() <= 4 else 3):
        return "a mask of a dimension for each of many batches"
    fits = key.shape[-3:-2] == value.shape[-3:-2]
    fits = fits and (enable_gqa or query.shape[-3:-2] == key.shape[-3:-2])
    if not fits or not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return "a product of different batches or heads"
    return None


def _linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """:func:`attention` for any number of batch dimensions, none included."""
    q, k, v = (
        t.reshape(-1, *t.shape[-3:]) if t.dim() > 4 else t[(None,) * (4 - t.dim())]
        for t in (query, key, value)
    )
    out = attention(q, k, v, causal=is_causal, mask=attn_mask, scale=scale)
    return out.view(*query.shape[:-1], value.shape[-1])


def _as_autocast_has_them(*tensors: Tensor | None) -> list[Any]:
    """Cast as an open ``torch.autocast`` would, which sees PyTorch's own function alone."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    ]


def _matrices_alone(model: nn.Module) -> AbstractContextManager[None]:
    """Compiled models (TorchScript, exported graphs) call past Python: for them the flags of the
    process are set.
    """
    kinds = {kind.__name__ for module in modules_of(model) for kind in type(module).__mro__}
    compiled = kinds & {"ScriptModule", "GraphModule"}
    return shared("attention backends", _set_flags) if compiled else nullcontext()


def _set_flags() -> Callable[[], None]:
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack.close


def _nested(*given: Any, **settings: Any) -> Tensor:
    """Nested tensors choose by the flags of the process, which are set for the moment of the
    call.
    """
    with shared("attention backends", _set_flags):
        return F.scaled_dot_product_attention(*given, **settings)


def _rebound(function: Any, **names: Any) -> Any:
    """A function of ``torch.nn.functional`` that finds other functions behind names that it calls.

    A call that the mode answers runs without the mode, and with it all the calls inside.
    """
    behind = {**vars(F), **names}
    copy = FunctionType(function.__code__, behind, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


REPLACED = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: _rebound(
        F.multi_head_attention_forward,
        scaled_dot_product_attention=scaled_dot_product_attention,
        has_torch_function=lambda tensors: False,
    ),
    **NORMS,
}
"""PyTorch's function -> ours. Norms are right to the second order; they are here for the third."""
