"""A copy of an objective to try things with: a part of one batch, in float64, a hair beside the
parameters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from blockspec.model.blocks import Block, Piece
from blockspec.model.differentiability import leaves_of, nodes
from blockspec.model.doubles import Doubles, twin_of
from blockspec.model.examples import longest
from blockspec.model.objective import Objective
from blockspec.numerics import memory
from blockspec.products.references import REFERENCES, Reference, plain

BESIDE = 1e-3  # how far the copy stands from the parameters, relative to them
WORK = 1e10  # parameters times numbers in the batch; beyond it, examples are left out
# of a direction; beyond it, the largest parameters are left out: it takes eight vectors of this
# size
ENTRIES = 2**26
KINKS = ("Relu", "Threshold", "Hardtanh", "Max", "Min", "Abs", "Clamp", "Topk", "Sort", "Round")
Tensors = Mapping[str, Tensor]


class Swept(Protocol):
    """The part of an operator that is checked."""

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]: ...


Make = Callable[[Objective], Swept]


@dataclass(frozen=True)
class Way:
    """How a trial is made; where one way is not possible, the next one is tried.

    Args:
        doubled: In float64, whatever the parameters are in.
        throughout: The product, and not the gradient alone, is computed in float64 where the model
            casts to less.
        beside: How far from the parameters, relative to them.
        experts: Experts of Hugging Face's models one after the other: their fused kernels know no
            float64.
    """

    doubled: bool = True
    throughout: bool = False
    beside: float = BESIDE
    experts: bool = False


WAYS = (
    Way(),
    Way(throughout=True),
    Way(beside=0.0),
    Way(doubled=False),
    Way(experts=True),
)


@dataclass(frozen=True, eq=False)
class Trial:
    """The copy and what is done with it.

    Args:
        objective: For gradients: with a loss without what is ours in it.
        given: The same copy for products: with the loss as it was given.
        scales: Parameter name -> size of its entries, for those in the direction.
        block: All of these as one block.
    """

    objective: Objective
    given: Objective
    curvature: str
    way: Way
    scales: Mapping[str, float]
    block: Block

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.way.doubled else torch.float32

    def direction(self, seed: int) -> dict[str, Tensor]:
        """Parameter name -> random tensor of the size of its entries; zero in rows of padding."""
        parameters = self.objective.parameters()
        found = {
            name: noise(parameters[name], seed + number, scale)
            for number, (name, scale) in enumerate(self.scales.items())
        }
        for name, row in padding_rows(self.objective.model):
            if name in found:
                found[name][row] = 0
        return found

    def products(self, make: Make, *directions: Tensors) -> list[dict[str, Tensor]]:
        """Of the operator, by parameter name, one for each direction."""
        vectors = [torch.cat([t.flatten() for t in d.values()]) for d in directions]
        with Doubles() if self.way.throughout else nullcontext():
            found = make(self.given).sweep([(self.block, vector) for vector in vectors])
        sizes = [t.numel() for t in directions[0].values()]
        return [
            {
                name: part.view_as(like)
                for (name, like), part in zip(d.items(), vector.split(sizes), strict=True)
            }
            for d, vector in zip(directions, found, strict=True)
        ]

    def reference(self, direction: Tensors, step: float) -> Reference:
        with self.unmodified():
            return REFERENCES[self.curvature](self.objective, direction, step)

    @contextmanager
    def unmodified(self) -> Iterator[None]:
        """The model as it is, with all digits."""
        with self.objective.unmodified(), Doubles() if self.way.doubled else nullcontext():
            yield

    def value(self) -> Tensor:
        """The mean over the batch's loss terms, with a graph."""
        total, count = self.objective.loss_sum(next(iter(self.objective.batches())))
        return total / count

    def borrows_from(self, model: nn.Module) -> bool:
        """Whether the copy computes with parameters of the model that it was copied from."""
        own = {id(p) for p in model.parameters()}
        with self.unmodified():
            return any(id(leaf) in own for leaf in leaves_of([self.value()]))

    def has_kinks(self) -> bool:
        with self.unmodified():
            names = [node.name() for node in nodes([self.value()])]
        return any(name.startswith(KINKS) for name in names)

    def size(self, name: str, tensor: Tensor) -> float:
        """Norm, where a parameter's entries are measured in units of their size."""
        return self.scales[name] * float(tensor.norm())


