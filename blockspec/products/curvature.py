"""Products with blocks of a curvature matrix.

All blocks of a micro-batch share one forward and one first backward pass, see
:mod:`blockspec.products.linearisations`. Each product then runs only through the part of the graph
between the block's gradient and the block itself: of a graph that is held whole, or of one that is
built again a layer at a time, see :mod:`blockspec.products.ways`. The full matrix is the same code
with one block that holds every parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from blockspec.model.blocks import Block, add, gathered, zeros
from blockspec.model.differentiability import check_twice_differentiable, leaves_of
from blockspec.model.kernels import paused, resumed
from blockspec.model.layer_by_layer import layer_by_layer, weighed
from blockspec.model.losses import Loss
from blockspec.model.objective import Objective
from blockspec.model.suitability import explained
from blockspec.numerics import memory
from blockspec.numerics.portions import Portion
from blockspec.numerics.progress import moved, sweeping
from blockspec.numerics.ranks import Ranks
from blockspec.products.calibration import Costs, seconds_of, time_products
from blockspec.products.foresight import fitting, least_of_graph
from blockspec.products.guard import OFF, Check, checked
from blockspec.products.layerwise import TOGETHER
from blockspec.products.linearisations import ENDS, Ask, Linearised, Tensors
from blockspec.products.precision import check, reduced_model, reduced_multiplication
from blockspec.products.totals import Request, Totals, compare
from blockspec.products.unfinished import Between, Unfinished, left
from blockspec.products.units import Reduce, Unit
from blockspec.products.ways import Way

REHEARSED = 8  # blocks, beside the deepest one


class Products:
    """Products of the blocks of one objective; counts what they cost.

    Args:
        curvature: ``"hessian"``; ``"ggn"``, the generalised Gauss-Newton matrix J' H_L J with J the
            Jacobian of the loss's ``outputs`` (Schraudolph 2002); ``"fisher"``, the empirical
            Fisher matrix: mean over loss terms of g g' with g the gradient of the term;
            ``"residual"``, what the Hessian has beyond the ``ggn``: sum over outputs of the loss's
            slope times the output's own Hessian.
        ranks: Processes that split the batches; every one of them must ask for the same products.
        graphs: Where there are at most so many batches, their graphs are kept from one call to the
            next. One takes no more memory at the peak than none.
        guarded: Compare a product with the gradient in :meth:`check`.
        products: ``"whole"``, ``"layerwise"`` or ``"auto"``, see :mod:`blockspec.products.ways`.
        precision: ``"tf32"`` or ``"bfloat16"``, see :mod:`blockspec.products.precision`; None: that
            of the parameters.

    Attributes:
        micro_batch: Examples that go through the model at once; the objective's at first. When
            memory runs out, it is halved with a warning. The objective itself is left alone.

    ``gradients`` counts shared forward-and-backward passes over one batch, ``products`` products of
    one vector with one batch.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: str = "hessian",
        *,
        ranks: Ranks | None = None,
        graphs: int = 1,
        precision: str | None = None,
        guarded: bool = True,
        products: str = "auto",
    ) -> None:
        if curvature not in ENDS:
            raise ValueError(f"curvature is one of {tuple(ENDS)}, got {curvature!r}")
        if curvature != "hessian" and not isinstance(objective.loss, Loss):
            raise ValueError(
                f"curvature {curvature!r} needs a loss that is split at the model's outputs: "
                "blockspec.losses.Loss(outputs=..., terms=...)"
            )
        check(precision)
        self.objective = objective
        self.curvature = curvature
        self.ranks = ranks or Ranks()
        self.graphs = graphs
        self.precision = precision
        self.micro_batch = objective.micro_batch
        self._compared = False
        self.between: Between | None = None
        self.checked = OFF
        self._guarded = guarded
        self.way = Way(objective, curvature, products)
        self._kept: list[tuple[int | None, Linearised]] = []
        self._kept_parameters: frozenset[str] = frozenset()
        self._open = self._fresh = False
        self.gradients = 0
        self.products = 0
        self._parameters = {
            name: objective.weights.shape_of(p) for name, p in objective.parameters().items()
        }
        self._check_spread()

    @property
    def rebuilt(self) -> int:
        """How often a layer was built again from its inputs, for products a layer at a time."""
        return self.way.rebuilt

    @property
    def parameters(self) -> Tensors:
        """Those that require gradients, by name."""
        return self._parameters

    @property
    def device(self) -> torch.device:
        """Of the objective's model."""
        return self.objective.device

    @torch.random.fork_rng(devices=[])  # some models draw numbers that they do not use
    def check(self, blocks: Sequence[Block]) -> None:
        """Raises ValueError where the objective is not deterministic or finite, or products wrong;
        ``checked`` is what was found of the products, see :mod:`blockspec.products.guard`.
        """
        self.objective.check()
        self._keep_within_what_is_free(blocks)
        if self._guarded and self.objective.weights.sharded:
            check_twice_differentiable(self.objective, [n for b in blocks for n in b.parameters])
            self.checked = Check("unchecked", "a model that is spread over processes is not copied")
        elif self._guarded:
            self.checked = checked(
                self.objective, blocks, self.curvature, self._of, way=self.way.name
            )

    def _keep_within_what_is_free(self, blocks: Sequence[Block]) -> None:
        """Before a graph is made: on a CPU the system ends a process that takes more."""
        bounded = self.objective.checked_examples is not None  # by the user: the plan keeps to it
        if bounded or not self.way.is_open or self.objective.weights.sharded:
            return
        gradient = sum(p.nbytes for p in self._named(blocks).values())
        alone = self.ranks.rows * self.ranks.columns == 1  # others would have to cut as finely
        self.micro_batch, why = fitting(self.objective, self.micro_batch, gradient, cut=alone)
        if why:
            self.save_memory(why)

    def _check_spread(self) -> None:
        """Raises ValueError where processes hold different blocks and would not gather the same
        layers.
        """
        if self.objective.weights.sharded and self.ranks.columns > 1:
            raise ValueError(
                "the model is spread over processes (fully_shard), so that all of them are needed "
                "for every block: leave out columns, or give columns=1"
            )

    def _of(self, objective: Objective) -> Products:
        return Products(objective, self.curvature, products=self.way.name)

    def batches(self) -> Iterator[Any]:
        """The objective's batches in parts of ``micro_batch`` examples, each placed when its turn
        comes.
        """
        return self.objective.batches(self.micro_batch)

    @property
    def takes_portions(self) -> bool:
        """Whether vectors may be spread over processes as the model is: a product of a portion is
        the same portion of the product.
        """
        return self.objective.weights.sharded and self.ranks.rows > 1

    def sweep(self, requests: Sequence[tuple[Block, Tensor | Portion]]) -> list[Tensor]:
        """For each (block b, v (P_b,)): H_bb v (P_b,); all of them from one pass over the
        batches.
        """
        return [
            parts[0]
            for parts in self._pass([(block, vector, (block,)) for block, vector in requests])
        ]

    def sweep_by_unit(
        self, requests: Sequence[tuple[Block, Tensor | Portion]], each: Reduce
    ) -> tuple[list[Tensor], list[tuple[int, Unit]]]:
        """See :class:`blockspec.products.units.ByUnit`."""
        units: list[tuple[int, Unit]] = []
        found = self._pass([(block, vector, (block,)) for block, vector in requests], each, units)
        return [parts[0] for parts in found], units

    def columns(
        self, requests: Sequence[tuple[Block, Tensor]], targets: Sequence[Block]
    ) -> list[list[Tensor]]:
        """For each (block b, v (P_b,)): H_cb v (P_c,) of every block c in ``targets``; one pass
        over the batches.
        """
        return self._pass([(block, vector, targets) for block, vector in requests])

    def columns_by_unit(
        self,
        requests: Sequence[tuple[Block, Tensor]],
        targets: Sequence[Block],
        each: Reduce,
        *,
        summed: bool = True,
    ) -> tuple[list[list[Tensor]], list[tuple[int, Unit]]]:
        """See :class:`blockspec.products.units.ColumnsByUnit`."""
        units: list[tuple[int, Unit]] = []
        asked = [(block, vector, targets) for block, vector in requests]
        return self._pass(asked, each, units, summed=summed), units

    def _pass(
        self,
        requests: Sequence[Request],
        each: Reduce | None = None,
        units: list[tuple[int, Unit]] | None = None,
        *,
        summed: bool = True,
    ) -> list[list[Tensor]]:
        """The products; without their sums, what ``each`` has kept of every unit is all."""
        self._compare(requests)
        while True:
            totals = Totals(requests, summed=summed)
            terms, error = 0.0, None
            try:
                terms = self._own_part(totals, requests, each, units)
            except (RuntimeError, MemoryError) as raised:
                if self.objective.weights.sharded or not memory.is_exhausted(raised):
                    raise  # where the others wait for this process in the middle of a layer
                error = raised.with_traceback(None)  # its frames hold the graph
            found = totals.over(self.ranks, terms, exhausted=error is not None)
            if not found.exhausted:
                return found.means(requests) if summed else []
            if not self._halve_micro_batch() and not self._save_memory():
                raise error or MemoryError("another process of this run is out of memory")
            if units is not None:
                units.clear()

    def _compare(self, requests: Sequence[Request]) -> None:
        """The first pass is the same on all processes that share it: a sum of products of other
        vectors has no meaning.
        """
        if self._compared or self.ranks.rows == 1:
            return
        self._compared = True
        compare(self.ranks, requests)

    def _own_part(
        self,
        totals: Totals,
        requests: Sequence[Request],
        each: Reduce | None,
        units: list[tuple[int, Unit]] | None,
    ) -> float:
        """Adds this process's batches to ``totals``; returns their number of loss terms."""
        blocks = [block for source, _, targets in requests for block in (source, *targets)]
        named = self._named(blocks)
        between = None if self.objective.weights.sharded else self.between
        before = left(between, self.micro_batch, len(requests), by_unit=units is not None)
        totals.restore(before.sums)
        terms, kept = before.terms, [] if units is None else units
        kept += before.units
        part = sweeping(len(requests), self._own_batches)
        reduced = reduced_multiplication(self.precision, self.device)
        with part as sweep, self._prepared(named), explained(), reduced:
            sweep.number = before.done
            for batch, linearised in self._linearised(named, before.done):
                values: list[Any] = [None] * len(requests)
                with nullcontext() if self.way.layerwise else paused():
                    for number, parts in self._completed(requests, linearised):
                        if batch is None:  # not this process's; the others wait for zeros
                            parts = [torch.zeros_like(part) for part in parts]
                        if each is not None:
                            values[number] = each(number, parts)
                        totals.add(number, parts, kept=each is not None)
                if batch is not None:
                    terms += linearised.terms
                if units is not None and batch is not None:
                    units.append((batch, Unit(linearised.terms, values)))
                del linearised  # its graph would lie beside that of the next batch
                sweep.number += 1
                if between is not None:
                    so_far = partial(Unfinished, sweep.number, self.micro_batch, terms)
                    between.after_batch(partial(so_far, totals.now(), kept))
        return terms

    def _own_batches(self) -> int:
        """Number of micro-batches that are this process's."""
        own = {"row": self.ranks.row, "rows": self.ranks.rows}
        return sum(1 for _ in self.objective.dealt_batches(self.micro_batch, **own))

    def _completed(
        self, requests: Sequence[Request], linearised: Linearised
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Number and product of each request, in its targets, as soon as it is complete."""
        waiting: dict[int, list[Tensor]] = {}
        for number, tensors, last in linearised.products(self._asks(requests)):
            targets = requests[number][2]
            if last and number not in waiting:  # in one part: no sum to make
                found = [gathered(target, tensors, self._parameters) for target in targets]
                del tensors
                self.products += 1
                moved(number / len(requests))
                yield number, found
                continue
            if number not in waiting:
                waiting[number] = [zeros(target, self._parameters) for target in targets]
            for known, target in zip(waiting[number], targets, strict=True):
                add(target, known, tensors, self._parameters)
            del tensors  # those of an embedding are large, and must not lie beside the next part
            if last:
                self.products += 1
                yield number, waiting.pop(number)

    def _asks(self, requests: Sequence[Request]) -> list[Ask]:
        return [
            Ask(source, vector, tuple(dict.fromkeys(n for t in targets for n in t.parameters)))
            for source, vector, targets in requests
        ]

    def _linearised(
        self, parameters: Tensors, done: int
    ) -> Iterator[tuple[int | None, Linearised]]:
        """Of each micro-batch of this process's behind the first ``done``: the number of its batch,
        and what products are made from; no number where only others need this one's weights.
        """
        if parameters.keys() <= self._kept_parameters:
            yield from self._kept[done:]
            return
        self.forget()
        row, rows = self.ranks.row, self.ranks.rows
        batches = self.objective.batches_in_step(self.micro_batch, row=row, rows=rows)
        batches = islice(batches, done, None)
        ahead = list(islice(batches, self.graphs + 1))
        kept = []
        for number, batch in chain(ahead, batches):
            try:
                linearised = self.linearise(batch, parameters)
            except ArithmeticError as error:
                raise ValueError(
                    f"{error} on batch {number or 0} (counted from 0); curvature needs a finite "
                    "one: leave the batch out, or check the checkpoint and the data"
                ) from None
            self.gradients += 1
            if len(ahead) <= self.graphs and not done:
                kept.append((number, linearised))
            yield number, linearised
            del linearised  # the graph is freed before the next batch makes its own
        if kept:
            self._kept, self._kept_parameters = kept, frozenset(parameters)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While this is open, the model is prepared once for all sweeps that need no further
        forward pass: preparing a small model takes as long as a fifth of a product.
        """
        if self._open:
            yield
            return
        with self.objective.prepared(), paused():
            self._open = self._fresh = True
            try:
                yield
            finally:
                self._open = self._fresh = False

    def _prepared(self, parameters: Tensors) -> AbstractContextManager[None]:
        """Another forward pass begins with the buffers that the first one had: it prepares anew."""
        kept = parameters.keys() <= self._kept_parameters and not self.way.layerwise
        ready = self._open and (self._fresh or kept)
        self._fresh = False
        return resumed() if ready else self.objective.prepared()

    def linearise(self, batch: Any, parameters: Tensors) -> Linearised:
        """The shared pass of one batch; the objective must be prepared."""
        with reduced_model(self.precision, self.objective.device):
            return self.way.linearise(batch, parameters)

    def num_batches(self) -> int:
        """Number of micro-batches."""
        return sum(1 for _ in self.batches())

    def largest_batch(self) -> int:
        """Examples of the largest batch; 1 where batches cannot be cut."""
        return self.objective.largest_batch()

    @property
    def told(self) -> str:
        """How products are made, and why, in words."""
        return self.way.told

    def save_memory(self, why: str) -> bool:
        """Goes on a layer at a time, or holds no layer any more; False where neither is left."""
        self.forget()
        return self.way.save_memory(why)

    def least_memory(self, blocks: Sequence[Block]) -> int:
        """Bytes that the whole graph of one example takes at least; 0 where there is nothing to
        choose.
        """
        if not self.way.is_open:
            return 0
        with self.objective.prepared():
            graph = least_of_graph(self.objective, self.objective.heaviest(1))
        return graph + sum(p.nbytes for p in self._named(blocks).values())

    def rehearse(self, blocks: Sequence[Block], size: int | None) -> None:
        """What a sweep does, on ``size`` examples: two shared passes one after the other, with
        products of the deepest block and in the end of some others.
        """
        deepest = max(blocks, key=lambda block: len(block.parameters))
        others = [block for block in blocks if block is not deepest]
        number = TOGETHER - 1 if self.way.layerwise else REHEARSED
        together = [deepest, *others[:: max(1, len(others) // number)][:number]]
        with self.objective.prepared():
            batch = self.objective.heaviest(size or self.micro_batch)
            for asked in ([deepest], together):
                self._zero_products(self.linearise(batch, self._named(blocks)), asked)()

    def calibrate(self, blocks: Sequence[Block]) -> Costs:
        """Seconds of a gradient, of the shared pass and of each block's product, on one
        micro-batch.
        """
        with self.objective.prepared(), reduced_multiplication(self.precision, self.device):
            batch = next(iter(self.batches()))
            gradient = partial(self._gradient, batch)
            gradient()
            gradient_seconds = min(seconds_of(gradient, self.device) for _ in range(3))
            linearised: list[Linearised] = []
            shared_seconds = seconds_of(
                lambda: linearised.append(self.linearise(batch, self._named(blocks))),
                self.device,
            )
            groups = self._timed_together(blocks)
            products = {
                group[0].parameters: self._zero_products(linearised[0], group) for group in groups
            }
            measured = time_products(products, self.device)
        found: dict[tuple[str, ...], tuple[float, float]] = {}
        for group in groups:
            seconds, flops = measured[group[0].parameters]
            found |= {b.parameters: (seconds / len(group), flops / len(group)) for b in group}
        nearest = next(iter(found.values()))
        by_block = {block.name: found.get(block.parameters, nearest) for block in blocks}
        return Costs(gradient_seconds, shared_seconds, by_block)

    def _gradient(self, batch: Any) -> None:
        """One gradient of a micro-batch; a layer at a time, of one layer after the other."""

        def look(outputs: Sequence[Tensor]) -> None:
            leaves = list(leaves_of(outputs))
            torch.autograd.grad(weighed(outputs), leaves, allow_unused=True, retain_graph=True)

        model = self.objective.model
        with layer_by_layer(model, look) if self.way.layerwise else nullcontext():
            total, _ = self.objective.loss_sum(batch)
        look([total])

    def _timed_together(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Each block alone; a layer at a time, some of them, who share what is built again."""
        if not self.way.layerwise:
            return [[block] for block in {b.parameters: b for b in blocks}.values()]
        return [list(blocks[:: -(-len(blocks) // TOGETHER)])]

    def _zero_products(
        self, linearised: Linearised, blocks: Sequence[Block]
    ) -> Callable[[], object]:
        zeros = {block.name: torch.zeros(block.numel, device=self.device) for block in blocks}
        asks = [Ask(block, zeros[block.name], tuple(block.parameters)) for block in blocks]
        return lambda: [None for _ in linearised.products(asks)]

    def _named(self, blocks: Sequence[Block]) -> Tensors:
        return {name: self._parameters[name] for block in blocks for name in block.parameters}

    def forget(self) -> None:
        """Drops the graphs that are kept; they belong to the parameters' values of then."""
        self._kept, self._kept_parameters = [], frozenset()

    def _save_memory(self) -> bool:
        if not self.save_memory("memory ran out with the whole graph of one example"):
            return False
        warnings.warn("out of memory: going on a layer at a time", stacklevel=2)
        return True

    def _halve_micro_batch(self) -> bool:
        self.forget()
        size = self.micro_batch or self.largest_batch()
        if size <= 1 or self.objective.batch_norm == "train":
            return False
        self.micro_batch = size // 2
        warnings.warn(
            f"out of memory: going on with a micro-batch of {size // 2} instead of {size}",
            stacklevel=2,
        )
        return True
