"""When our functions step aside, and what stands in for them then: PyTorch's own derivatives.

Background. A function with a cheap second derivative is two autograd functions: f itself, and its
backward pass J(x)' g. The backward passes of both are formulas that leave no graph. That is all
that a gradient and any number of products need, and it is what makes them cheap. It is not enough

- when a product is itself differentiated: losses that contain gradients of the network (physics-
  informed losses, gradient penalties, MAML) reach third and fourth derivatives of f;
- under the transforms of ``torch.func``, under forward derivatives, for complex numbers and for
  subclasses of tensors, which a custom function does not follow.

In these cases the function that is replaced is differentiated by PyTorch alone, to any order, as
it would have been without us: :func:`slopes` is its backward pass, :func:`bends` the backward pass
of that. So a custom function is never asked for a derivative that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from blockspec.model import torch_parts

Function = Callable[..., Tensor]
Tensors = tuple[Tensor | None, ...]

_REPLACING = ContextVar("replacing", default=True)


@contextmanager
def plain_functions() -> Iterator[None]:
    """While this is open, no function of ours stands in for one of PyTorch."""
    token = _REPLACING.set(False)
    try:
        yield
    finally:
        _REPLACING.reset(token)


def is_replacing() -> bool:
    """Whether functions of ours may stand in for PyTorch's."""
    return _REPLACING.get() and not torch.compiler.is_compiling()


def steps_aside(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors has to be PyTorch's own.

    Args:
        tensors: What the function is of; None for an absent bias.

    Returns:
        True within :func:`plain_functions`, under a transform of ``torch.func``, under a compiler,
        and where a tensor is not an ordinary one: complex, sparse, dual (a forward derivative), of
        a subclass (nested, distributed).
    """
    if not is_replacing() or torch_parts.transforms_active():
        return True
    return any(tensor is not None and not _is_ordinary(tensor) for tensor in tensors)


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and unpack_dual(tensor).tangent is None
    )


def slopes(function: Function, inputs: Sequence[Tensor | None], gradient: Tensor) -> Tensors:
    """The backward pass J' g of a function, by autograd.

    Args:
        function: Of all ``inputs``, to a tensor.
        inputs: None, and tensors that require no gradient, are passed on.
        gradient: g, of the shape of the function's value.

    Returns:
        For every input its part of J' g, None for one that requires no gradient. The parts have a
        graph where gradients are enabled.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        points = [_linked(tensor) for tensor in inputs]
        value = function(*points).to(gradient.dtype)
        return _gradients([value], points, [gradient], keep=keep)


def bends(
    function: Function,
    inputs: Sequence[Tensor | None],
    gradient: Tensor,
    tangents: Sequence[Tensor | None],
) -> Tensors:
    """The backward pass of :func:`slopes`, by autograd.

    Args:
        function: As there.
        inputs: As there.
        gradient: As there.
        tangents: For every input, the gradient by its part of J' g; None for zeros.

    Returns:
        The derivatives of the sum of tangents times parts, by the gradient and then by every
        input; None for zeros. They have a graph where gradients are enabled.
    """
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        points = [_linked(tensor) for tensor in (gradient, *inputs)]
        parts = slopes(function, points[1:], gradient if points[0] is None else points[0])
        pairs = [
            (part, tangent)
            for part, tangent in zip(parts, tangents, strict=True)
            if part is not None and part.requires_grad and tangent is not None
        ]
        return _gradients([p for p, _ in pairs], points, [t for _, t in pairs], keep=keep)


def unchanged(x: Tensor, function: Function) -> Function:
    """The function of a link to ``x``, for the entries that ``x`` has now.

    A *link* is ``x.data`` as an output of an autograd function of ``x``: the same entries, with a
    count of in-place changes of their own. A graph that leads back to the link and not to x itself
    does not mind that x is changed after its use, as long as nothing reads the entries again.

    Args:
        x: The input of a function that is being replaced.
        function: What is replaced.

    Returns:
        ``function``, which raises RuntimeError where ``x`` has been changed in between.
    """
    entries, version = x.detach(), x._version

    def checked(link: Tensor) -> Tensor:
        if entries._version != version:
            raise RuntimeError(
                "a tensor was changed in place after an activation or a cross entropy had used it "
                f"(it is at version {entries._version}, expected {version}). First and second "
                "derivatives are not hurt by that, but third derivatives were asked for: replace "
                "the in-place operation, or pass Objective(..., replacements=False)"
            )
        return function(link)

    return checked


def _linked(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, as a point at which a backward pass can end: it goes no further than
    here.
    """
    return tensor.view_as(tensor) if tensor is not None and tensor.requires_grad else tensor


def _gradients(
    values: list[Tensor], points: list[Tensor | None], gradients: list[Tensor], *, keep: bool
) -> Tensors:
    wanted = [point for point in points if point is not None and point.requires_grad]
    if not values or not wanted:
        return (None,) * len(points)
    found = iter(
        torch.autograd.grad(values, wanted, gradients, create_graph=keep, allow_unused=True)
    )
    return tuple(
        next(found) if point is not None and point.requires_grad else None for point in points
    )
