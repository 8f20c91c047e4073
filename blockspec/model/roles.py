"""How every parameter is laid out: its kind, its parts, its heads; by names first, and by watching
where there is a batch.

Names are a guess. Where a forward pass was watched and says something else, that stands, and the
layout says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.architectures import CONTEXTS, TOKENS, Names, Role, role
from blockspec.model.cuts import Heads, fused_rows, heads_around
from blockspec.model.evaluation import evaluation
from blockspec.model.examples import mapped
from blockspec.model.objective import placed
from blockspec.model.places import CROSS
from blockspec.model.row_gradients import Seen
from blockspec.model.watching import tensors, watch

Rows = Sequence[int]
HALVES = {
    "gate_up_proj": ("mlp_gate", "mlp_in"),
    "@mlp.input_linear": ("mlp_gate", "mlp_in"),
    "w12": ("mlp_gate", "mlp_in"),
}
"""Endings of tensors that hold gate and up, one after the other."""

INTERLEAVED = frozenset({"GptOssExperts"})
"""Modules whose gate and up take turns."""

MLP = ("mlp_in", "mlp_gate", "mlp_out")
KEPT: dict[str, tuple[str, ...]] = {
    "conv": (*MLP, "head", "embedding", "router", "attention_gate"),
    "mixer": (*MLP, "attention_gate"),  # a gate around a recurrence looks like an MLP
    "position": ("embedding", "attention_gate", "router"),
    "embedding": ("head",),  # tied
    "head": ("embedding", *MLP),
}
"""Kind by name -> kinds that a forward pass cannot tell from it: the name stands."""


@dataclass(frozen=True)
class Layout:
    """What a parameter holds.

    Args:
        kind: Of the whole parameter.
        matrix: For a bias the kind of the matrix beside it, else the kind.
        axis: That counts the outputs; None where that is not known.
        parts: Kind -> rows, where the parameter holds several.
        heads: Kind -> rows of each head.
        tokens: Whether it has one row for each token.
        experts: Whether its first axis counts experts.
        note: What is to be said of it.
        taught: Whether its kind is one that the user named.
        crossed: Whether it was seen to be of cross-attention; None: names tell.
    """

    kind: str
    matrix: str
    axis: int | None
    parts: Mapping[str, Rows] = field(default_factory=dict)
    heads: Mapping[str, Sequence[Rows]] = field(default_factory=dict)
    tokens: bool = False
    experts: bool = False
    cuttable: bool = True
    note: str = ""
    taught: bool = False
    crossed: bool | None = None


def layouts(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    names: Names | None,
    seen: Mapping[str, Seen],
) -> dict[str, Layout]:
    """Parameter -> its layout. ``seen``: what watching found; empty without a batch."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: named(name, p, modules, names) for name, p in parameters.items()}
    found = _with_vocabulary(found, parameters, modules)
    if not seen:
        return found
    return {
        name: _placed(corrected(layout, seen, name, parameters[name]), name, seen.get(name))
        for name, layout in found.items()
    }


def _placed(layout: Layout, name: str, found: Seen | None) -> Layout:
    """The layout with what was seen of the sequence that its attention looks at."""
    if found is None or found.crossed is None:
        return layout
    note = layout.note
    if CROSS.search(name) and not found.crossed:
        told = "the name says cross-attention, the forward pass says self-attention"
        note = f"{note}; {told}" if note else told
    return replace(layout, crossed=found.crossed, note=note)


