"""The parameters of a model, cut into named blocks: disjoint, complete, tied weights once."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.architectures import Names, layer_key, layer_prefix, unit
from blockspec.model.pieces import FULL, LAYER
from blockspec.model.pieces import Block as Block
from blockspec.model.pieces import Blocks as Blocks
from blockspec.model.pieces import Piece as Piece
from blockspec.model.places import Places
from blockspec.model.roles import Layout, layouts, watch_example
from blockspec.model.row_gradients import Seen

GRANULARITIES = ("tensor", "matrix", "head", "neuron", "layer", "model")
Patterns = str | Sequence[str]
Rows = Sequence[int]


def gather(block: Block, tensors: Mapping[str, Tensor]) -> Tensor:
    """The block's vector (P,), a copy, out of tensors that have the shapes of the parameters; on
    the device of the first, where a model is spread over several.
    """
    parts = [piece.select(tensors[piece.parameter]).reshape(-1) for piece in block.pieces]
    return torch.cat([part.to(parts[0].device) for part in parts])


def gathered(block: Block, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """As :func:`gather`, with zeros for tensors that are absent; of the dtype of :func:`zeros`.

    Args:
        block: It may have parameters that are not in ``tensors``.
        tensors: By name of the parameter.
        like: All of the block's parameters.
    """
    if all(piece.parameter in tensors for piece in block.pieces):
        found = gather(block, tensors)
        return found.to(_dtype(block, like))
    found = zeros(block, like)
    add(block, found, tensors, like)
    return found


def scatter(block: Block, vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The block's vector (P,) as tensors of the shapes, dtypes and devices of ``like``; zero
    outside of the block.

    Only the block's own parameters are keys. A tensor that is whole in the block is a view of
    ``vector`` where dtype, device and :func:`shaped` allow.
    """
    assert vector.shape == (block.numel,), (
        f"{block.name}: vector {tuple(vector.shape)}, block ({block.numel},)"
    )
    tensors: dict[str, Tensor] = {}
    start = 0
    for piece in block.pieces:
        reference = like[piece.parameter]
        stop = start + piece.size(reference.shape)
        if piece.whole:
            tensors[piece.parameter] = shaped(vector[start:stop], reference).to(reference)
        else:
            if piece.parameter not in tensors:
                tensors[piece.parameter] = torch.zeros_like(reference)
            piece.fill(tensors[piece.parameter], vector[start:stop].to(reference))
        start = stop
    return tensors


def shaped(part: Tensor, like: Tensor) -> Tensor:
    """A part of a vector in the shape of ``like``: a view, or a copy where a model that takes pairs
    of numbers for complex ones (``torch.view_as_complex``) could not: they begin at even places.
    """
    pairs = like.ndim > 0 and like.shape[-1] % 2 == 0
    return (part.clone() if pairs and part.storage_offset() % 2 else part).view(like.shape)


def zeros(block: Block, like: Mapping[str, Tensor]) -> Tensor:
    """The block's vector (P,) of zeros, of the dtype that holds those of its parameters."""
    device = like[block.parameters[0]].device
    return torch.zeros(block.numel, dtype=_dtype(block, like), device=device)


def _dtype(block: Block, like: Mapping[str, Tensor]) -> torch.dtype:
    """That holds the numbers of all of the block's parameters."""
    first, *others = (like[name].dtype for name in block.parameters)
    return reduce(torch.promote_types, others, first)


