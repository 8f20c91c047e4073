"""Language-model heads whose logits (B, T, V) are never held whole.

Background. The logits of a vocabulary are the largest tensors of a language model, and a product
wants several of that size: logits, probabilities, their gradient, and its tangent. But everything
that the cross entropies need of row i is the hidden state h_i (D numbers), the head's weight W, and
the probabilities p_i. So the head and the cross entropy behind it become one function of the hidden
states. It keeps the probabilities, once, and makes everything else in chunks of rows, which are
gone when the next chunk is made.

A model gives its logits to a loss through code of its own. So the head hands out :class:`Logits`, a
tensor that has a shape and no entries: a loss that knows it takes hidden states and weight from it,
and any other use computes the entries as the head would have. Where a function of another kind is
needed (:mod:`blockspec.model.plain`), the head and the cross entropies are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from blockspec.model import torch_parts
from blockspec.model.patching import patched
from blockspec.model.plain import bends, slopes, steps_aside
from blockspec.model.second_order import cross_entropy_curvature, cross_entropy_slope

CHUNK_ROWS = 128  # at least: the head's matrix is read once per chunk
CHUNK_ENTRIES = {"cpu": 2**20}  # of logits at once: what a cache takes
CHUNK_ENTRIES_ELSEWHERE = 2**26  # few kernels


@contextmanager
def deferred(model: nn.Module) -> Iterator[None]:
    """While this is open, the model's head gives :class:`Logits`.

    Args:
        model: Nothing changes where its head is not found, is no ``nn.Linear``, or has a
            ``forward`` of somebody else.
    """
    head = _head(model)
    if head is None or "forward" in vars(head) or torch_parts.wrapper is None:
        yield
        return
    with patched([(head, "forward", _deferring(head))]):
        yield


def _head(model: nn.Module) -> nn.Linear | None:
    """The linear map onto the vocabulary, where the model says which it is."""
    named = getattr(model, "get_output_embeddings", lambda: None)() or getattr(
        model, "lm_head", None
    )
    return named if type(named) is nn.Linear else None


def _deferring(head: nn.Linear) -> Callable[[Tensor], Tensor]:
    original = head.forward

    def forward(input: Tensor) -> Tensor:
        weight, bias = head.weight, head.bias
        if torch.is_autocast_enabled(weight.device.type) or steps_aside(input, weight, bias):
            return original(input)
        return Logits(input, weight, bias)

    return forward


METADATA = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_nested"}
    | {"size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size"}
    | {"__len__"}
)
"""What can be asked of logits that are not computed yet."""


class Logits(Tensor):
    """``hidden @ weight.T + bias``, not computed yet.

    Rows can be chosen from it. Any other use computes it, so that a model or a loss which does more
    with its logits (soft caps, temperatures, masks) gets them as usual.

    Args:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    _versions: tuple[int, ...]
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        assert torch_parts.wrapper is not None
        shape = (*hidden.shape[:-1], len(weight))
        logits = torch_parts.wrapper(cls, shape, dtype=hidden.dtype, device=hidden.device)
        logits.hidden, logits.weight, logits.bias, logits._computed = hidden, weight, bias, None
        logits._versions = logits._now()
        return logits

    def rows(self, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of other rows.

        Args:
            choose: Acts on all dimensions but the last.

        Returns:
            :class:`Logits`; an ordinary tensor where these logits were computed already, since
            they may have been changed in place after that.
        """
        if self._computed is not None:
            return choose(self._computed)
        self._check()
        return Logits(choose(self.hidden), self.weight, self.bias)

    def computed(self) -> Tensor:
        """(..., V) the logits themselves, with their graph."""
        if self._computed is None:
            self._check()
            self._computed = F.linear(self.hidden, self.weight, self.bias)
        return self._computed

    def _now(self) -> tuple[int, ...]:
        parts = (self.hidden, self.weight, self.bias)
        return tuple(
            part._version for part in parts if part is not None and not part.is_inference()
        )

    def _check(self) -> None:
        if self._now() != self._versions:
            raise RuntimeError(
                "the input or the weight of the language-model head was changed in place after the "
                "head had used it, and its logits were to be computed later: replace the in-place "
                "operation, or pass Objective(..., replacements=False)"
            )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _asked(function) in METADATA:
            return super().__torch_function__(function, types, args, kwargs or {})
        return function(*_computed(args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(
            f"{function} went past the computation of the logits: build the loss with "
            "Loss(..., chunked=False), or pass Objective(..., replacements=False)"
        )


def _asked(function: Any) -> str:
    """The name of a method; of a property that is read, which comes as the ``__get__`` of it."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name


def _computed(value: Any) -> Any:
    """The same nest of tuples, lists and dictionaries, with the logits in it computed."""
    if isinstance(value, Logits):
        return value.computed()
    if isinstance(value, dict):
        return {name: _computed(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_computed, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_computed, value))
    return value


def cross_entropies(logits: Logits, labels: Tensor) -> Tensor:
    """Cross entropies of logits that are not computed yet.

    Args:
        logits: (N, V).
        labels: (N,) classes, 0 to V - 1.

    Returns:
        (N,) one term for each row. The graph keeps the probabilities (N, V), and nothing else of
        that size.
    """
    parts = (logits.hidden, logits.weight, logits.bias)
    if steps_aside(*parts):
        return F.cross_entropy(logits.computed(), labels, reduction="none")
    # views have nodes of their own, which can be asked whether a product ends there
    inputs = [None if part is None else part.view_as(part) for part in parts]
    return _LinearCrossEntropy.apply(*inputs, labels)


def _whole(labels: Tensor) -> Callable[..., Tensor]:
    """The same function of hidden states, weight and bias, with logits that are held whole."""

    def function(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")

    return function


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        kept = hidden.new_empty(len(hidden) if wanted else 0, len(weight))
        terms = hidden.new_empty(len(hidden))
        for rows in _chunks(hidden, weight):
            logs = F.linear(hidden[rows], weight, bias).log_softmax(-1)
            terms[rows] = -logs.gather(1, labels[rows, None]).squeeze(1)
            if wanted:
                torch.exp(logs, out=kept[rows])
        ctx.save_for_backward(hidden, weight, bias, labels, kept)
        return terms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, _ = ctx.saved_tensors
        if steps_aside(gradient) or torch_parts.batched(gradient):
            return *slopes(_whole(labels), [hidden, weight, bias], gradient), None
        return *_LinearCrossEntropyBackward.apply(gradient, *ctx.saved_tensors), None


class _LinearCrossEntropyBackward(torch.autograd.Function):
    """With s = g (p - onehot), (N, V), the gradient by the logits: (s W, s' h, sum of s)."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        probabilities: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, hidden, weight, bias, labels, probabilities)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        by_bias = None if bias is None else torch.zeros_like(bias)
        for rows in _chunks(hidden, weight):
            slope = cross_entropy_slope(probabilities[rows], labels[rows], gradient[rows])
            torch.mm(slope, weight, out=by_hidden[rows])
            if by_weight is not None:
                by_weight.addmm_(slope.T, hidden[rows])
            if by_bias is not None:
                by_bias += slope.sum(0)
        return by_hidden, by_weight, by_bias

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, hidden, weight, bias, labels, _ = ctx.saved_tensors
        given = [tangent for tangent in tangents if tangent is not None]
        batched = any(map(torch_parts.batched, given))
        if torch.is_grad_enabled() or batched or steps_aside(*given):
            inputs = [hidden, weight, bias]
            return *bends(_whole(labels), inputs, gradient, tangents), None, None
        wanted = [_is_wanted(node) for node, _ in ctx.next_functions[:4]]
        return *_bends_in_chunks(ctx.saved_tensors, tangents, wanted), None, None


def _is_wanted(node: Node | None) -> bool:
    """Whether the backward pass that is running goes on to a node; a leaf itself can't be asked."""
    return node is not None and (hasattr(node, "variable") or torch_parts.will_execute(node))


def _bends_in_chunks(
    saved: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """The slope's backward pass: by gradient, hidden states, weight and bias, where it is
    wanted.
    """
    gradient, hidden, weight, bias, labels, probabilities = saved
    along_hidden, along_weight, along_bias = tangents
    by_gradient, by_hidden, by_weight, by_bias = (
        torch.zeros_like(tensor) if want else None
        for tensor, want in zip((gradient, hidden, weight, bias), wanted, strict=True)
    )
    for rows in _chunks(hidden, weight):
        h, p, g, y = hidden[rows], probabilities[rows], gradient[rows], labels[rows]
        t = None if along_hidden is None else along_hidden[rows]
        tangent = _tangent(h, weight, t, along_weight, along_bias)  # of the logits
        if tangent is None:
            continue
        along_gradient, product = cross_entropy_curvature(p, y, g, tangent)
        if by_gradient is not None:
            by_gradient[rows] = along_gradient
        if by_hidden is not None:
            torch.mm(product, weight, out=by_hidden[rows])
            if along_weight is not None:
                by_hidden[rows].addmm_(cross_entropy_slope(p, y, g), along_weight)
        if by_weight is not None:
            by_weight.addmm_(product.T, h)
            if t is not None:
                by_weight.addmm_(cross_entropy_slope(p, y, g).T, t)
        if by_bias is not None:
            by_bias += product.sum(0)
    return by_gradient, by_hidden, by_weight, by_bias


def _tangent(
    hidden: Tensor,
    weight: Tensor,
    along_hidden: Tensor | None,
    along_weight: Tensor | None,
    along_bias: Tensor | None,
) -> Tensor | None:
    """(n, V) how the logits move along a direction; None if they don't."""
    parts = [(along_hidden, weight), (hidden, along_weight)]
    tangent = None
    for left, right in parts:
        if left is not None and right is not None:
            tangent = left @ right.T if tangent is None else tangent.addmm_(left, right.T)
    if along_bias is None:
        return tangent
    return along_bias.repeat(len(hidden), 1) if tangent is None else tangent.add_(along_bias)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    entries = CHUNK_ENTRIES.get(hidden.device.type, CHUNK_ENTRIES_ELSEWHERE)
    size = max(CHUNK_ROWS, entries // len(weight))
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)