def _with_vocabulary(
    found: Mapping[str, Layout],
    parameters: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> dict[str, Layout]:
    """The layouts, with heads that are stored as (in, out) turned: a class tells what counts the
    outputs, else the number of tokens that are embedded; where neither does, the head is whole.
    """
    sizes = {
        len(parameters[name])
        for name, layout in found.items()
        if layout.tokens and layout.kind == "embedding" and parameters[name].ndim == 2
    }

    def turned(name: str, layout: Layout) -> Layout:
        tensor, owner = parameters[name], modules[name.rpartition(".")[0]]
        bare = layout.tokens and layout.kind == "head" and tensor.ndim == 2
        if not bare or isinstance(owner, (nn.Linear, nn.Embedding)) or layout.axis is None:
            return layout
        fits = [axis for axis in (layout.axis, 1 - layout.axis) if tensor.shape[axis] in sizes]
        if fits:
            return replace(layout, axis=fits[0])
        return replace(layout, tokens=False, note="which axis counts the tokens is not known")

    return {name: turned(name, layout) for name, layout in found.items()}


def named(
    name: str, tensor: Tensor, modules: Mapping[str, nn.Module], names: Names | None
) -> Layout:
    """The layout of a parameter as its name and the attributes around it tell."""
    path = name.rpartition(".")[0]
    part = role(name, modules[path], names)
    found = _named(name, tensor, part, modules)
    own = {ending for endings in (names or {}).values() for ending in endings}
    return replace(found, taught=part.ending in own)


def _named(name: str, tensor: Tensor, part: Role, modules: Mapping[str, nn.Module]) -> Layout:
    path = name.rpartition(".")[0]
    if part.kind in ("norm", "adapter") or tensor.ndim == 0:
        return Layout(part.kind, part.matrix, None, cuttable=False)
    if tensor.ndim > 2:
        return _experts(name, tensor, part, modules[path])
    size = tensor.shape[part.axis]
    heads = heads_around(modules, path)
    inputs = _inputs(name, size, modules[path])
    parts = fused_rows(part, size, _attention(name, modules), heads, inputs)
    parts = parts or _halves(part, size, modules[path], name)
    note = "" if parts or part.matrix != "qkv" else _WHOLE
    matrices = parts or {part.matrix: range(size)}
    by_head = {m: _heads(rows, m, heads, inputs) for m, rows in matrices.items()}
    return Layout(
        part.kind,
        part.matrix,
        part.axis,
        parts,
        {matrix: found for matrix, found in by_head.items() if found},
        part.ending in TOKENS,
        note=note,
    )


_WHOLE = "which rows are query, key and value is not known from names: whole"


def _heads(rows: Rows, matrix: str, heads: Heads, inputs: int | None) -> list[Rows]:
    count = heads.counts(matrix, len(rows), inputs)
    if matrix not in ("query", "key", "attention_gate") or not count:
        return []
    step = len(rows) // count
    return [rows[number * step : (number + 1) * step] for number in range(count)]


def _experts(name: str, tensor: Tensor, part: Role, owner: nn.Module) -> Layout:
    """Fused experts: (experts, out, in), or (experts, in, out) where the module says so. Beyond
    that nothing is known.
    """
    words = CONTEXTS["@experts"]
    fused = tensor.ndim == 3 and any(word in name.lower() for word in words)
    if not fused or not part.matrix.startswith("mlp"):
        return Layout(part.kind, part.matrix, None, cuttable=False)
    turned = getattr(owner, "is_transposed", None)
    turned = type(owner).__name__ in INTERLEAVED if turned is None else turned
    axis = 2 if turned else 1
    parts = _halves(part, tensor.shape[axis], owner, name)
    return Layout(part.kind, part.matrix, axis, parts, experts=True)


def _halves(part: Role, size: int, owner: nn.Module, name: str) -> dict[str, Rows]:
    """Gate and up of a tensor that holds both."""
    kinds = HALVES.get(part.ending)
    if kinds is None or size % 2:
        return {}
    if type(owner).__name__ in INTERLEAVED:
        return {kind: tuple(range(start, size, 2)) for start, kind in enumerate(kinds)}
    return {kinds[0]: range(size // 2), kinds[1]: range(size // 2, size)}


def _attention(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module whose projection the parameter belongs to; MultiheadAttention holds it
    directly.
    """
    path, _, last = name.rpartition(".")
    return modules[path.rpartition(".")[0] if last in ("weight", "bias") else path]


def _inputs(name: str, outputs: int, owner: nn.Module) -> int | None:
    """Inputs of a matrix, or of the matrix beside a bias."""
    attribute = re.sub("bias$", "weight", name.rpartition(".")[2])
    matrix = owner._parameters.get(attribute)
    if matrix is None:  # a computed one: in training mode, spectral norm changes by being read
        with evaluation(owner, batch_norm="eval", copies={}), torch.no_grad():
            matrix = getattr(owner, attribute, None)
    return matrix.numel() // outputs if isinstance(matrix, Tensor) and matrix.ndim == 2 else None


def corrected(layout: Layout, seen: Mapping[str, Seen], name: str, tensor: Tensor) -> Layout:
    """The layout as the forward pass shows it; a bias goes with the matrix beside it."""
    if layout.kind == "bias":
        beside = re.sub("bias$", "weight", name)
        found = seen.get(beside, seen.get(re.sub("_bias$", "", name)))
        untold = layout.taught and found is not None and found.kind != layout.matrix
        if found is None or untold or layout.experts or tensor.ndim != 1:
            return layout
        return _as_seen(replace(layout, axis=0), replace(found, axis=0))
    found = seen.get(name)
    if found is None or layout.kind == "adapter" or (layout.taught and found.kind != layout.kind):
        return layout
    if layout.kind == "norm" or found.kind == "norm":
        unknown = layout.kind == "other"
        return Layout("norm", "norm", None, cuttable=False) if unknown else layout
    if found.kind == "position" and layout.kind != "other":
        return layout
    if found.kind in KEPT.get(layout.matrix, ()):
        tied = {layout.matrix, found.kind} == {"embedding", "head"}
        return replace(layout, tokens=layout.tokens or (tied and found.tokens))
    return _as_seen(layout, found)


def _as_seen(layout: Layout, found: Seen) -> Layout:
    if found.axis is None:  # its kind is known, and nothing of its rows
        same = found.kind == layout.matrix
        return replace(
            _kind(layout, found),
            parts=layout.parts if same else {},
            heads=layout.heads if same else {},
        )
    heads: dict[str, Sequence[Rows]] = dict(found.heads)
    if "attention_gate" in layout.heads and "attention_gate" in found.parts:
        heads["attention_gate"] = layout.heads["attention_gate"]
    return replace(
        _kind(layout, found),
        axis=found.axis,
        parts=found.parts,
        heads=heads,
        tokens=found.tokens or (layout.tokens and found.kind == layout.matrix),
        cuttable=True,
    )


def _kind(layout: Layout, found: Seen) -> Layout:
    """The kind that was seen, and a note if names say another."""
    same = found.kind == layout.matrix or layout.matrix == "other"
    note = "" if same else f"the name says {layout.matrix}, the forward pass says {found.kind}"
    if found.kind == "qkv" and not found.parts:
        note = "which rows are query, key and value is not known: whole"
    kind = "bias" if layout.kind == "bias" else found.kind
    return replace(layout, kind=kind, matrix=found.kind, note=note)


LONGEST = 64  # tokens of the example that are watched
Run = Callable[[], Any]


def watch_example(model: nn.Module, example: Any) -> dict[str, Seen]:
    """What the parameters are seen to do on the first example of a batch, on a function's pass, or
    on an objective.

    Raises:
        ValueError: The model cannot be run; with an objective it warns, and nothing is seen.
    """
    objective = hasattr(example, "whole_batches")
    error: Exception | None = None
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number when it is begun
        batch = next(iter(example.whole_batches())) if objective else example
        for run, given in _runs(model, batch, getattr(example, "loss", None)):
            try:
                return watch(model, run, given)
            except _LossError as failed:  # it would fail in the first product, too
                raise (failed.__cause__ or failed) from None
            except Exception as failed:  # a model's own errors are of any kind
                error = error or failed
    message = (
        f"{type(model).__name__} cannot be run on the example, a {type(batch).__name__} "
        f"({type(error).__name__}: {error})"
    )
    if objective:
        warnings.warn(f"{message}: what its parameters do is told by names alone", stacklevel=4)
        return {}
    raise ValueError(
        f"{message}; pass a function that runs it, example=lambda: model(...), or no example"
    ) from error


def _runs(model: nn.Module, batch: Any, loss: Any) -> Iterator[tuple[Run, Any]]:
    """Ways of running the model, the cheapest first: one short example, one example, the batch, the
    loss.
    """
    if callable(batch):
        yield batch, None
        return
    first = next(model.parameters())
    batch = placed(batch, first.device, first.dtype if first.is_floating_point() else None)
    for given in (_shortened(_first(batch)), _first(batch), batch):
        yield _forward(model, given), given
    if loss is not None:
        yield (lambda: _by_loss(model, batch, loss)), batch


class _LossError(Exception):
    """A user's loss raised; the cause says what."""


def _by_loss(model: nn.Module, batch: Any, loss: Any) -> Any:
    try:
        return getattr(loss, "outputs", loss)(model, batch)
    except Exception as error:
        raise _LossError from error


def _first(batch: Any) -> Any:
    """The first example, where all tensors have equally many."""
    lengths = {len(t) if t.ndim else 0 for t in tensors(batch)}
    return mapped(batch, lambda t: t[:1]) if len(lengths) == 1 and lengths != {0} else batch


def _shortened(batch: Any) -> Any:
    """The first tokens of sequences."""
    ids = [t for t in tensors(batch) if t.ndim == 2 and not t.is_floating_point()]
    if not ids:
        return batch
    length = ids[0].shape[1]
    return mapped(batch, lambda t: t[:, :LONGEST] if t.ndim == 2 and t.shape[1] == length else t)


def _forward(model: nn.Module, batch: Any) -> Run:
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if decodes and "labels" in batch and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
        return lambda: model(**inputs)
    if isinstance(batch, (tuple, list)):
        return lambda: model(batch[0])
    return lambda: model(batch)