def trial_of(
    objective: Objective, batch: Any, blocks: Sequence[Block], curvature: str, way: Way
) -> Trial:
    """A trial with this batch and the parameters that the blocks have pieces of."""
    dtype = torch.float64 if way.doubled else None
    _check_size(objective, 8 if way.doubled else 4)
    twin: Any = twin_of(objective.model, dtype)
    if way.experts:
        twin.set_experts_implementation("eager")
    loss: Any = objective.loss
    if isinstance(loss, nn.Module):
        loss = twin_of(loss, dtype)
    settings: Any = {"batch_norm": objective.batch_norm, "replacements": objective.replacements}
    given, small = (Objective(twin, [batch], own, **settings) for own in (loss, plain(loss)))
    scales = _scales(twin)
    with torch.no_grad():
        for number, (name, p) in enumerate(twin.named_parameters()):
            if way.beside and name in scales:
                p.add_(noise(p, number, way.beside * scales[name]))
    chosen = _chosen(small.parameters(), {name for block in blocks for name in block.parameters})
    numel = sum(p.numel() for p in chosen.values())
    union = Block("union", "other", None, numel, tuple(Piece(name) for name in chosen))
    return Trial(small, given, curvature, way, {name: scales[name] for name in chosen}, union)


def _check_size(objective: Objective, itemsize: int) -> None:
    """Half of what is free may be taken: the copy, and eight vectors of a direction's size."""
    numel = sum(p.numel() for p in objective.model.parameters())
    needed = itemsize * (numel + 8 * min(numel, ENTRIES))
    free = memory.total(objective.device) - memory.used(objective.device)
    if needed > free / 2:
        raise MemoryError(
            f"a copy takes {memory.readable(needed)}, of {memory.readable(free)} that are free"
        )


def noise(like: Tensor, seed: int, size: float) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like).mul_(size)


def part_of(objective: Objective) -> Any:
    """The first batch, or as many of its examples as make a gradient cheap."""
    batch = next(iter(objective.whole_batches()))
    tensors = [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    numbers = max((t.numel() for t in tensors), default=0)
    work = numbers * sum(p.numel() for p in objective.model.parameters())
    size = max(1, int(longest(batch) * WORK / work)) if work > WORK else None
    if (few := objective.checked_examples) is not None:
        size = few if size is None else min(size, few)
    return next(iter(objective.batches(size)))


def _scales(model: nn.Module) -> dict[str, float]:
    """Root mean square of each floating point parameter; the usual one where it is zero."""
    sizes = {
        name: float(p.detach().double().square().mean().sqrt())
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.numel()
    }
    usual = statistics.median([size for size in sizes.values() if size] or [1.0])
    return {name: size or usual for name, size in sizes.items()}


def padding_rows(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Rows of embeddings that stand for padding: parameter name and row.

    They move the loss, and PyTorch keeps their gradients from them: they are constants.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            weight = module._parameters.get("weight")
            if id(weight) in names:
                yield names[id(weight)], module.padding_idx


def _chosen(parameters: Tensors, held: set[str]) -> dict[str, Tensor]:
    """Those held, in order; of very many entries, the smaller parameters."""
    left = ENTRIES
    allowed: set[str] = set()
    for name in sorted(held & parameters.keys(), key=lambda name: parameters[name].numel()):
        left -= parameters[name].numel()
        if left >= 0 or not allowed:
            allowed.add(name)
    return {name: p for name, p in parameters.items() if name in allowed}
