"""What each parameter does, found by watching one forward pass.

The idea: where attention is computed, two activations are multiplied, go through a softmax, and
multiply a third one. Those three are query, key and value, whatever the model calls them, and the
linears that they come from are their matrices. Which rows of a matrix belong to which head is told
by gradients: number the heads at the attention kernel, send a random vector back from every head,
once as it is and once times the head's number, and stop at the matrices. A row's second gradient is
its first one times the number of its head, and zero if it belongs to none. One gradient does this
for all layers at once, because nothing passes a matrix; query, key and value take two to three
each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from blockspec.model.caches import without_caches
from blockspec.model.evaluation import evaluation
from blockspec.model.graph import (
    CHOICES,
    CONVOLUTION,
    NONLINEAR,
    PRODUCTS,
    RESHAPES,
    SOFTMAXES,
    Edge,
    Graph,
    Linear,
    edge_tensor_like,
    mixes_tokens,
    operation,
    shape,
    signed,
    swapped,
)
from blockspec.model.kernels import twice_differentiable

PARTS = ("query", "key", "value")
SAVED = {"Bmm": ("self", "mat2"), "Baddbmm": ("batch1", "batch2"), "Mm": ("self", "mat2")}
NORMS = frozenset({"NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "Rsqrt"})
MOST_BETWEEN = 60  # operations between the matrices of an MLP: more is a recurrence written out
MOST_AXES = 2  # of a factor that are tried as the heads' axis: heads and windows
PRECISION = 0.05  # of a head's number, read from gradients
Rows = tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What a parameter was seen to do.

    Args:
        kind: Of the whole of it, or ``qkv`` and the like where it holds several.
        axis: That counts its outputs; None where that is not known.
        parts: Kind -> rows, for a parameter that holds several kinds.
        heads: Kind -> rows of each of its heads, where rows belong to heads.
        tokens: Whether it has a row for each token of the vocabulary.
    """

    kind: str
    axis: int | None = None
    parts: Mapping[str, Rows] = field(default_factory=dict)
    heads: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    tokens: bool = False


@dataclass(eq=False)
class Factor:
    """Query, key or value at the kernel: the edge, and its leading axes with the number of the head
    at each place.
    """

    edge: Edge
    axes: list[tuple[int, list[int]]]
    linears: list[Linear]


@dataclass(eq=False)
class Attention:
    factors: dict[str, Factor]
    scores: Node  # the product of query and key
    output: Node  # the product with the value


@dataclass(eq=False)
class Mlp:
    """Linears that widen, and the one that narrows; ``edges``: what the gate and the rest are seen
    at.
    """

    inputs: list[Linear]
    output: Linear
    edges: dict[str, Edge]
    gate: set[Linear]


def watch(model: nn.Module, forward: Callable[[], Any], batch: Any = None) -> dict[str, Seen]:
    """What the parameters do in one forward pass.

    Args:
        model: The module. It is run in eval mode, and is left as it was.
        forward: Runs the model and gives what it predicts; a small batch is enough.
        batch: What ``forward`` runs on; tells tokens from positions.

    Returns:
        Parameter -> what it was seen to do; those that were not understood are left out.
    """
    with watched(model):
        with without_caches(model), _eager_experts(model), twice_differentiable(model):
            outputs = list(tensors(forward()))
        return _Watch(Graph(outputs, model), model, batch).result()


EXPERTS = "_experts_implementation_internal"


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Hugging Face's fused experts run one by one: their grouped kernel knows no float64."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    switched = {
        id(c): (c, vars(c)[EXPERTS]) for c in configs if EXPERTS in getattr(c, "__dict__", ())
    }
    try:
        for config, _ in switched.values():
            setattr(config, EXPERTS, "eager")
        yield
    finally:
        for config, implementation in switched.values():
            setattr(config, EXPERTS, implementation)


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Eval mode, and all parameters with gradients; restored on leaving."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    with evaluation(model, batch_norm="eval", copies={}), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