def add(
    block: Block, vector: Tensor, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> None:
    """Adds tensors that have the shapes of the parameters to the block's vector (P,), in place.

    Args:
        block: It may have parameters that are not in ``tensors``: they are zeros.
        vector: Is changed.
        tensors: By name of the parameter.
        like: All of the block's parameters.
    """
    start = 0
    for piece in block.pieces:
        stop = start + piece.size(like[piece.parameter].shape)
        if (tensor := tensors.get(piece.parameter)) is not None:
            vector[start:stop] += piece.select(tensor).reshape(-1).to(vector.device)
        start = stop


def partition(
    model: nn.Module,
    by: str | Mapping[str, Patterns] = "matrix",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    *,
    example: Any = None,
    names: Names | None = None,
) -> Blocks:
    """Cut the parameters that require gradients into blocks.

    Args:
        model: Any module. What GPT-2, nanoGPT, ViT, BERT, Llama and their like, ResNet and VGG call
            their parts is known; what is not known is a block per tensor, of kind ``other``.
        by: ``"tensor"``: each parameter. ``"matrix"``: fused query-key-value tensors are cut into
            the three. ``"head"``: query and key also by attention head (grouped queries: key by key
            head). ``"neuron"``: the rule of Adam-mini (Zhang et al., arXiv 2406.16793): query and
            key by head; value, attention output and MLP by output neuron; token embedding and LM
            head by token; all else whole. ``"layer"``: one block per layer, the parameters outside
            of the layers one by one. ``"model"``: one block, ``model``: the full matrix. Or blocks
            of one's own, ``{name: patterns}``, with globs on the names of parameters or of
            ``"matrix"`` blocks; they must cover everything, once.
        include: Glob, or several, on block names: blocks that match none are left out.
        exclude: Glob, or several, on block names: blocks that match one are left out.
        example: A batch that the model takes (a mapping, a pair whose first is the input, a
            tensor), or a function that runs the model and gives its outputs. With it, roles are
            found by watching one forward pass on the first example of the batch and at most ten
            small gradients, see :mod:`blockspec.model.watching`; where that disagrees with the
            names, it wins, and ``Block.note`` says so. Without it, names alone decide.
        names: What the parts of your model are called, kind -> endings of names: ``{"query":
            ["attn.my_q"], "mlp_in": ["@mlp.first"]}``; see
            ``blockspec.model.architectures.ENDINGS``. They come before the known ones, and before
            what is seen in a forward pass. A kind may be one of your own.

    Returns:
        Blocks, a tuple, in the order of ``named_parameters()``; without ``include`` and ``exclude``
        disjoint and complete. A tied tensor is in one block, under its first name. Where a number
        of heads is not found, a matrix stays whole.

    Raises:
        ValueError: Unknown ``by``, a pattern that matches nothing, blocks of one's own that overlap
            or leave a gap, an empty partition, a model without parameters that require gradients.
    """
    if by not in GRANULARITIES if isinstance(by, str) else not isinstance(by, Mapping):
        raise ValueError(
            f"by={by!r} is not one of {', '.join(GRANULARITIES)}, nor a mapping "
            f"{{name: [patterns]}}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"no parameter of {type(model).__name__} requires gradients, so there is nothing to "
            "differentiate by: "
            "model.requires_grad_(True)"
        )
    seen = {} if example is None or by == "model" else watch_example(model, example)
    blocks = (
        _blocks(model, by, names, seen)
        if isinstance(by, str)
        else _own_blocks(_blocks(model, "matrix", names, seen), by)
    )
    return _selected(blocks, include, exclude)


def _blocks(
    model: nn.Module, by: str, known: Names | None, seen: Mapping[str, Seen]
) -> list[Block]:
    if by == "model":
        return [_union("model", _blocks(model, "tensor", known, seen), FULL)]
    prefixes, numbers = _layers(model)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    found = layouts(model, wanted, known, seen)
    places = Places.of(prefixes.values())
    pieces = [
        Block(
            name,
            kind,
            numbers.get(prefixes.get(parameter, "")),
            piece.size(tensor.shape),
            (piece,),
            found[parameter].note,
            places.role(parameter, kind, found[parameter].matrix, found[parameter].crossed),
        )
        for parameter, tensor in wanted.items()
        for name, kind, piece in _cut(parameter, tensor, found[parameter], by)
    ]
    return _by_layer(pieces, prefixes, places) if by == "layer" else pieces


def _layers(model: nn.Module) -> tuple[dict[str, str], dict[str, int]]:
    """Parameter -> prefix of its layer, and prefix -> number of the layer, counted over the frozen
    ones too.
    """
    found = {name: layer_prefix(name) for name, _ in model.named_parameters()}
    prefixes = [prefix for prefix in dict.fromkeys(found.values()) if prefix is not None]
    above = {".".join(p.split(".")[:n]) for p in prefixes for n in range(1, p.count(".") + 1)}
    layers = [prefix for prefix in prefixes if prefix not in above]  # a stage is no layer
    keys = list(dict.fromkeys(map(layer_key, layers)))
    numbers = {prefix: keys.index(layer_key(prefix)) for prefix in layers}
    return {n: layer_key(p) for n, p in found.items() if p in numbers}, {
        layer_key(prefix): number for prefix, number in numbers.items()
    }


def _union(name: str, blocks: Sequence[Block], kind: str = "other", role: str = "") -> Block:
    layers = {block.layer for block in blocks}
    pieces = tuple(piece for block in blocks for piece in block.pieces)
    layer = layers.pop() if len(layers) == 1 else None
    return Block(name, kind, layer, sum(b.numel for b in blocks), pieces, role=role)


def _by_layer(blocks: Sequence[Block], prefixes: Mapping[str, str], places: Places) -> list[Block]:
    groups: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        groups[prefixes.get(block.name, block.name)].append(block)
    return [
        group[0]
        if name == group[0].name
        else _union(name, group, LAYER, places.role(name, LAYER, LAYER))
        for name, group in groups.items()
    ]


def _cut(name: str, tensor: Tensor, layout: Layout, by: str) -> Iterator[tuple[str, str, Piece]]:
    """Name, kind and piece of every block that ``by`` cuts the parameter into."""
    if by in ("tensor", "layer") or not layout.cuttable:
        yield name, layout.kind, Piece(name)
        return
    experts = range(tensor.shape[0]) if layout.experts else [None]
    axis = None if layout.axis is None else layout.axis - layout.experts
    size = 1 if layout.axis is None else tensor.shape[layout.axis]
    for expert in experts:
        stem = name if expert is None else f"{name}/expert_{expert}"
        for matrix, rows in (layout.parts or {layout.matrix: range(size)}).items():
            kind = "bias" if layout.kind == "bias" else matrix
            part = f"{stem}/{matrix}" if layout.parts else stem
            for suffix, some in _units(rows, _unit(by, matrix, tensor, layout), matrix, layout):
                whole = len(some) == size
                at, rows_ = (None, None) if whole else (axis, _index(some))
                piece = Piece(name, at, rows_, expert)
                yield part + suffix, kind, piece


def _unit(by: str, matrix: str, tensor: Tensor, layout: Layout) -> str | None:
    """What a matrix is cut into; a bias is cut by head alone."""
    what = unit(by, matrix, layout.tokens)
    return what if tensor.ndim - layout.experts >= 2 or what == "head" else None


def _units(rows: Rows, what: str | None, matrix: str, layout: Layout) -> Iterator[tuple[str, Rows]]:
    heads = layout.heads.get(matrix, ()) if what == "head" else [[row] for row in rows]
    if what is None or not heads or layout.axis is None:
        yield "", rows
        return
    for number, some in enumerate(heads):
        yield f"/{what}_{number}", some


def _index(rows: Rows) -> slice | tuple[int, ...]:
    start, stop = rows[0], rows[-1] + 1
    return slice(start, stop) if stop - start == len(rows) else tuple(rows)


def _own_blocks(blocks: Sequence[Block], own: Mapping[str, Patterns]) -> list[Block]:
    """User-defined unions of ``blocks``, each of which is a matrix of one parameter."""
    owners: dict[str, str] = {}
    for name, patterns in own.items():
        for block in _matches(blocks, patterns, f"block {name!r}", also_parameters=True):
            if owners.setdefault(block.name, name) != name:
                raise ValueError(
                    f"blocks {owners[block.name]!r} and {name!r} overlap: both hold {block.name}"
                )
    left = [block.name for block in blocks if block.name not in owners]
    if left:
        raise ValueError(
            f"no block holds {_some(left)}: add a block for the rest; exclude= leaves it out if it "
            "is not wanted"
        )
    sizes = Counter(block.parameters[0] for block in blocks)
    return [
        _union(name, _merged([b for b in blocks if owners[b.name] == name], sizes)) for name in own
    ]


def _merged(blocks: Sequence[Block], sizes: Mapping[str, int]) -> list[Block]:
    """The blocks, those that make up a whole parameter as one: its tensors need no copies then."""
    groups: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        groups[block.parameters[0]].append(block)
    return [
        block
        for name, group in groups.items()
        for block in (
            group
            if len(group) < sizes[name]
            else [replace(_union(name, group), pieces=(Piece(name),))]
        )
    ]


def _selected(blocks: list[Block], include: Patterns | None, exclude: Patterns | None) -> Blocks:
    wanted = blocks if include is None else _matches(blocks, include, "include")
    unwanted = (
        set() if exclude is None else {block.name for block in _matches(blocks, exclude, "exclude")}
    )
    chosen = Blocks(block for block in wanted if block.name not in unwanted)
    if not chosen:
        raise ValueError(
            f"the partition is empty: include={include!r} without exclude={exclude!r} leaves none "
            f"of {len(blocks)} "
            "blocks; widen include or narrow exclude"
        )
    return chosen


def _matches(
    blocks: Sequence[Block], patterns: Patterns, where: str, also_parameters: bool = False
) -> list[Block]:
    """The blocks whose name (or parameter's name) matches one of the globs; each glob must match
    something.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.compile(fnmatch.translate(pattern)).match
        names = {
            b.name for b in blocks if match(b.name) or (also_parameters and match(b.parameters[0]))
        }
        if not names:
            raise ValueError(f"{where}: {pattern!r} matches no block; {_nearest(pattern, blocks)}")
        found |= names
    return [block for block in blocks if block.name in found]


def _nearest(pattern: str, blocks: Sequence[Block]) -> str:
    """Names like the pattern; those of neurons and tokens, which may be 100,000, as one."""
    names = list(
        dict.fromkeys(re.sub(r"/(neuron|token)_\d+$", r"/\1_*", block.name) for block in blocks)
    )
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"the nearest are {', '.join(near)}" if near else f"there are {_some(names)}"


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (
        f" and {len(names) - shown} more" if len(names) > shown else ""
    )
