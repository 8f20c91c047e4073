"""Language-model heads whose logits (B, T, V) are never held whole.

The logits of a vocabulary are the largest tensors of a language model, and double backward wants several of that size: logits,
probabilities, their gradient, and in every product its tangent. Here the head and the cross entropy behind it are one function of
the hidden states: it keeps the probabilities, once, and makes everything else in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blockspec.model.second_order import cross_entropy_curvature, cross_entropy_slope

CHUNK_ROWS = 128  # at least: the head's matrix is read once per chunk
CHUNK_ENTRIES = {"cpu": 2**20}  # of logits at once: what a cache takes
CHUNK_ENTRIES_ELSEWHERE = 2**26  # few kernels


@contextmanager
def deferred(model: nn.Module) -> Iterator[None]:
    """While this is open, the model's head gives :class:`Logits`."""
    head = _head(model)
    if (
        head is None
        or "forward" in vars(head)
        or torch.is_autocast_enabled(head.weight.device.type)
    ):
        yield
        return
    try:
        vars(head)["forward"] = lambda hidden: Logits(hidden, head.weight, head.bias)
        yield
    finally:
        del vars(head)["forward"]


def _head(model: nn.Module) -> nn.Linear | None:
    """The linear map onto the vocabulary, where the model says which it is."""
    named = getattr(model, "get_output_embeddings", lambda: None)() or getattr(
        model, "lm_head", None
    )
    return named if type(named) is nn.Linear else None


class Logits(Tensor):
    """``hidden @ weight.T + bias``, not computed yet. Rows can be chosen from it; any other use computes it, so that a model
    or loss which does more with its logits (soft caps, temperatures) gets them as usual.

    hidden: (..., D); weight: (V, D); bias: (V,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        shape = (*hidden.shape[:-1], len(weight))
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=hidden.dtype, device=hidden.device)
        logits.hidden, logits.weight, logits.bias, logits._computed = hidden, weight, bias, None
        return logits

    def rows(self, choose: Callable[[Tensor], Tensor]) -> Logits:
        """Logits of other rows: ``choose`` acts on all dimensions but the last."""
        return Logits(choose(self.hidden), self.weight, self.bias)

    def computed(self) -> Tensor:
        """(..., V) the logits themselves, with their graph."""
        if self._computed is None:
            self._computed = F.linear(self.hidden, self.weight, self.bias)
        return self._computed

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (
            getattr(function, "__name__", "") == "__get__"
        ):  # shape, dtype and the like need no entries
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        given, named = torch.utils._pytree.tree_map_only(
            Logits, Logits.computed, (args, kwargs or {})
        )
        return function(*given, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(
            f"{function} went past the computation of the logits: build the loss with Loss(..., chunked=False)"
        )


def cross_entropies(logits: Logits, labels: Tensor) -> Tensor:
    """(N, V) logits and (N,) labels -> (N,) cross entropies."""
    # views have nodes of their own, which can be asked whether a product ends there
    inputs = [
        None if t is None else t.view_as(t) for t in (logits.hidden, logits.weight, logits.bias)
    ]
    return _LinearCrossEntropy.apply(*inputs, labels)


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
    @once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, hidden, weight, bias, labels, probabilities = ctx.saved_tensors
        along_hidden, along_weight, along_bias = tangents
        wanted = [
            node is not None and torch._C._will_engine_execute_node(node)
            for node, _ in ctx.next_functions[:4]
        ]
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
        return by_gradient, by_hidden, by_weight, by_bias, None, None


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