class _Watch:
    """The findings so far: linear -> kind, and what needs gradients."""

    def __init__(self, graph: Graph, model: nn.Module, batch: Any) -> None:
        self.graph = graph
        self.parameters = dict(model.named_parameters())
        self.integers = [t for t in tensors(batch) if not t.is_floating_point()]
        self.kinds: dict[Linear, str] = {}
        self.attentions = [a for n in graph.nodes if (a := attention(graph, n)) is not None]
        self.latent: dict[Linear, str] = {}  # low-rank factors before query, key and value
        self.gated: dict[Linear, list[Linear]] = {}  # attention output -> gates

    def result(self) -> dict[str, Seen]:
        for found in self.attentions:
            for part in PARTS:
                for linear in found.factors[part].linears:
                    before = self.kinds.setdefault(linear, part)
                    self.kinds[linear] = part if before == part else "qkv"
        for found in self.attentions:
            self._output(found)
        self._low_rank()
        self._heads()
        self._routers()
        mlps = self._mlps()
        rows = measure(self.graph, self.attentions, mlps, self.gated, self.parameters)
        seen = self._linears(rows)
        return {**self._positions(), **self._norms(), **seen, **self._tables()}

    def _output(self, found: Attention) -> None:
        for node, place in self.graph.ahead(found.output):
            linear = self.graph.linears.get(node)
            if linear is None or linear.input is None or place != _input_place(linear):
                continue
            if self.kinds.setdefault(linear, "attention_output") != "attention_output":
                continue
            behind = self.graph.behind(linear.input, through_softmax=False).linears
            values = found.factors["value"].linears
            self.gated[linear] = list(behind)
            for gate in behind:
                if gate not in values and gate not in self.kinds:
                    self.kinds[gate] = "attention_gate"

    def _low_rank(self) -> None:
        """A matrix before query, key and value that leads nowhere else; one right after the
        attention output.
        """
        kernels = {n for found in self.attentions for n in (found.scores, found.output)}
        for linear in self.graph.linears.values():
            behind = self.graph.behind(linear.input)
            kind = self.kinds.get(linear)
            if behind.stream or not behind.linears:
                continue
            for before in behind.linears if kind in (*PARTS, "qkv") else ():
                targets = [node for node, _ in self.graph.ahead(before.node)]
                if all(node in kernels or self._attends(node) for node in targets):
                    known = self.latent.setdefault(before, kind)  # type: ignore[arg-type]
                    self.latent[before] = known if known == kind else "qkv"
            follows = all(self.kinds.get(b) == "attention_output" for b in behind.linears)
            straight = not any(operation(node) in NORMS for node in behind.nodes)
            if kind is None and follows and straight and not any(behind.linears.values()):
                self.kinds[linear] = "attention_output"
        for before, kind in self.latent.items():
            self.kinds.setdefault(before, kind)

    def _attends(self, node: Node) -> bool:
        """Whether a node is a matrix of query, key or value."""
        linear = self.graph.linears.get(node)
        return linear is not None and self.kinds.get(linear) in (*PARTS, "qkv")

    def _heads(self) -> None:
        """The last linear before the outputs."""
        for end in self.graph.ends[:1]:
            behind = self.graph.behind(end, through_softmax=False)
            if behind.stream or behind.products:
                continue
            for linear in behind.linears:
                self.kinds.setdefault(linear, "head")

    def _routers(self) -> None:
        for linear in self.graph.linears.values():
            if linear in self.kinds:
                continue
            if any(operation(node) in CHOICES for node, _ in self.graph.ahead(linear.node)):
                self.kinds[linear] = "router"

    def _mlps(self) -> list[Mlp]:
        found = []
        for linear in self.graph.linears.values():
            if self.kinds.get(linear) or operation(linear.node) == CONVOLUTION:
                continue
            if (mlp := self._mlp(linear)) is not None:
                found.append(mlp)
                self.kinds[linear] = "mlp_out"
        for mlp in found:
            for before in mlp.inputs:
                self.kinds.setdefault(before, "mlp_gate" if before in mlp.gate else "mlp_in")
        return found

    def _mlp(self, linear: Linear) -> Mlp | None:
        behind = self.graph.behind(linear.input)
        inputs = [
            b
            for b in behind.linears
            if self.kinds.get(b) not in ("router", "attention_output", "attention_gate", "head")
        ]
        convolved = any(operation(b.node) == CONVOLUTION for b in inputs)
        if behind.stream or not inputs or behind.products or convolved or len(inputs) > 4:
            return None
        if len(behind.nodes) > MOST_BETWEEN or any(map(mixes_tokens, behind.nodes)):
            return None
        for node in behind.nodes:
            edges = self._gate(node)
            if edges:
                sides = {side: set(self.graph.behind(edge).linears) for side, edge in edges.items()}
                return Mlp(inputs, linear, edges, sides["mlp_gate"] - sides["mlp_in"])
        if any(behind.linears.values()):
            assert linear.input is not None
            return Mlp(inputs, linear, {"mlp_in": linear.input}, set())
        return None

    def _before_activation(self, edge: Edge) -> Edge:
        """The edge before activations that may be flat, where gradients end."""
        while operation(edge[0]) in NONLINEAR and len(edge[0].next_functions) == 1:
            source, number = edge[0].next_functions[0]
            if source is None:
                break
            edge = (source, number)
        return edge

    def _gate(self, node: Node) -> dict[str, Edge]:
        """The two sides of a product of activations, one of them bent and the other not."""
        if operation(node) == "Glu":
            return {}
        if operation(node) != "Mul" or any(source is None for source, _ in node.next_functions):
            return {}
        if len(node.next_functions) != 2:
            return {}
        bent: dict[bool, Edge] = {}
        for edge in node.next_functions:
            if self.graph.leaves(edge):  # type: ignore[arg-type]
                return {}
            behind = self.graph.behind(edge)  # type: ignore[arg-type]
            if not behind.linears or behind.stream:
                return {}
            kinds = {self.kinds.get(linear) for linear in behind.linears}
            if kinds & {"router"}:
                return {}
            bent[any(behind.linears.values())] = edge  # type: ignore[assignment]
        if len(bent) < 2:
            return {}
        return {"mlp_gate": self._before_activation(bent[True]), "mlp_in": bent[False]}

    def _linears(self, rows: _Rows) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        vocabulary = {
            shape_[0] for shape_ in (self.parameters[n].shape for n in self._token_tables())
        }
        for linear, kind in self.kinds.items():
            for name, axis in linear.weights.items():
                if name in seen and kind != "qkv":
                    continue
                size = None if axis is None else self.parameters[name].shape[axis]
                tokens = kind == "head" and size in vocabulary
                at = None if axis is None else axis % self.parameters[name].ndim
                seen[name] = rows.seen(name, kind, at, tokens, self.latent.get(linear, "other"))
        return seen

    def _token_tables(self) -> list[str]:
        return [name for name, seen in self._tables().items() if seen.tokens]

    def _tables(self) -> dict[str, Seen]:
        found = {}
        for node in self.graph.nodes:
            if operation(node) not in ("Embedding", "IndexSelect"):
                continue
            for name in self.graph.leaves((node.next_functions[0][0], 0)):  # type: ignore[arg-type]
                indices = getattr(node, "_saved_indices", getattr(node, "_saved_index", None))
                if indices is None or self.parameters[name].ndim != 2:
                    continue
                if any(
                    t.numel() == indices.numel() and torch.equal(t.flatten(), indices.flatten())
                    for t in self.integers
                ):
                    many = self.parameters[name].shape[0] > 8  # types and languages are no tokens
                    found[name] = Seen("embedding", 0, tokens=many)
        return found

    def _positions(self) -> dict[str, Seen]:
        """What is added to activations, a row for each position."""
        found = {}
        for node in self.graph.nodes:
            if operation(node) != "Add" or len(node.next_functions) != 2:
                continue
            for source, number in node.next_functions:
                for name in self.graph.leaves((source, number)) if source is not None else ():
                    sizes = [size for size in self.parameters[name].shape if size > 1]
                    if len(sizes) == 2 and sizes[-1] == shape((node, 0))[-1]:
                        found[name] = Seen("position")
        return found

    def _norms(self) -> dict[str, Seen]:
        found = {}
        for node in self.graph.nodes:
            name = operation(node)
            if name in ("NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"):
                for source, _ in node.next_functions[1:]:
                    if source is not None:
                        found.update(dict.fromkeys(self.graph.leaves((source, 0)), Seen("norm")))
            elif name == "Mul" and len(node.next_functions) == 2:
                for scale, normed in (node.next_functions, node.next_functions[::-1]):
                    leaves = self.graph.leaves((scale[0], 0)) if scale[0] is not None else {}
                    small = all(self.parameters[leaf].ndim <= 1 for leaf in leaves)
                    if leaves and small and _is_normed(normed[0]):
                        found.update(dict.fromkeys(leaves, Seen("norm")))
        return found


