"""AdaHessian: steps scaled by the diagonal of the Hessian (Yao et al., arXiv 2006.00719)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.checkpointing import without_checkpoints
from blockspec.model.compiled import uncompiled
from blockspec.model.differentiability import watched_gradients
from blockspec.model.kernels import twice_differentiable
from blockspec.model.objective import Objective
from blockspec.model.pieces import Block, Piece
from blockspec.model.second_order import ACTIVATIONS, cheap_modules
from blockspec.model.weight_norms import elementary_weight_norms
from blockspec.optim import checks
from blockspec.optim.averaging import SpatialAveraging, averaging
from blockspec.optim.measurement import (
    Measured,
    explained,
    finite,
    is_finite,
    leaves,
    mean_over_processes,
    num_processes,
    signs,
    suspects,
)
from blockspec.optim.updates import update
from blockspec.products.curvature import Products
from blockspec.products.guard import Check, checked

OF_ALL = ("update_each", "num_probes", "spatial_averaging", "average_vectors")
"""Settings that all parameters share."""


class AdaHessian(torch.optim.Optimizer):
    """Adam with the diagonal of the Hessian in the place of the squared gradient.

    With the gradient g and a probe z of random signs, drawn anew for each measurement, step t
    does::

        D = |z * (H z)|, averaged over blocks of entries   (every ``update_each`` steps)
        m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) D^2
        theta -= lr * ( m / (1 - b1^t) / ( (v / (1 - b2^t))^(k/2) + eps ) + weight_decay * theta )

    In a loop it is two lines away from AdamW::

        optimizer = AdaHessian(model.named_parameters(), lr=0.15)
        for batch in batches:
            with optimizer.second_order(model):    # attention that has a second derivative
                loss = model(**batch).loss
                optimizer.backward(loss)             # instead of loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The way of other packages, ``loss.backward(create_graph=True)`` and ``step()``, works too:
    ``step`` measures through the graphs of the gradients, and frees them.
    ``create_graph=optimizer.due`` makes none on the other steps.

    What calls ``backward`` for you takes a loss that measures:
    ``accelerator.backward(optimizer.probe(loss))``, where ``optimizer`` is this one (accelerate's
    wrapper, which is for ``step``, has it as ``.optimizer``). Hugging Face's ``Trainer`` gets it by
    its arguments, without a subclass, if the model was loaded with ``attn_implementation="eager"``
    (or trains within :func:`blockspec.model.kernels.twice_differentiable`)::

        def measured_loss(outputs, labels, num_items_in_batch=None):
            loss = model.loss_function(
                outputs.logits, labels, model.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            return optimizer.probe(loss)

        Trainer(
            model, arguments, optimizers=(optimizer, None), compute_loss_func=measured_loss, ...
        )

    Gradients and measurements of micro-batches add up (each loss divided by their number, as
    usual). All of them see the same probe, so the sum is what one large batch would give. Clipping,
    and whatever else changes ``.grad``, acts on g alone. In a process group the measurement is
    averaged over the processes, as ``DistributedDataParallel`` averages g; they see the same probe
    too. A parameter without a gradient is left as it is, and so is one that got its first gradient
    after the last measurement, until the next one.

    Where the gradient is finite and the curvature is not (F.normalize or cosine similarity of rows
    of zeros), an entry of D keeps its last finite value, or takes the mean of its tensor's finite
    ones at first; a tensor without any is left as it is until it has some. A warning says so once,
    and ``nonfinite_entries`` counts the entries.

    Args:
        params: Parameters, ``model.named_parameters()``, a mapping of names to parameters, or
            groups of these.
        lr: Learning rate.
        betas: b1 and b2, the decay of m and v per step.
        eps: Added to the denominator. With 0, an entry that has neither gradient nor curvature
            becomes NaN.
        weight_decay: Decoupled: a step shrinks theta by ``lr * weight_decay`` of itself, whatever
            the curvature.
        hessian_power: k, from 0 (curvature is ignored) to 1.
        update_each: Steps from one measurement to the next. A step that measures costs about 3
            gradients, others 1.
        num_probes: Probes per measurement, about 2 gradients each; ``z * (H z)`` is averaged over
            them before the absolute value is taken.
        spatial_averaging: What D is averaged over. None: nothing. ``"conv"``: kernels of
            convolutions (all axes from the third on, of tensors that have one), as in the authors'
            code for images. ``"rows"``: these, and the rows of matrices; without it a single
            entry's D, measured by one probe, may be near 0 by chance, and steps are too long. A
            number: so many consecutive entries of a tensor, 32 in the authors' code for
            transformers; what is left over at its end is a run too. Blocks from
            :func:`blockspec.partition`: each block (with ``by="neuron"``: heads, output neurons,
            tokens); what lies in no block is not averaged. Blocks go by the parameters' names, so
            ``params`` must have them.
        average_vectors: Whether a number averages over tensors of one axis (biases, norms) too. The
            authors' code for transformers leaves them alone: ``spatial_averaging=32,
            average_vectors=False``.
        seed: Of the probes, which are drawn on the CPU and are the same on every device. It stands
            in ``param_groups`` together with the number of steps: a run resumed from its
            ``state_dict`` goes on with the same probes.

    The last D^2 of a parameter is ``optimizer.state[parameter]["hessian_diag_sq"]``.

    ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``hessian_power`` may differ between groups;
    their defaults are those of the authors' code. ``update_each``, ``num_probes``,
    ``spatial_averaging`` and ``average_vectors`` are not in the ``state_dict``.

    Raises:
        ValueError: A setting out of its range; blocks without names, or that hold none of the
            parameters.
        RuntimeError: In ``step``, if a measurement is due and nothing was measured; in
            ``backward``, if the loss has no second derivative.

    Mixed precision is autocast to bfloat16: a ``GradScaler`` would unscale g alone, and a v in
    bfloat16 is too coarse to decay. Activation checkpointing is switched off within
    :meth:`second_order` on the steps that measure, which keep all activations anyway; of the
    reentrant kind it must not be used without. Under ``DistributedDataParallel`` only
    :meth:`backward` and :meth:`probe` work, not ``create_graph=True``. Hooks on parameters see g
    twice where it is measured. Compiled models, which PyTorch cannot differentiate twice, run as
    they were written within :meth:`second_order`. Parameters that are sharded over processes,
    complex or sparse ones are refused. Small models on a CPU take a fifth less time after
    :func:`blockspec.optim.keep_freed_memory`, which changes the allocator of the whole process.

    Source: arXiv 2006.00719, algorithm 1, and the authors' code, which takes the absolute value
    before it averages. That the last D serves in between measurements is from davda54/ada-hessian.
    """

    def __init__(
        self,
        params: Iterable[Any] | Mapping[str, Tensor],
        lr: float = 0.15,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        update_each: int = 1,
        num_probes: int = 1,
        spatial_averaging: SpatialAveraging = "rows",
        average_vectors: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in {"update_each": update_each, "num_probes": num_probes}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.update_each = update_each
        self.num_probes = num_probes
        self.spatial_averaging = spatial_averaging
        self.average_vectors = average_vectors
        self.nonfinite_entries = 0
        self._told = False
        self._gathered: dict[
            Tensor, Tensor
        ] = {}  # z * (H z), summed over the micro-batches since the last step
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "seed": seed,
            "num_steps": 0,
        }
        super().__init__(
            list(params.items()) if isinstance(params, Mapping) else list(params), defaults
        )
        self._average = averaging(spatial_averaging, self._named(), vectors=average_vectors)

    def __getstate__(self) -> dict[str, Any]:
        own = (*OF_ALL, "nonfinite_entries", "_told")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the last step of load_state_dict
        self._gathered = {}
        self._average = averaging(
            self.spatial_averaging, self._named(), vectors=self.average_vectors
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; the state of another one is refused."""
        checks.check_state(state_dict)
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group's settings are checked."""
        own = set(OF_ALL) & set(param_group)
        if own:
            raise ValueError(
                f"{min(own)} is one setting for all parameters; give it to AdaHessian, not to a "
                "group"
            )
        checks.check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        checks.check_parameters(self.param_groups[-1])
        for name in ("seed", "num_steps"):
            self.param_groups[-1][name] = self.param_groups[0][name]
        if hasattr(self, "_average"):
            self._average = averaging(
                self.spatial_averaging, self._named(), vectors=self.average_vectors
            )

    @property
    def due(self) -> bool:
        """Whether the next step measures the diagonal, so that its backward pass must go through
        this optimizer.
        """
        return self.param_groups[0]["num_steps"] % self.update_each == 0

    @contextmanager
    def second_order(self, model: nn.Module) -> Iterator[None]:
        """Within it attention can be differentiated twice, and activations cheaply, and compiled
        models run as they were written, if the next step is due; otherwise nothing is changed.
        """
        if not self.due:
            yield
            return
        with (
            twice_differentiable(model),
            cheap_modules(model, ACTIVATIONS),
            elementary_weight_norms(model),
            without_checkpoints(),
            uncompiled(),
        ):
            yield

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """``loss.backward()``, and if the next step is due, the measurement.

        Args:
            retain_graph: Keeps the graph for another loss that shares a part of it.
        """
        measured = self.probe(loss, retain_graph=retain_graph)
        with explained():
            measured.backward(retain_graph=retain_graph)

    def probe(self, loss: Tensor, *, retain_graph: bool = False) -> Tensor:
        """The same loss, whose ``backward()`` also adds z * (H z) to the measurement if the next
        step is due.

        Both derivatives are computed here, and the graph of ``loss`` is freed unless it is to be
        retained. ``backward`` hands them out times the gradient that it gets: a factor in between
        (1 / number of micro-batches) acts on both.
        """
        if not (self.due and loss.requires_grad):
            return loss
        filled = leaves(loss)
        with explained():
            gradients = watched_gradients(loss, filled)
        given = {
            leaf: gradient
            for leaf, gradient in zip(filled, gradients, strict=True)
            if gradient is not None
        }
        diagonal = self._measure(given, retain_graph=retain_graph)
        values = [gradient.detach() for gradient in given.values()]
        return Measured.apply(
            loss.detach(), values, lambda factor: self._gather(diagonal, factor), *given
        )

    def check(self, objective: Objective) -> Check:
        """Compares a product with central differences of the gradient, before a training relies on
        it.

        Most functions without a second derivative say so when they are measured; what hands out a
        wrong one (a fused loss, compiled code, a gradient hook) is found only here. It costs about
        three gradients of the objective's first batch.

        Args:
            objective: The model whose parameters are stepped, one batch or more, and the loss.

        Raises:
            RuntimeError: The measurements would be wrong; the message says what is to blame, and
                the remedy.
        """
        held = {id(p) for group in self.param_groups for p in group["params"]}
        blocks = [
            Block(name, "other", None, p.numel(), (Piece(name),))
            for name, p in objective.parameters().items()
            if id(p) in held
        ]
        try:
            return checked(objective, blocks, "hessian", Products)
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def rescale(self, factor: float | Tensor) -> None:
        """Multiplies what was measured since the last step, as the caller does with the gradients:
        for losses that are sums, whose number of terms is known after the last micro-batch.
        """
        for values in self._gathered.values():
            values.mul_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's; drops what was measured since the last step."""
        super().zero_grad(set_to_none)
        self._gathered.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the closure, if there is one, computes the loss, calls :meth:`backward` and
        returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.due and used:
            self._set_diagonals(used)
        for parameter in used:
            if parameter.grad.requires_grad:
                parameter.grad = (
                    parameter.grad.detach()
                )  # it holds the graph, the graph the parameter: never freed otherwise
        for group in self.param_groups:
            alike: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None and "hessian_diag_sq" in self.state[parameter]:
                    alike.setdefault(self.state[parameter].get("step", 0), []).append(parameter)
            for behind, parameters in alike.items():
                update(group, behind, parameters, [self.state[p] for p in parameters])
            group["num_steps"] += 1
        return loss

    def _set_diagonals(self, used: list[Tensor]) -> None:
        if not self._gathered:
            self._gather(
                self._measure(
                    {p: p.grad for p in used if p.grad is not None and p.grad.requires_grad}
                )
            )
        if not self._gathered:
            raise RuntimeError(
                f"after {self.param_groups[0]['num_steps']} steps with "
                f"update_each={self.update_each} the Hessian's "
                "diagonal is due, but nothing was measured: call optimizer.backward(loss) instead "
                "of loss.backward(), "
                "or loss.backward(create_graph=True)"
            )
        unmeasured = [p for p in used if p not in self._gathered]
        if unmeasured and not self._told:
            self._told = True
            checks.warn_of_unmeasured(
                checks.described(unmeasured[0], self._names()), len(unmeasured)
            )
        if num_processes() > 1:  # all of them send the same tensors
            self._gathered |= {p: torch.zeros_like(p) for p in unmeasured}
        measured = [p for p in used if p in self._gathered]
        diagonals = mean_over_processes([self._gathered[p] for p in measured])
        found = self._finite(dict(zip(measured, diagonals, strict=True)))
        averaged = self._average(found)
        for parameter, square in zip(found, torch._foreach_mul(averaged, averaged), strict=True):
            self.state[parameter]["hessian_diag_sq"] = square
        self._gathered.clear()

    def _finite(self, diagonals: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Without what is NaN or infinite, which is counted, and said once."""
        bad = [list(diagonals)[i] for i in suspects(list(diagonals.values()))]
        for parameter in bad:
            new = diagonals.pop(parameter)
            lost = int((~is_finite(new)).sum())
            if lost and not self.nonfinite_entries:
                what, step = (
                    checks.described(parameter, self._names()),
                    self.param_groups[0]["num_steps"],
                )
                checks.warn_of_nonfinite(what, lost, parameter.numel(), step)
            self.nonfinite_entries += lost
            kept = finite(new, self.state[parameter].get("hessian_diag_sq"))
            if kept is not None:
                diagonals[parameter] = kept
        return diagonals

    @torch.enable_grad()
    def _measure(
        self, gradients: Mapping[Tensor, Tensor], *, retain_graph: bool = False
    ) -> dict[Tensor, Tensor]:
        """z * (H z) of our parameters among those given, averaged over the probes; frees the
        gradients' graphs.
        """
        checks.check_dense(gradients, self._names())
        parameters = [p for group in self.param_groups for p in group["params"]]
        given = [p for p in parameters if p in gradients]
        curved = [p for p in given if gradients[p].requires_grad]
        diagonal = {
            p: torch.zeros_like(p, requires_grad=False)
            for p in given
            if not gradients[p].requires_grad
        }
        totals: list[Tensor] = []
        curved_ones = set(curved)
        for probe in range(self.num_probes if curved else 0):
            drawn = zip(parameters, self._signs(parameters, probe), strict=True)
            chosen = [z for p, z in drawn if p in curved_ones]
            with explained():
                products = torch.autograd.grad(
                    [gradients[p] for p in curved],
                    curved,
                    chosen,
                    retain_graph=retain_graph or probe < self.num_probes - 1,
                    materialize_grads=True,
                )
            terms = torch._foreach_mul(products, chosen)
            if probe == 0:
                totals.extend(terms)
            else:
                torch._foreach_add_(totals, terms)
        if self.num_probes > 1 and curved:
            torch._foreach_div_(totals, self.num_probes)
        return diagonal | dict(zip(curved, totals, strict=True))

    def _gather(self, diagonal: Mapping[Tensor, Tensor], factor: Tensor | float = 1.0) -> None:
        for parameter, values in diagonal.items():
            old = self._gathered.get(parameter)
            self._gathered[parameter] = (
                values * factor if old is None else old.add_(values * factor)
            )

    def _signs(self, parameters: list[Tensor], probe: int) -> list[Tensor]:
        first = self.param_groups[0]
        return signs(parameters, f"{first['seed']}\0{first['num_steps']}\0{probe}")

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        pairs = [
            pair
            for group in self.param_groups
            for pair in zip(
                group.get("param_names", ()), group["params"], strict="param_names" in group
            )
        ]
        return dict(pairs)
