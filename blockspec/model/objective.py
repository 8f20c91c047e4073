"""The objective: a model, a fixed list of batches and a loss; the function of the parameters whose
curvature is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from blockspec.model import ranges, soundness
from blockspec.model.caches import without_caches
from blockspec.model.checkpointing import without_checkpoints
from blockspec.model.evaluation import Copies, evaluation
from blockspec.model.examples import (
    Carriers,
    NoExamplesError,
    carriers,
    leaves,
    longest,
    mapped,
)
from blockspec.model.kernels import paused, twice_differentiable
from blockspec.model.losses import called_otherwise, name_of
from blockspec.model.narrow import told_if_narrow
from blockspec.model.normalisation import of_order
from blockspec.model.plain import plain_functions
from blockspec.model.second_order import cheap_modules
from blockspec.model.suitability import check_batch, check_model, explained, length_of
from blockspec.model.walks import walked
from blockspec.model.weight_norms import elementary_weight_norms
from blockspec.model.weights import Weights, reshard
from blockspec.numerics.ranks import Ranks, arrange

if TYPE_CHECKING:
    from blockspec.model.pieces import Blocks

BATCH_NORMS = ("eval", "train")
SAVED = "saved tensor"
T = TypeVar("T")


class Objective:
    """``mean over all loss terms of all batches`` as a function of the parameters of ``model``.

    Args:
        model: Everything here leaves it as it was found: training flags, gradients, attention
            implementation, buffers.
        batches: A finite list (or anything that can be iterated again and again, in the same order
            and with the same content, like an unshuffled DataLoader) of what the loss understands.
            An iterator is read into a list. Batches are moved to the model's device one at a time,
            their numbers to its dtype (floating point, where it has one alone).
        loss: ``loss(model, batch) -> (sum of the loss terms, number of terms)``, see
            :mod:`blockspec.losses`. For the curvatures ``ggn`` and ``fisher`` it has to be a
            :class:`blockspec.losses.Loss`, which says where to split.
        micro_batch: Examples that go through the model at once; None: a batch as it comes. Changes
            memory, not the numbers (but for rounding). Tensors of a batch that carry examples are
            cut along their first dimension; which ones do is tried on a few examples of each batch,
            see :mod:`blockspec.model.examples`. Where no cut leaves the loss as it was, it is
            refused.
        batch_norm: ``"eval"`` (running statistics, as at inference) or ``"train"`` (statistics of
            the batch, differentiated through; then the objective depends on how the data is cut
            into batches). Running statistics are untouched.
        replacements: False: every module's own functions are differentiated, and the loss's cross
            entropies are PyTorch's. True: activations, convolutions, batch norms, cross entropies
            and language-model heads stand in for them whose second derivatives are cheaper. They
            are the same functions; this argument is there to check that. Attention, weight norm and
            checkpoints that PyTorch cannot differentiate twice are replaced in both cases.
        sharded: With several processes, each of them holds batches of its own, as a
            ``DistributedSampler`` gives them, and the objective is the mean over the loss terms of
            all of them. Else all processes must hold the same batches, which are then dealt out. (A
            ``DistributedSampler`` without ``drop_last`` repeats examples, so that all processes
            have equally many.)
        device, dtype: Where, and in which floating point type, the model computes, where its
            weights are to stay as they are: on the CPU, or mapped from files
            (:func:`blockspec.model.weights.map_weights`). A layer at a time is brought over;
            products are then made a layer at a time too. None: the model computes where it lies.

    Raises:
        ValueError: No batches and for another ``batch_norm``, TypeError for a model or loss that is
            none.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Any,
        *,
        micro_batch: int | None = None,
        batch_norm: str = "eval",
        replacements: bool = True,
        sharded: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a torch.nn.Module; got a {type(model).__name__}")
        if not callable(loss):
            raise TypeError(
                "loss is a function (model, batch) -> (sum, number of terms); got a "
                f"{type(loss).__name__}"
            )
        if isinstance(batches, (Tensor, Mapping)):
            raise TypeError(
                f"batches is a list of batches; got a single {type(batches).__name__}: put it in a "
                "list"
            )
        if batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch_norm is one of {BATCH_NORMS}, got {batch_norm!r}")
        if micro_batch is not None and (micro_batch < 1 or micro_batch % 1):
            raise ValueError(f"micro_batch is a whole number >= 1 or None, got {micro_batch}")
        check_model(model)
        if isinstance(batches, Iterator):
            batches = ranges.read(batches)
        if length_of(batches) == 0:
            raise ValueError(
                "no batches: the list is empty, or the iterator had ended; pass a list of at least "
                "one batch"
            )
        self.model = model
        self.loss = loss
        self.micro_batch = micro_batch
        self.batch_norm = batch_norm
        self.replacements = replacements
        self.sharded = sharded
        self.weights = Weights(model, None if device is None else torch.device(device), dtype)
        self._batches = batches
        self._carriers: dict[int, Carriers | NoExamplesError] = {}  # by the number of a batch
        self._seen: list[str] | None = None  # fingerprints of what is read again for each sweep
        self._copies: Copies = {}
        self._takes_gradients = False  # whether the loss does so itself, as far as is known
        self.checked_examples: int | None = None
        """Examples of a batch that checks evaluate; None: all. Fewer keep within a memory bound."""
        self.checks: list[Any] = []
        """What :mod:`blockspec.products.guard` found, and for which parameters."""

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        number = length_of(self._batches)
        batches = "batches" if number is None else f"{number} batch(es)"
        return (
            f"Objective of {type(self.model).__name__} ({size:,} parameters), {batches}, "
            f"{name_of(self.loss)}"
        )

    @property
    def device(self) -> torch.device:
        """Where batches are moved to: where the model computes, the device of its first
        parameter.
        """
        return self.weights.device if self.weights.elsewhere else self._first.device

    @property
    def _first(self) -> Tensor:
        return next(self.model.parameters())

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the floating point numbers of batches: that of the model's parameters; None where they
        differ.
        """
        if self.weights.dtype is not None:
            return self.weights.dtype
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def batches(self, micro_batch: int | None = None) -> Iterator[Any]:
        """The batches, or the parts that they are cut into, each moved to the model's device and
        dtype when its turn comes.

        Args:
            micro_batch: Examples of a part; None: the objective's own ``micro_batch``.
        """
        return (part for _, part in self.dealt_batches(micro_batch))

    def dealt_batches(
        self, micro_batch: int | None = None, *, row: int = 0, rows: int = 1
    ) -> Iterator[tuple[int, Any]]:
        """The batches that belong to one of several processes, as :meth:`batches` gives them, each
        with its number.

        Whole batches are dealt, so that processes may cut theirs as their own memory allows. Where
        each process holds batches of its own, all of those are its part.

        Args:
            micro_batch: Examples of a part; None: the objective's own ``micro_batch``.
            row: Number of the process.
            rows: Number of processes.
        """
        size = micro_batch or self.micro_batch
        for number, batch in enumerate(self.whole_batches()):
            if not self.sharded and number % rows != row:
                continue
            parts = [batch] if size is None else self._cut(number, batch, size)
            for part in parts:
                yield number, self._placed(part)

    def batches_in_step(
        self, micro_batch: int | None, *, row: int, rows: int
    ) -> Iterator[tuple[int | None, Any]]:
        """:meth:`dealt_batches`; where a model is spread over processes, so many on each of them:
        those without a number are for the others' sake alone.
        """

        def own() -> Iterator[tuple[int | None, Any]]:
            return self.dealt_batches(micro_batch, row=row, rows=rows)

        if not self.weights.sharded:
            yield from own()
            return
        idle = next(own(), None) is None
        items = ((None, batch) for batch in islice(self.batches(), 1)) if idle else own()
        for (number, batch), counted in self.weights.in_step(items):
            yield number if counted else None, batch

    def largest_batch(self) -> int:
        """Examples of the largest batch; 1 where no batch can be cut."""
        found = (self._carried(i, batch, 1) for i, batch in enumerate(self.whole_batches()))
        return max(f.length if isinstance(f, Carriers) else 1 for f in found)

    def heaviest(self, micro_batch: int | None = None) -> Any:
        """Of the parts that :meth:`batches` gives, the one with the most numbers: it takes the most
        memory.
        """

        def numbers(part: Any) -> int:
            return sum(tensor.numel() for _, tensor in leaves(part))

        return max(self.batches(micro_batch), key=numbers)

    def _cut(self, number: int, batch: Any, size: int) -> Iterator[Any]:
        """A batch in parts; whole where it cannot be cut and no user has asked for it."""
        found = self._carried(number, batch, size)
        if isinstance(found, ValueError) and self.micro_batch is not None:
            raise found
        yield from found.cut(batch, size) if isinstance(found, Carriers) else [batch]

    def _carried(self, number: int, batch: Any, size: int) -> Carriers | ValueError | None:
        """Which tensors of a batch carry its examples, or why it cannot be cut, tried once per
        batch; None where it needs no cutting.
        """
        if self.batch_norm == "train" or longest(batch) <= size:  # statistics need all of a batch
            return None
        if number not in self._carriers:
            try:
                tried = None if self.weights.sharded else self._evaluated  # others would wait
                self._carriers[number] = carriers(batch, size, tried)
            except NoExamplesError as error:
                self._carriers[number] = error
        return self._carriers[number]

    def _evaluated(self, batch: Any) -> tuple[Tensor, float]:
        with self._evaluating(self.replacements):
            total, count = self._value_of(self._placed(batch))
            return total.detach(), count

    def _placed(self, batch: Any) -> Any:
        """The batch where the model is, with what the loss has to add to it."""
        complete = getattr(self.loss, "complete", None)
        with paused():
            batch = placed(batch, self.device, self.dtype)
        return batch if complete is None else complete(self.model, batch)

    def num_units(self) -> int:
        """Micro-batches in all, which are the units of data."""
        return sum(1 for _ in self._units())

    def of_units(self, numbers: Collection[int]) -> Objective:
        """The same function on some of the micro-batches, by their numbers in the order of the
        data.
        """
        part = copy(self)
        part._batches = [unit for number, unit in enumerate(self._units()) if number in numbers]
        part._carriers, part._seen = {}, None
        return part

    def _units(self) -> Iterator[Any]:
        for number, batch in enumerate(self.whole_batches()):
            size = self.micro_batch
            yield from [batch] if size is None else self._cut(number, batch, size)

    def whole_batches(self) -> Iterator[Any]:
        """The batches as they were given."""
        empty, endless = True, length_of(self._batches) is None
        given = ranges.bounded(self._batches) if endless else self._batches
        for batch in soundness.as_before(given, self._seen):
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "no batches: the iterable of batches ended at once; pass a list of at least one "
                "batch"
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients, by the name that ``named_parameters`` gives; a
        tied one once.
        """
        if self.weights.sharded:
            reshard(self.model)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def partition(self, by: Any = "matrix", **arguments: Any) -> Blocks:
        """The blocks of :func:`blockspec.partition`, their roles found by watching the first batch.

        Where the model cannot be watched, names alone decide, and a warning says so; so they do for
        a model under ``fully_shard``. Blocks that were made before it are the same.

        Args:
            by: As there.
            arguments: ``include``, ``exclude`` and ``names``, as there.
        """
        from blockspec.model.blocks import partition

        seen = None if self.weights.sharded else self  # watching holds the whole model
        return partition(self.model, by, example=seen, **arguments)

    @contextmanager
    def prepared(self, *, replacements: bool | None = None) -> Iterator[None]:
        """Within it the model is in eval mode and differentiable twice.

        Everything is restored on leaving, also when something raises: training flags, attention
        implementation, functions, buffers, weights of embeddings with ``max_norm``.

        Args:
            replacements: Whether modules and losses with cheap second derivatives stand in for
                PyTorch's own; None: as the objective says.
        """
        replaced = self.replacements if replacements is None else replacements
        with self._evaluating(replaced), cheap_modules(self.model) if replaced else nullcontext():
            yield

    @contextmanager
    def _evaluating(self, replaced: bool) -> Iterator[None]:
        with walked(self.model), ExitStack() as stack:
            stack.enter_context(
                evaluation(self.model, batch_norm=self.batch_norm, copies=self._copies)
            )
            stack.enter_context(self.weights.at_work())
            stack.enter_context(without_caches(self.model))
            stack.enter_context(twice_differentiable(self.model))
            stack.enter_context(elementary_weight_norms(self.model))
            stack.enter_context(without_checkpoints())
            stack.enter_context(nullcontext() if replaced else plain_functions())
            stack.enter_context(torch.enable_grad())
            yield

    @contextmanager
    def unmodified(self) -> Iterator[None]:
        """The model in eval mode with its own functions: what the prepared model has to agree
        with.
        """
        with (
            evaluation(self.model, batch_norm=self.batch_norm, copies=self._copies),
            without_checkpoints(),
            plain_functions(),
            torch.enable_grad(),
        ):
            yield

    def loss_sum(self, batch: Any) -> tuple[Tensor, float]:
        """Sum of the loss terms of one batch (a scalar with a graph) and their number.

        The loss gets mappings and lists of its own, from which it may take things (``pop``).
        """
        try:
            result = self.computed(
                lambda: self.loss(self.model, mapped(batch, lambda tensor: tensor))
            )
        except (TypeError, AttributeError) as error:
            if said := soundness.misfit(batch, error) or called_otherwise(self.loss, error):
                raise TypeError(said) from error
            raise
        except (IndexError, RuntimeError) as error:
            beyond = ranges.out_of_range(self.model, self.whole_batches(), error)
            if told := beyond or soundness.misfit(batch, error):
                raise ValueError(told) from error
            raise
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(
                f"the loss gave a {type(result).__name__}; it must give two: (sum of the loss "
                "terms, number of terms); see blockspec.losses.Loss"
            )
        count = float(result[1])
        if not math.isfinite(count):
            raise ValueError(f"the loss gave {count} for the number of terms of a batch")
        return result[0], count

    def computed(self, function: Callable[[], T]) -> T:
        """What a function of the model gives; see :mod:`blockspec.model.normalisation`."""
        found, self._takes_gradients = of_order(function, third=self._takes_gradients)
        return found

    def value(self) -> float:
        """The mean over all loss terms of all batches.

        It is computed as the function that is differentiated, with gradients enabled: models that
        take another path without them, and losses that contain gradients, have the same value here
        as in products. What a backward pass would need is dropped at once, so that memory is that
        of an evaluation.
        """
        sums, counts = 0.0, 0.0
        with self._evaluating(self.replacements):
            for batch, counted in self.weights.in_step(self.batches()):
                total, count = self._value_of(batch)
                if counted:
                    sums, counts = sums + float(total.detach()), counts + count
        sums, counts = (
            float(t)
            for t in self.shards().sums(
                [torch.tensor([x], dtype=torch.float64) for x in (sums, counts)]
            )
        )
        return sums / counts

    def _value_of(self, batch: Any) -> tuple[Tensor, float]:
        with self.weights.let_go():
            return self._value_with_graph(batch)

    def _value_with_graph(self, batch: Any) -> tuple[Tensor, float]:
        if not self._takes_gradients:
            try:
                with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _dropped):
                    return self.loss_sum(batch)
            except RuntimeError as error:
                if SAVED not in str(error):  # torch.func's refusal of hooks has these words too
                    raise
                self._takes_gradients = True
        return self.loss_sum(batch)

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean loss, by parameter name; zeros where the loss does not depend on a
        parameter. Raises ValueError where weights stay elsewhere.
        """
        self.weights.refuse_gradients()
        parameters = self.parameters()
        gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
        counts = 0.0
        with self.prepared():
            for batch in self.batches():
                total, count = self.loss_sum(batch)
                counts += count
                parts = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
                for gradient, part in zip(gradients.values(), parts, strict=True):
                    if part is not None:
                        gradient += part
        *summed, terms = self.shards().sums(
            [*gradients.values(), torch.tensor([counts], dtype=torch.float64)]
        )
        return {name: part / terms.item() for name, part in zip(gradients, summed, strict=True)}

    def shards(self) -> Ranks:
        """The processes that hold a part of the data each."""
        return arrange(1) if self.sharded else Ranks()

    def check(self) -> None:
        """Everything that can be known to be wrong before the expensive part.

        Raises:
            ValueError: A loss without terms or without a graph, for a loss that is NaN or infinite,
                and for an objective that does not give the same value twice (dropout left on,
                shuffled data, random numbers in the loss).
        """
        if not isinstance(self._batches, (list, tuple)):  # those give the same objects again
            self._seen = None
            self._seen = soundness.check_repeatable(self.whole_batches)
        with self.prepared(), explained():
            count = 0.0
            for each, _ in self.weights.in_step(self.batches(self.checked_examples)):
                check_batch(each)
                value = self._value_of(each)
                if count <= 0:
                    batch, (total, count) = each, value
                if self.weights.everywhere(count > 0):
                    break
            soundness.check_loss(total, count)
            total = total.detach()  # one graph at a time
            with told_if_narrow(self.model, self.weights.dtype):
                repeated = self._value_of(batch)[0].detach()
            soundness.check_deterministic(self.model, total, repeated)


def _dropped(nothing: None) -> NoReturn:
    raise RuntimeError(f"{SAVED} hooks: dropped")


def placed(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The same batch with its tensors on ``device``, those of floating point in ``dtype`` unless it
    is None.
    """
    return mapped(
        batch, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None)
    )
