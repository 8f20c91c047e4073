"""What each parameter does, found by watching one forward pass.

The linears that query, key and value come from (:mod:`blockspec.model.factors`) are their matrices,
and gradients tell which rows belong to which head (:mod:`blockspec.model.row_gradients`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from blockspec.model.caches import without_caches
from blockspec.model.crossing import Crossing
from blockspec.model.evaluation import evaluation
from blockspec.model.factors import PARTS, Attention, attention
from blockspec.model.graph import (
    CONVOLUTION,
    NONLINEAR,
    RESHAPES,
    Edge,
    Graph,
    Linear,
    chooses,
    mixes_tokens,
    operation,
    shape,
)
from blockspec.model.kernels import twice_differentiable
from blockspec.model.row_gradients import Mlp, Readings, Seen, input_place, measure

NORMS = frozenset({"NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "Rsqrt"})
MOST_BETWEEN = 60  # operations between the matrices of an MLP: more is a recurrence written out
EXPERTS = "_experts_implementation_internal"


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
        crossing = Crossing(graph)
        self.crossed = {found: crossing.of(found) for found in self.attentions}
        self.attends: dict[Linear, list[Attention]] = defaultdict(list)  # that it is a part of
        self.uses: dict[str, list[Linear]] = defaultdict(list)
        for linear in graph.linears.values():
            for name in linear.weights:
                self.uses[name].append(linear)

    def result(self) -> dict[str, Seen]:
        for found in self.attentions:
            for part in PARTS:
                for linear in found.factors[part].linears:
                    self.attends[linear].append(found)
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
            if linear is None or linear.input is None or place != input_place(linear):
                continue
            if self.kinds.setdefault(linear, "attention_output") != "attention_output":
                continue
            self.attends[linear].append(found)
            behind = self.graph.behind(linear.input, through_softmax=False).linears
            values = found.factors["value"].linears
            self.gated[linear] = list(behind)
            for gate in behind:
                if gate not in values and gate not in self.kinds:
                    self.kinds[gate] = "attention_gate"
                    self.attends[gate].append(found)

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
                    self.attends[before] += self.attends[linear]
                    known = self.latent.setdefault(before, kind)  # type: ignore[arg-type]
                    self.latent[before] = known if known == kind else "qkv"
            follows = all(self.kinds.get(b) == "attention_output" for b in behind.linears)
            straight = not any(operation(node) in NORMS for node in behind.nodes)
            if kind is None and follows and straight and not any(behind.linears.values()):
                self.kinds[linear] = "attention_output"
                self.attends[linear] += [a for b in behind.linears for a in self.attends[b]]
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
            if any(chooses(node) for node, _ in self.graph.ahead(linear.node)):
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

    def _linears(self, rows: Readings) -> dict[str, Seen]:
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
                found = rows.seen(name, kind, at, tokens, self.latent.get(linear, "other"))
                seen[name] = replace(found, crossed=self._crossed(name))
        return seen

    def _crossed(self, name: str) -> bool | None:
        """Whether a parameter is of cross-attention, wherever it is used."""
        found = {self.crossed[a] for use in self.uses[name] for a in self.attends.get(use, ())}
        return found.pop() if len(found) == 1 else None

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
