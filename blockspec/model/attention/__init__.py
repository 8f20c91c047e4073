"""Softmax attention that can be differentiated twice in memory that grows linearly with the number
of tokens.

Background. With scores ``a = scale q k' + mask`` (T, S), row ``i`` of the output is ``o_i = sum_j
p_ij v_j``, where ``p_ij = exp(a_ij - l_i)`` and ``l_i = log sum_j exp(a_ij)``. For an incoming
gradient ``g``, with ``e = g v'`` and the row sums ``d_i = sum_j p_ij e_ij``, the backward pass is

    s = p (e - d)        by q: scale s k        by k: scale s' q        by v: p' g

It is a function of (g, q, k, v) itself, and its own backward pass gets tangents (tq, tk, tv). It is
linear in ``g``, and gradients by q, k, v are derivatives of ``sum(g o)``, whose Hessian is
symmetric: so what is asked for is the derivative of ``o`` and of the formulas above along the
tangents. With ``x = scale (tq k' + q tk')``, the change of the scores,

    m_i = sum_j p_ij x_ij      how l changes: the first row sum
    u   = p (x - m)            how p changes
    f   = g tv'                how e changes
    n_i = sum_j (u e + p f)    how d changes: the second row sum
    w   = u (e - d) + p (f - n)   how s changes
    by g: u v + p tv    by q: scale (w k + s tk)    by k: scale (w' q + s' tq)    by v: u' g

Everything of size T x S is needed once for each row and can be rebuilt from q, k, v and ``l``. So
nothing of that size is
kept: the work is done on a strip of some rows at a time, each with all the keys that its rows see.
A strip has the row sums at hand when it needs them, so no product is made twice, as square tiles
would have it. Keys that a rule hides from the whole strip (above the diagonal, outside the window,
masked) are left out. The strips make up a fixed workspace; all else is of the size of q, k and v.

A soft cap ``c tanh(a / c)`` adds its first and second derivative; a sink is one more score of each
row, without a value. The third and higher derivatives go through :func:`plain`, the same function
in elementary operations, which keeps matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockspec.model.attention import passes
from blockspec.model.attention.strips import Rule, folded, hidden, no_autocast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k' + mask) v``, differentiable twice in O(T) memory, and further in O(T S).

    Args:
        q: (B, H, T, d) queries.
        k: (B, G, S, d) keys. G divides H: H / G query heads in a row share a key head, which is not
            repeated.
        v: (B, G, S, e) values.
        causal: query i sees the keys 0 to i (as ``is_causal`` of PyTorch, also where T and S
            differ).
        mask: broadcastable to (B, H, T, S). Boolean: True where a query sees a key. Floating point:
            added to the scores; -inf hides a key. A mask that requires gradients is differentiated
            by :func:`plain`.
        window: query i sees the keys j with ``|i - j| < window``: with ``causal``, itself and
            ``window - 1`` keys before.
        softcap: scores s become ``softcap tanh(s / softcap)`` before masks are applied.
        scale: of the products of queries and keys; None: ``1 / sqrt(d)``.
        sinks: (H,) for each head the score of one more key, whose value is zero.

    Returns:
        (B, H, T, e) in the dtype of q. The sums are made in float32 at least. A row that sees no
        key is zero.

    Raises:
        ValueError: for shapes that do not fit together, and for a window, soft cap or scale that is
            not possible.
        TypeError: for tensors of different dtypes, or not of floating point.
    """
    _check(q, k, v, mask, sinks)
    rule = _rule(q, causal, window, softcap, scale)
    if (mask is not None and mask.requires_grad) or transformed():
        return plain(q, k, v, mask=mask, sinks=sinks, rule=rule)
    # views have nodes of their own, which can be asked whether a product ends there
    q, k, v = (t.view_as(t) for t in (q, k, v))
    sinks = None if sinks is None else sinks.view_as(sinks)
    return _Attention.apply(q, k, v, sinks, mask, rule)


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, sinks: Tensor | None, rule: Rule
) -> Tensor:
    """The same function in elementary operations, for any derivative.

    Keeps matrices (B, H, T, S).
    """
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with no_autocast(q):
        q, k, v = (t.to(wide) for t in (q, k, v))
        batch, heads, rows, _ = q.shape
        by_key_head = (batch, k.shape[1], heads // k.shape[1] * rows, -1)
        scores = (rule.scale * q).reshape(by_key_head) @ k.mT
        scores = scores.view(batch, heads, rows, -1)
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        if rule.causal or rule.window is not None:
            hides = hidden(rule, slice(0, rows), slice(0, k.shape[2]), q.device)
            scores = scores.masked_fill(hides, -math.inf)
        if mask is not None:
            given = mask.dtype is torch.bool
            scores = scores.masked_fill(~mask, -math.inf) if given else scores + mask
        sinks = None if sinks is None else sinks.to(wide)[:, None, None]
        top = scores.detach().amax(-1, keepdim=True)
        top = top if sinks is None else torch.maximum(top, sinks.detach())
        top = top.masked_fill(top == -math.inf, 0)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        total = total if sinks is None else total + (sinks - top).exp()
        weights = weights / total.masked_fill(total == 0, 1)
        return (weights.reshape(by_key_head) @ v).reshape(batch, heads, rows, -1).to(dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        rule: Rule,
    ) -> Tensor:
        with no_autocast(q):
            out, logs = passes.forward(folded(q, k, v, sinks, mask, rule))
        ctx.save_for_backward(q, k, v, sinks, mask, logs)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = _wanted(ctx, 4)
        found = _AttentionBackward.apply(gradient, *ctx.saved_tensors, ctx.rule, wanted)
        return *found, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        logs: Tensor,
        rule: Rule,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, q, k, v, sinks, mask, logs)
        ctx.rule = rule
        with no_autocast(q):
            work = folded(q, k, v, sinks, mask, rule)
            return passes.backward(work, logs, gradient, wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, q, k, v, sinks, mask, logs = ctx.saved_tensors
        wanted = _wanted(ctx, 5)
        if all(tangent is None for tangent in tangents):
            found: Sequence[Tensor | None] = [None] * 5
        elif torch.is_grad_enabled():
            inputs = (gradient, q, k, v)
            found = _by_plain(inputs, sinks, mask, ctx.rule, tangents, wanted)
        else:
            with no_autocast(q):
                work = folded(q, k, v, sinks, mask, ctx.rule)
                found = passes.double_backward(work, logs, gradient, tangents, wanted)
        return *found, None, None, None, None


def _by_plain(
    inputs: Sequence[Tensor],
    sinks: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    tangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The second derivative by (gradient, q, k, v) and sinks, with a graph for the third."""
    g, q, k, v = (t.view_as(t) for t in inputs)
    sinks = None if sinks is None else sinks.view_as(sinks)
    out = plain(q, k, v, mask=mask, sinks=sinks, rule=rule)
    sources = [
        (point, tangent)
        for point, tangent in zip((q, k, v, sinks), tangents, strict=True)
        if point is not None and point.requires_grad and tangent is not None
    ]
    first = torch.autograd.grad(out, [point for point, _ in sources], g, create_graph=True)
    asked = [(place, point) for place, point in enumerate((g, q, k, v, sinks)) if wanted[place]]
    second = torch.autograd.grad(
        first,
        [point for _, point in asked if point is not None],
        [tangent for _, tangent in sources],
        create_graph=True,
        allow_unused=True,
    )
    found: list[Tensor | None] = [None] * 5
    for (place, _), value in zip(asked, second, strict=True):
        found[place] = value
    return found


def _rule(
    q: Tensor, causal: bool, window: int | None, softcap: float | None, scale: float | None
) -> Rule:
    if window is not None and window < 1:
        raise ValueError(f"window is a whole number >= 1 or None, got {window}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is a positive number or None, got {softcap}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale is a finite number or None, got {scale}")
    return Rule(causal, window, softcap, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k and v have four dimensions (B, heads, tokens, d); got {shapes}")
    fits = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    if not fits or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q is (B, H, T, d), k (B, G, S, d) and v (B, G, S, e), where G divides H; got {shapes}"
        )
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1 or not q.is_floating_point():
        raise TypeError(f"q, k and v have one floating point dtype; got {dtypes}: convert them")
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]))
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks is (H,) = {tuple(q.shape[1:2])}; got {tuple(sinks.shape)}")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) > 4 or any(m not in (1, n) for m, n in zip(padded, shape, strict=True)):
        raise ValueError(
            f"mask is broadcastable to (B, H, T, S) = {shape}; got {tuple(mask.shape)}"
        )
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask is boolean (True where a key is seen) or added to the scores; got {mask.dtype}: "
            "call mask.bool()"
        )


def _wanted(ctx: Any, count: int) -> list[bool]:
    """Which of the first inputs this pass of autograd asks for: it knows more than
    ``needs_input_grad``.
    """
    nodes = [
        node for node, _ in ctx.next_functions
    ]  # sinks, the last, have none where there are none
    needed = ctx.needs_input_grad[:count]
    return [need and _runs(node) for need, node in zip(needed, [*nodes, None], strict=False)]


def _runs(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf: autograd cannot tell, and is given its gradient
        return True


def transformed() -> bool:
    """Within ``torch.func`` transforms and forward-mode derivatives, which do not see functions of
    one's own.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or (
        torch.autograd.forward_ad._current_level >= 0
    )