def _is_normed(node: Node | None, depth: int = 4) -> bool:
    """Whether a node divides by a norm, a few operations back."""
    if node is None or depth == 0:
        return False
    if operation(node) in ("Rsqrt", "Norm", "LinalgVectorNorm"):
        return True
    views = (*RESHAPES, "Mul", "Div")
    return operation(node) in views and any(
        _is_normed(source, depth - 1) for source, _ in node.next_functions
    )


def _input_place(linear: Linear) -> int:
    places = PRODUCTS[operation(linear.node)]
    return next(
        (p for p in places if linear.input and linear.node.next_functions[p][0] is linear.input[0]),
        places[0],
    )


def attention(graph: Graph, softmax: Node) -> Attention | None:
    """The attention around a softmax; None if it is another softmax."""
    if operation(softmax) not in SOFTMAXES:
        return None
    output = next((step for step in graph.ahead(softmax) if step[0] not in graph.linears), None)
    if output is None or operation(output[0]) not in SAVED:
        return None
    factors = graph.factors(output[0])
    assert factors is not None
    right = output[0].next_functions[PRODUCTS[operation(output[0])][1]][0]
    value = factors[0] if _leads_to(right, softmax) else factors[1]
    scores = _scores(graph, softmax, value)
    if scores is None or value is None:
        return None
    product, turned = scores
    sides = graph.factors(product)
    assert sides is not None
    query, key = (sides[1], sides[0]) if turned else sides
    if query is None or key is None:
        return None
    edges = {"query": (product, query), "key": (product, key), "value": (output[0], value)}
    return Attention(
        {part: _factor(graph, part, node, edge) for part, (node, edge) in edges.items()},
        product,
        output[0],
    )


