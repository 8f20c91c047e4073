"""The three passes over strips.

The opening paragraph of :mod:`blockspec.model.attention` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockspec.model.attention.strips import Strip, Work, scores_of, strips


def forward(work: Work) -> tuple[Tensor, Tensor]:
    """(B, H, T, e) the output, and (N, R, T, 1) the logarithms of the sums of exponentials; inf for
    rows that see nothing.
    """
    out = work.q.new_zeros(*work.q.shape[:3], work.v.shape[-1])
    if work.sinks is None:
        logs = work.q.new_full((*work.q.shape[:3], 1), math.inf)
    else:
        logs = work.sinks[:, :, None].repeat(1, 1, work.q.shape[2], 1)
    for strip in strips(work):
        scores, _ = scores_of(work, strip)
        top = scores.amax(-1, keepdim=True)
        sinks = strip.of_queries(logs) if work.sinks is not None else None
        top = (top if sinks is None else torch.maximum(top, sinks)).masked_fill_(
            top == -math.inf, 0
        )
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += sinks.sub_(top).exp_()
        blind = total == 0
        strip.put(out, (weights @ strip.of_keys(work.v)).div_(total.masked_fill(blind, 1)))
        strip.put(logs, total.log_().add_(top).masked_fill_(blind, math.inf))
    result = work.result(out)
    assert result is not None
    return result, logs


class Along(NamedTuple):
    """Tangents in the shapes of :class:`Work`, that of q times the scale; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None


class Found(NamedTuple):
    """Sums over strips, in the shapes of :class:`Work`, but k and v turned (N, d, S), as products
    add to them faster (by a quarter), and sinks as (N, R); None is not wanted.
    """

    g: Tensor | None
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None

    def add_to_keys(self, name: str, strip: Strip, left: Tensor | None, right: Tensor) -> None:
        """Adds left' right to what is found for k or v, if it is wanted."""
        whole = getattr(self, name)
        if whole is not None and left is not None:
            whole[strip.heads, :, strip.keys].baddbmm_(right.mT, left)

    def results(self, work: Work) -> tuple[Tensor | None, ...]:
        """In the shapes and the dtype of the inputs."""
        if self.q is not None:
            self.q.mul_(work.rule.scale)
        g, q, k, v, sinks = self
        turned = (None if t is None else t.mT for t in (k, v))
        by_head = None if sinks is None else sinks.view(work.batches, -1).sum(0).to(work.dtype)
        return *map(work.result, (g, q, *turned)), by_head


def _found(work: Work, g: Tensor, wanted: Sequence[bool]) -> Found:
    sinks = work.q if work.sinks is None else work.sinks.squeeze(-1)
    like = (g, work.q, work.k.mT, work.v.mT, sinks)
    return Found(*(t.new_zeros(t.shape) if w else None for t, w in zip(like, wanted, strict=True)))


