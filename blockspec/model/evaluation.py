"""A model in eval mode that comes back exactly as it was found.

Background. Evaluating a loss is not supposed to change a model, but it does: batch norms and
counters write to buffers, rotary embeddings of dynamic length make their frequencies anew and note
for which length, caches are made at first use, ``Embedding(max_norm)`` shrinks weights. The numbers
of a spectrum come from hundreds of evaluations. So all of them must begin with the same state, and
that state is the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from blockspec.model.compiled import uncompiled
from blockspec.model.patching import patched, shared
from blockspec.model.walks import modules_of

SHRINK = torch.embedding_renorm_
SMALL = 4096  # entries of a buffer that is compared whatever its count of changes says
Copies = dict[int, tuple[Tensor, int, Tensor]]
"""Identity of a buffer -> the buffer, its count of changes, and a copy of it at that count."""


@contextmanager
def evaluation(model: nn.Module, *, batch_norm: str, copies: Copies) -> Iterator[None]:
    """While this is open, the model is one function of its parameters; afterwards it is as it was.

    Args:
        model: In eval mode for the time being.
        batch_norm: ``"train"``: batch norms use the statistics of the batch.
        copies: Of the buffers, kept from one call to the next. The caller holds them.
    """
    with ExitStack() as stack:
        stack.enter_context(buffers_kept(model, copies))
        stack.enter_context(_eval_mode(model, batch_norm=batch_norm))
        stack.enter_context(patched(_of_bounded_embeddings(model)))
        stack.enter_context(_without_shrinking())
        stack.enter_context(_without_fast_path())
        stack.enter_context(uncompiled())
        yield


@contextmanager
def _eval_mode(model: nn.Module, *, batch_norm: str) -> Iterator[None]:
    modules = modules_of(model)
    norms = [m for m in modules if isinstance(m, _BatchNorm)] if batch_norm == "train" else []
    # Without running statistics, a batch norm in eval mode uses those of the batch.
    own = {"track_running_stats": False, "running_mean": None, "running_var": None}
    before = [(module, module.training) for module in modules]
    try:
        if any(training for _, training in before):  # else its user has called eval()
            model.eval()
        with patched((norm, name, value) for norm in norms for name, value in own.items()):
            yield
    finally:
        for module, training in before:
            if module.training is not training:  # setting an attribute of a module takes long
                module.training = training


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoder`` has kernels for when nothing is differentiated; with a padding mask
    they compute another function (zeros at padded places)."""
    with shared("fast path of encoders", _switch_fast_path_off):
        yield


def _switch_fast_path_off() -> Callable[[], None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return partial(torch.backends.mha.set_fastpath_enabled, before)


@contextmanager
def _without_shrinking() -> Iterator[None]:
    """A function that shrinks rows of a weight whenever it is called is refused."""
    with shared("torch.embedding_renorm_", _refuse):
        yield


def _refuse() -> Callable[[], None]:
    torch.embedding_renorm_ = _refuse_to_shrink
    return partial(setattr, torch, "embedding_renorm_", SHRINK)


def _of_bounded_embeddings(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Changes after which embeddings with ``max_norm`` are those of their rows, already shrunk.

    The function differentiated is that of the shrunk rows, as in PyTorch's own gradient.
    """
    seen = set()
    for module in modules_of(model):
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.max_norm is None:
            continue
        weight, bound, order = module.weight, float(module.max_norm), module.norm_type
        if not isinstance(weight, nn.Parameter):  # it is computed: shrinking is refused
            continue
        rows = (weight.detach().norm(order, dim=1) > bound).nonzero().flatten()
        if len(rows) and id(weight) not in seen:
            shrunk = weight.detach().clone()
            yield weight, "data", SHRINK(shrunk, rows, bound, order)
        seen.add(id(weight))
        yield module, "max_norm", None


def _refuse_to_shrink(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "torch.nn.functional.embedding was called with max_norm, which changes the weights "
        "whenever "
        "the loss is evaluated: use torch.nn.Embedding(..., max_norm=...), whose rows are shrunk "
        "once and put back, or call it without max_norm"
    )


@contextmanager
def buffers_kept(model: nn.Module, copies: Copies) -> Iterator[None]:
    """Puts buffers back on leaving: their entries, and which tensor each name stands for.

    A module that has changed a buffer gets its plain attributes back as well, since what it notes
    there (the length that its frequencies are for) belongs to the buffer.

    Args:
        model: Its modules' buffers are meant.
        copies: Large buffers are copied once and again after somebody has changed them, small ones
            every time.
    """
    found = [(module, dict(vars(module)), dict(module._buffers)) for module in modules_of(model)]
    buffers = {
        id(buffer): buffer
        for _, _, held in found
        for buffer in held.values()
        if buffer is not None and _can_be_written_to(buffer)
    }
    places = {key: buffer.data for key, buffer in buffers.items()}
    for key, buffer in buffers.items():
        known = copies.get(key)
        if buffer.numel() <= SMALL or known is None or known[1] != buffer._version:
            copies[key] = (buffer, buffer._version, buffer.detach().clone())
    for key in copies.keys() - buffers.keys():
        del copies[key]
    taken = dict(copies)  # one evaluation may lie within another one
    try:
        yield
    finally:
        changed = {key for key, b in buffers.items() if _put_back(b, places[key], taken[key])}
        for module, attributes, held in found:
            now = module._buffers
            same = now.keys() == held.keys() and all(now[name] is held[name] for name in held)
            if not same or any(id(buffer) in changed for buffer in held.values()):
                _restore(vars(module), attributes)
                _restore(module._buffers, held)
        for key, buffer in buffers.items():
            copies[key] = (buffer, buffer._version, taken[key][2])


def _can_be_written_to(buffer: Tensor) -> bool:
    """And compared: subclasses and sparse tensors are put back by name alone."""
    ordinary = type(buffer) in (Tensor, nn.Parameter) and buffer.layout is torch.strided
    return ordinary and not buffer.is_inference()


@torch.no_grad()
def _put_back(buffer: Tensor, place: Tensor, copy: tuple[Tensor, int, Tensor]) -> bool:
    """Whether the buffer was written to; its entries are those of the copy then."""
    _, version, entries = copy
    moved = buffer.data_ptr() != place.data_ptr() or buffer.shape != place.shape
    if moved:
        buffer.data = place
    written = moved or buffer._version != version
    if not (written or buffer.numel() <= SMALL) or _equal(buffer, entries):
        return written
    buffer.copy_(entries)
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    """Entry by entry, NaN the same as NaN."""
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    )


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        del now[name]
    now.update(before)