def _leads_to(node: Node | None, target: Node) -> bool:
    """Whether the way back from a factor meets the softmax before anything else is multiplied."""
    todo = [node] if node is not None else []
    for current in todo:
        if current is target:
            return True
        if operation(current) not in PRODUCTS and len(todo) < 200:
            todo += [s for s, _ in current.next_functions if s is not None and s not in todo]
    return False


def _scores(graph: Graph, softmax: Node, value: Edge | None) -> tuple[Node, bool] | None:
    """The product of query and key before a softmax, and whether the key is on its left."""
    paths: dict[Node, list[Node]] = {softmax: [softmax]}
    todo = [softmax]
    found: list[Node] = []
    for node in todo:
        for source, _ in node.next_functions:
            if source is None or source in paths or graph.is_stream(source):
                continue
            paths[source] = [*paths[node], source]
            if source in graph.linears or operation(source) in SOFTMAXES:
                continue
            if operation(source) in SAVED:
                found.append(source)
            else:
                todo.append(source)
    inputs = {l.input[0] for l in graph.behind(value).linears if l.input}

    def fits(product: Node) -> tuple[bool, bool]:
        """Two matrices behind it, the key's reading what the value's reads: not a product with
        positions.
        """
        sides = [graph.behind(edge).linears for edge in graph.factors(product) or ()]
        keys = {l.input[0] for side in sides[1:] for l in side if l.input}
        return (not all(sides), not (keys & inputs))

    if not found:
        return None
    product = min(found, key=fits)
    dim = signed(softmax._saved_dim)  # type: ignore[attr-defined]
    dim = dim if dim < 0 else dim - len(shape((softmax, 0)))
    return product, swapped(paths[product], dim) == -2


