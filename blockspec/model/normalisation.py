"""Layer, batch and instance norms with right third derivatives, and second ones that are cheap.

Background. All of them subtract a mean and divide by a standard deviation, over some dimensions:

    n = (x - mean x) r,    r = 1 / sqrt(var x + eps)

With P u = u - mean u - n mean(u n), where means run over those dimensions, the derivative of any
u'n by x is r P u, and that of r is -r^2 n / D. So the backward pass is s = r P g. Along a tangent t
its own backward pass is r P t by g, and

    -r^2 (n mean(t P g) + mean(n g) P t + mean(n t) P g)

by x. The factors n, r, s and mean(n g) never change, and are kept. Everything is brought to the
form of a layer norm over the last dimension, since PyTorch has a fast function for r P u there.

PyTorch's fused functions are right to the second order. Their third derivatives are wrong (torch
2.13: ``torch.autograd.gradgradcheck`` of a gradient of ``layer_norm`` or ``batch_norm`` fails), and
so are second ones under ``torch.func.vmap``: mean and deviation count as constants there. In these
cases n is made of elementary operations.

Third derivatives are asked for by losses that take gradients themselves (gradient penalties,
physics-informed losses, MAML), and by no others: a product is a second derivative of the loss. Such
a loss differentiates the norm while it is still being computed. So a small layer norm, for which
PyTorch's function takes less time than ours, is PyTorch's at first, and is watched until the loss
is there (:func:`of_order`). If it was differentiated before that, the loss is computed
again with ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from blockspec.model import torch_parts
from blockspec.model.plain import bends, is_replacing, slopes, steps_aside

T = TypeVar("T")
DTYPES = (torch.float32, torch.float64)  # in half precision, PyTorch's own has wider means

SMALL = 2**15
"""Entries of a layer norm's input up to which ours costs more in the forward pass than it saves in
the products of a sweep (256 x 64 and 512 x 128 were measured, on a CPU).
"""


@dataclass
class Watch:
    """Norms of PyTorch that are being watched.

    Args:
        differentiated: Whether one of them was differentiated meanwhile.
    """

    differentiated: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)

    def over(self, output: Tensor) -> Tensor:
        """The same output, whose backward pass is noted."""
        if output.grad_fn is not None:
            self.handles.append(output.grad_fn.register_prehook(self._note))
        return output

    def _note(self, gradients: Any) -> None:
        self.differentiated = True


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def small_norms_watched() -> Iterator[Watch]:
    """While this is open, small layer norms are PyTorch's own, whose third derivatives are wrong.

    Yields:
        What tells afterwards whether one of them was differentiated meanwhile: then third
        derivatives are needed, and what was computed has to be computed again outside.
    """
    watch = Watch()
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)
        for handle in watch.handles:
            handle.remove()


def of_order(function: Callable[[], T], *, third: bool) -> tuple[T, bool]:
    """The value of a function that calls a model, and whether it takes gradients itself.

    Args:
        function: Called once, or again where it turns out that it takes gradients.
        third: Whether it is known to do so: then norms are right to the third order at once.
    """
    if not third:
        with small_norms_watched() as watch:
            found = function()
        if not watch.differentiated:
            return found, False
        del found  # one graph at a time
    return function(), True


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm``."""
    shape = tuple(normalized_shape)
    if input.shape[-len(shape) :] != shape or not _is_ours(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    watch = _WATCH.get()
    if watch is not None and input.numel() <= SMALL and not torch_parts.transforms_active():
        return watch.over(F.layer_norm(input, normalized_shape, weight, bias, eps))
    normalised = _normalised(input.flatten(-len(shape)), eps).view_as(input)
    return _affine(normalised, weight, bias)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.batch_norm``; ours where the statistics are those of the batch."""
    given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    several = input.dim() >= 2 and input.numel() > input.shape[1]
    if not training or not several or not _is_ours(input, weight, bias):
        return F.batch_norm(*given)
    if running_mean is not None:
        with torch.no_grad():
            F.batch_norm(*given)  # writes them down
    by_channel = input.transpose(0, 1)
    normalised = _normalised(by_channel.flatten(1), eps).view_as(by_channel).transpose(0, 1)
    return _affine(normalised, _by_channel(weight, input), _by_channel(bias, input))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``torch.nn.functional.instance_norm``; ours where nothing is written down."""
    alone = use_input_stats and running_mean is None and running_var is None
    several = input.dim() >= 3 and input[0, 0].numel() > 1
    if not alone or not several or not _is_ours(input, weight, bias):
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    normalised = _normalised(input.flatten(2), eps).view_as(input)
    return _affine(normalised, _by_channel(weight, input), _by_channel(bias, input))


NORMS = {F.layer_norm: layer_norm, F.batch_norm: batch_norm, F.instance_norm: instance_norm}
"""PyTorch's function -> ours."""


def _is_ours(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and is_replacing()
        and len({tensor.dtype for tensor in given}) == 1
        and given[0].dtype in DTYPES
        and given[0].numel() > 0
        and not torch.is_autocast_enabled(given[0].device.type)
        and (torch_parts.transforms_active() or not steps_aside(*given))
    )


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:  # a new tensor, which may be changed in place
        return x.clone() if bias is None else x + bias
    return x * weight if bias is None else torch.addcmul(bias, x, weight)


def _by_channel(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.view(-1, *[1] * (x.dim() - 2))


def _normalised(x: Tensor, eps: float) -> Tensor:
    """(..., D) over the last dimension."""
    if not x.requires_grad or steps_aside(x):
        return _elementary(x, eps=eps)
    return _Normalised.apply(x, eps)


def _elementary(x: Tensor, *, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


class _Normalised(torch.autograd.Function):
    """n"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        n, mean, r = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, n, mean, r)
        ctx.function = partial(_elementary, eps=eps)
        return n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, n, mean, r = ctx.saved_tensors
        if steps_aside(gradient):
            return *slopes(ctx.function, [x], gradient), None
        if not torch.is_grad_enabled():
            return _slope(gradient, x, mean, r), None
        return _NormalisedBackward.apply(gradient, x, n, mean, r, ctx.function), None


class _NormalisedBackward(torch.autograd.Function):
    """s = r P g"""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, n: Tensor, mean: Tensor, r: Tensor, function: Any
    ) -> Tensor:
        slope = _slope(gradient, x, mean, r)
        ctx.save_for_backward(gradient, x, n, mean, r, slope, r * _mean(gradient, n))
        ctx.function = function
        return slope

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x, n, mean, r, slope, share = ctx.saved_tensors
        if torch.is_grad_enabled() or steps_aside(tangent):
            return *bends(ctx.function, [x], gradient, [tangent]), None, None, None, None
        by_gradient = _slope(tangent, x, mean, r)
        if not ctx.needs_input_grad[1]:
            return by_gradient, None, None, None, None, None
        by_x = n * (-r * _mean(tangent, slope))
        by_x.addcmul_(by_gradient, share, value=-1)
        by_x.addcmul_(slope, r * _mean(tangent, n), value=-1)
        return by_gradient, by_x, None, None, None, None


def _slope(u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """r P u"""
    return torch.ops.aten.native_layer_norm_backward(
        u, x, x.shape[-1:], mean, r, None, None, (True, False, False)
    )[0]


def _mean(u: Tensor, v: Tensor) -> Tensor:
    """(..., 1) mean of u v."""
    return torch.linalg.vecdot(u, v).div_(u.shape[-1])[..., None]