def backward(
    work: Work, logs: Tensor, gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by q, k, v and sinks, those that are wanted."""
    g = work.of_queries(gradient)
    found = _found(work, g, [False, *wanted])
    for strip in strips(work):
        _add_first(found, work, strip, logs, strip.of_queries(g))
    return found.results(work)[1:]


def _add_first(found: Found, work: Work, strip: Strip, logs: Tensor, g: Tensor) -> None:
    p, tanh = _weights(work, strip, logs)
    found.add_to_keys("v", strip, p, g)
    if found.q is None and found.k is None and found.sinks is None:
        return
    s, d = _centred(p, (g @ strip.of_keys(work.v).mT).mul_(p))
    if found.sinks is not None:
        strip.add_to_sinks(found.sinks, -_sinks(work, strip, logs) * d)
    if tanh is not None:
        s.mul_(_slope(tanh))
    if found.q is not None:
        strip.put(found.q, s @ strip.of_keys(work.k))
    found.add_to_keys("k", strip, s, strip.of_queries(work.q))


def double_backward(
    work: Work,
    logs: Tensor,
    gradient: Tensor,
    tangents: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by (gradient, q, k, v, sinks) of the inner product of :func:`backward`'s
    results with the tangents.
    """
    g = work.of_queries(gradient)
    tq, tk, tv, ts = tangents
    along = Along(
        q=None if tq is None else work.of_queries(tq) * work.rule.scale,
        k=None if tk is None else work.of_keys(tk),
        v=None if tv is None else work.of_keys(tv),
        sinks=None if ts is None else work.of_sinks(ts),
    )
    found = _found(work, g, wanted)
    for strip in strips(work):
        _add_second(found, work, strip, logs, strip.of_queries(g), along)
    return found.results(work)


def _add_second(
    found: Found, work: Work, strip: Strip, logs: Tensor, g: Tensor, along: Along
) -> None:
    """One strip of :func:`double_backward`, in the letters of the formulas."""
    q, k, v = strip.of_queries(work.q), strip.of_keys(work.k), strip.of_keys(work.v)
    tq = None if along.q is None else strip.of_queries(along.q)
    tk = None if along.k is None else strip.of_keys(along.k)
    tv = None if along.v is None else strip.of_keys(along.v)
    sink = None if work.sinks is None else _sinks(work, strip, logs)
    ts = None if along.sinks is None else strip.of_sinks(along.sinks)
    p, tanh = _weights(work, strip, logs)
    slope = None if tanh is None else _slope(tanh)
    x = _sum((tq, k.mT), (q, None if tk is None else tk.mT))
    x = x.mul_(slope) if x is not None and slope is not None else x
    change = _change(p, x, sink, ts)
    u = None if change is None else change[0]
    if found.g is not None:
        strip.put(found.g, _sum((u, v), (p, tv)))
    found.add_to_keys("v", strip, u, g)
    if found.q is None and found.k is None and found.sinks is None:
        return
    w = None if tv is None else (g @ tv.mT).mul_(p)
    w, s, by_sinks = _slope_change(p, w, None if change is None else (*change, g @ v.mT), sink, ts)
    if found.sinks is not None and by_sinks is not None:
        strip.add_to_sinks(found.sinks, by_sinks)
    if slope is not None and tanh is not None and work.rule.softcap is not None:
        w.mul_(slope)
        if s is not None and x is not None:
            w.addcmul_(tanh.mul_(s), x, value=-2 / work.rule.softcap)
            s.mul_(slope)
    if found.q is not None:
        strip.put(found.q, _sum((w, k), (s, tk)))
    found.add_to_keys("k", strip, w, q)
    if tq is not None:
        found.add_to_keys("k", strip, s, tq)


def _change(
    p: Tensor, x: Tensor | None, sink: Tensor | None, ts: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(u, m), or None where no score changes."""
    of_sinks = None if sink is None or ts is None else sink * ts
    if x is not None:
        return _centred(p, p * x, of_sinks)
    return None if of_sinks is None else _centred(p, torch.zeros_like(p), of_sinks)


def _slope_change(
    p: Tensor,
    w: Tensor | None,
    change: tuple[Tensor, Tensor, Tensor] | None,
    sink: Tensor | None,
    ts: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(w, s, what the sinks get), from p f and (u, m, e); s is None where no score changes."""
    if change is None:
        assert w is not None
        w, n = _centred(p, w)
        return w, None, None if sink is None else -sink * n
    u, m, e = change
    s, d = _centred(p, p * e)
    w, n = _centred(p, e.mul_(u) if w is None else w.addcmul_(u, e))
    w.addcmul_(u, d, value=-1)
    if sink is None:
        return w, s, None
    return w, s, sink * ((m if ts is None else m - ts) * d - n)


def _weights(work: Work, strip: Strip, logs: Tensor) -> tuple[Tensor, Tensor | None]:
    """(n, R x rows, keys) p, and what :func:`scores_of` gives beside the scores."""
    scores, tanh = scores_of(work, strip)
    return scores.sub_(strip.of_queries(logs)).exp_(), tanh


def _sinks(work: Work, strip: Strip, logs: Tensor) -> Tensor:
    """(n, R x rows, 1) the weights of the sinks."""
    assert work.sinks is not None
    return (strip.of_sinks(work.sinks) - strip.of_queries(logs)).exp_()


def _slope(tanh: Tensor) -> Tensor:
    return torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1)


def _centred(p: Tensor, y: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y - p m, m) with the row sums m of y, and of ``more``; y is written over."""
    m = y.sum(-1, keepdim=True)
    if more is not None:
        m += more
    return y.addcmul_(p, m, value=-1), m


def _sum(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """The sum of the products of the pairs that are there."""
    total = None
    for left, right in pairs:
        if left is not None and right is not None:
            total = left @ right if total is None else total.baddbmm_(left, right)
    return total