def _factor(graph: Graph, part: str, product: Node, edge: Edge) -> Factor:
    """The factor before it was folded into (B H, T, d), and its axes that may count heads."""
    folded = shape(edge)
    side = [source for source, _ in product.next_functions].index(edge[0])
    side -= len(product.next_functions) - 2
    at, lead = _unfolded(edge, folded)
    sizes = shape(at)
    values = getattr(product, f"_saved_{SAVED[operation(product)][side]}")
    same = values is not None and values.numel() == math.prod(sizes)
    values = values.detach().reshape(sizes) if same else None
    axes = [axis for axis in range(lead) if sizes[axis] > 1]
    if not axes and part != "value":  # one key for all heads: they stand beside the positions
        axes = [axis for axis in _beside(sizes, lead, side, folded) if sizes[axis] > 1]
    return Factor(
        at,
        [(axis, _numbers(values, axis, sizes[axis])) for axis in axes[:MOST_AXES] or [0]],
        list(graph.behind(edge).linears),
    )


def _unfolded(edge: Edge, folded: tuple[int, ...]) -> tuple[Edge, int]:
    """The edge before the first axes were made one, and how many they were."""
    current = edge
    while operation(current[0]) in RESHAPES and len(folded) == 3:
        source, number = current[0].next_functions[0]
        if source is None:
            break
        current = (source, number)
        sizes = shape(current)
        fits = [n for n in range(len(sizes)) if math.prod(sizes[:n]) == folded[0]]
        if len(sizes) > len(folded) and fits:
            whole = [n for n in fits if math.prod(sizes[n:]) == math.prod(folded[1:])]
            if whole:
                return current, whole[-1] if math.prod(folded[:1]) > 1 else whole[0]
    return edge, len(folded) - 2


def _beside(sizes: tuple[int, ...], lead: int, side: int, folded: tuple[int, ...]) -> range:
    """The axes that are neither leading nor summed over: the summed one is last on the left, first
    on the right.
    """
    rest = range(lead, len(sizes))
    if side == 0:
        return range(lead, next((m for m in rest if math.prod(sizes[m:]) == folded[-1]), lead))
    summed = (m for m in rest if math.prod(sizes[lead : m + 1]) == folded[-2])
    return range(next(summed, len(sizes)) + 1, len(sizes))


def _numbers(values: Tensor | None, axis: int, size: int) -> list[int]:
    """The head at each place along an axis: equal ones are one head, repeated for a group of
    queries.
    """
    if values is None or not values.any():
        return list(range(size))
    heads: list[Tensor] = []
    numbers = []
    for slice_ in values.unbind(axis):
        same = next((i for i, head in enumerate(heads) if torch.equal(head, slice_)), len(heads))
        if same == len(heads):
            heads.append(slice_)
        numbers.append(same)
    return numbers


@dataclass
class _Rows:
    """Gradients, by part: the plain one, and one for each axis that may be the heads'."""

    plain: dict[str, dict[str, Tensor]]
    coded: dict[str, list[dict[str, Tensor]]]
    gates: dict[str, Tensor]  # at the attention's output
    owners: dict[str, set[str]]  # parameter -> parts that it may hold
    sizes: dict[str, torch.Size]

    def seen(self, name: str, kind: str, axis: int | None, tokens: bool, rest: str) -> Seen:
        """What the parameter holds; ``rest``: the kind of the rows that lead to no head."""
        parts: dict[str, Rows] = {}
        heads: dict[str, tuple[Rows, ...]] = {}
        if axis is None or not self.owners.get(name):
            return Seen(kind, axis, tokens=tokens)
        size = self.sizes[name][axis]
        taken: set[int] = set()
        unbent = set(self._of(name, "mlp_in", axis)[0])
        for part in (*PARTS, "attention_gate", "mlp_gate", "mlp_in"):
            rows, numbers = self._of(name, part, axis)
            rows = [row for row in rows if row not in taken]
            if part == "mlp_gate":  # x * gelu'(x) and the like: one matrix on both sides
                rows = [row for row in rows if row not in unbent]
            if not rows:
                continue
            taken.update(rows)
            parts[part] = tuple(rows)
            if numbers and all(row in numbers for row in rows):
                groups: dict[int, list[int]] = defaultdict(list)
                for row in rows:
                    groups[numbers[row]].append(row)
                if len({len(group) for group in groups.values()}) == 1:
                    heads[part] = tuple(tuple(groups[n]) for n in sorted(groups))
        if not parts:
            return Seen(kind, axis, tokens=tokens)
        left = tuple(row for row in range(size) if row not in taken)
        if not left and len(parts) == 1:
            return Seen(next(iter(parts)), axis, heads=heads, tokens=tokens)
        if not set(parts) & set(PARTS):  # an MLP: halves that are sure, or the whole
            if left or len(parts) == 1:
                return Seen(kind, axis, tokens=tokens)
        elif left:
            parts[rest] = tuple(sorted((*parts.get(rest, ()), *left)))
        return Seen(_joint(parts), axis, parts, heads, tokens)

    def _of(self, name: str, part: str, axis: int) -> tuple[list[int], dict[int, int]]:
        """Rows of the part, and the number of the head of each where every row has one."""
        if part not in self.owners[name]:
            return [], {}
        if part == "attention_gate":
            return _rows_of(self.gates.get(name), axis), {}
        source = {"mlp_gate": "query", "mlp_in": "key"}.get(part, part)
        plain = self.plain[source].get(name)
        rows = _rows_of(plain, axis)
        best: dict[int, int] = {}
        coded = [c[name] for c in self.coded[source] if c.get(name) is not None]
        if plain is None:
            return [], {}
        zero = set(rows)
        for gradient in coded:
            zero -= set(_rows_of(gradient, axis))
            numbers = _ratios(plain, gradient, rows, axis)
            if len(numbers) == len(set(rows) - zero) and len(set(numbers.values())) > len(
                set(best.values())
            ):
                best = numbers
        # Gates and MLPs have no heads: their seeds are zero in coded gradients.
        rows = [row for row in rows if (row in zero) == (part in ("mlp_gate", "mlp_in"))]
        return rows, best if part in PARTS else {}


def _joint(parts: Mapping[str, Rows]) -> str:
    """The kind of a tensor that holds several."""
    if {"mlp_in", "mlp_gate"} == set(parts):
        return "mlp_in"
    attention = [part for part in parts if part in (*PARTS, "attention_gate", "qkv")]
    return (
        attention[0] if len(set(attention) - {"attention_gate"}) == 1 and len(parts) == 2 else "qkv"
    )


def _rows_of(gradient: Tensor | None, axis: int) -> list[int]:
    if gradient is None:
        return []
    others = [a for a in range(gradient.ndim) if a != axis]
    norms = gradient.abs().amax(others) if others else gradient.abs()
    return norms.nonzero().flatten().tolist()


def _ratios(plain: Tensor, coded: Tensor, rows: Sequence[int], axis: int) -> dict[int, int]:
    """Row -> number of its head: the whole number that the two gradients differ by."""
    wide = torch.promote_types(plain.dtype, torch.float32)
    a = plain.detach().to(wide).movedim(axis, 0).flatten(1)
    b = coded.detach().to(wide).movedim(axis, 0).flatten(1)
    length = a.square().sum(1)
    ratio = (a * b).sum(1) / length
    rest = (b - ratio[:, None] * a).square().sum(1).sqrt() / length.sqrt()
    number = ratio.round()
    good = (
        ((ratio - number).abs() < PRECISION)
        & (rest < PRECISION * number.clamp(min=1))
        & (number > 0)
    )
    return {row: int(number[row]) - 1 for row in rows if good[row]}


def measure(
    graph: Graph,
    attentions: Sequence[Attention],
    mlps: Sequence[Mlp],
    gated: Mapping[Linear, Sequence[Linear]],
    parameters: Mapping[str, Tensor],
) -> _Rows:
    """The gradients that tell which rows belong to which part and head: at most ten, all layers at
    once.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for found in attentions:
        for part in PARTS:
            for linear in found.factors[part].linears:
                _own(owners, linear, part)
    for linears in gated.values():
        for linear in linears:
            _own(owners, linear, "attention_gate")
    for mlp in mlps:
        for linear in mlp.inputs:
            for part in mlp.edges:
                _own(owners, linear, part)
    for names in list(owners):
        if not owners[names] & set(PARTS):
            owners[names].discard("attention_gate")  # a matrix of its own
    wanted = {name: parameters[name] for name, parts in owners.items()}
    generator = torch.Generator().manual_seed(0)
    backward = _Backward(graph, wanted)
    rows = _Rows({}, {}, {}, owners, {name: p.shape for name, p in parameters.items()})
    with backward.stopped_at_linears():
        for part in PARTS:
            factors = [found.factors[part] for found in attentions]
            seeds = [(f, _chosen(edge_tensor_like(f.edge, generator), f)) for f in factors]
            also = {"query": "mlp_gate", "key": "mlp_in"}.get(part)
            extra = [
                (mlp.edges[also], edge_tensor_like(mlp.edges[also], generator))
                for mlp in mlps
                if also in mlp.edges
            ]
            rows.plain[part] = backward([(f.edge, seed) for f, seed in seeds] + extra)
            rows.coded[part] = [
                backward([(f.edge, _coded(seed, f, i)) for f, seed in seeds if i < len(f.axes)])
                for i in range(max((len(f.axes) for f in factors), default=0))
            ]
        ends = [
            (linear.input, edge_tensor_like(linear.input, generator))
            for linear in gated
            if linear.input is not None
        ]
        rows.gates = backward(ends)
    return rows


def _own(owners: dict[str, set[str]], linear: Linear, part: str) -> None:
    for name in linear.weights:
        owners[name].add(part)


def _chosen(seed: Tensor, factor: Factor) -> Tensor:
    """The seed at the first of equal heads, zero at its repetitions."""
    for axis, numbers in factor.axes:
        first = [number not in numbers[:i] for i, number in enumerate(numbers)]
        seed = seed * _along(torch.tensor(first), seed, axis)
    return seed


def _coded(seed: Tensor, factor: Factor, which: int) -> Tensor:
    axis, numbers = factor.axes[which]
    return seed * _along(torch.tensor(numbers) + 1, seed, axis)


def _along(numbers: Tensor, like: Tensor, axis: int) -> Tensor:
    sizes = [-1 if a == axis else 1 for a in range(like.ndim)]
    return numbers.to(like).view(sizes)


class _Backward:
    """Gradients by the parameters that stop at the linears' inputs."""

    def __init__(self, graph: Graph, wanted: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.wanted = wanted

    @contextmanager
    def stopped_at_linears(self) -> Iterator[None]:
        handles = []
        for linear in self.graph.linears.values():
            place = _input_place(linear)
            if linear.input is not None:
                handles.append(linear.node.register_hook(_without(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, seeds: Sequence[tuple[Edge, Tensor]]) -> dict[str, Tensor]:
        if not seeds or not self.wanted:
            return {}
        gradients = torch.autograd.grad(
            [GradientEdge(*edge) for edge, _ in seeds],
            list(self.wanted.values()),
            [seed for _, seed in seeds],
            retain_graph=True,
            allow_unused=True,
        )
        return {n: g for n, g in zip(self.wanted, gradients, strict=True) if g is not None}


def _without(place: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def hook(inputs: Sequence[Tensor | None], outputs: Any) -> tuple[Tensor | None, ...]:
        return tuple(None if i == place else gradient for i, gradient in enumerate(inputs))

    return hook
