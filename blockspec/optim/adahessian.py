"""AdaHessian: steps scaled by the diagonal of the Hessian (Yao et al., arXiv 2006.00719)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blockspec.model.checkpointing import hiding, without_reentrant_checkpoints
from blockspec.model.kernels import twice_differentiable
from blockspec.model.second_order import ACTIVATIONS, cheap_modules
from blockspec.model.weight_norms import elementary_weight_norms
from blockspec.optim.averaging import SpatialAveraging, averaging

LIMITS = {**dict.fromkeys(("lr", "eps", "weight_decay"), math.inf), "hessian_power": 1.0}
"""The largest value of each setting; the smallest is 0."""


class AdaHessian(torch.optim.Optimizer):
    """Adam with the diagonal of the Hessian in the place of the squared gradient.

    With the gradient g and a probe z of random signs, drawn anew for each measurement, step t does::

        D = |z * (H z)|, averaged over blocks of entries      (every ``update_each`` steps; the last D in between)
        m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) D^2
        theta -= lr * ( m / (1 - b1^t) / ( (v / (1 - b2^t))^(k/2) + eps ) + weight_decay * theta )

    In a loop it is two lines away from AdamW::

        optimizer = AdaHessian(model.named_parameters(), lr=0.15)
        for batch in batches:
            with optimizer.second_order(model):      # attention that has a second derivative, where it is needed
                loss = model(**batch).loss
                optimizer.backward(loss)             # instead of loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    The way of other packages, ``loss.backward(create_graph=True)`` and ``step()``, works too: ``step`` measures
    through the graphs of the gradients, and frees them. ``create_graph=optimizer.due`` makes none on the other steps.

    What calls ``backward`` for you takes a loss that measures: ``accelerator.backward(optimizer.probe(loss))``, where
    ``optimizer`` is this one (accelerate's wrapper, which is for ``step``, has it as ``.optimizer``). Hugging Face's
    ``Trainer`` gets it by its arguments, without a subclass, if the model was loaded with
    ``attn_implementation="eager"`` (or trains within :func:`blockspec.model.kernels.twice_differentiable`)::

        def measured_loss(outputs, labels, num_items_in_batch=None):
            loss = model.loss_function(
                outputs.logits, labels, model.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            return optimizer.probe(loss)

        Trainer(model, arguments, optimizers=(optimizer, None), compute_loss_func=measured_loss, ...)

    Gradients and measurements of micro-batches add up (each loss divided by their number, as usual). All of them see
    the same probe, so the sum is what one large batch would give. Clipping, and whatever else changes ``.grad``, acts
    on g alone. In a process group the measurement is averaged over the processes, as ``DistributedDataParallel``
    averages g; they see the same probe too. A parameter without a gradient is left as it is, and so is one that got
    its first gradient after the last measurement, until the next one.

    Args:
        params: Parameters, ``model.named_parameters()``, a mapping of names to parameters, or groups of these.
        lr: Learning rate.
        betas: b1 and b2, the decay of m and v per step.
        eps: Added to the denominator. With 0, an entry that has neither gradient nor curvature becomes NaN.
        weight_decay: Decoupled: a step shrinks theta by ``lr * weight_decay`` of itself, whatever the curvature.
        hessian_power: k, from 0 (curvature is ignored) to 1.
        update_each: Steps from one measurement to the next. A step that measures costs about 3 gradients, others 1.
        num_probes: Probes per measurement, about 2 gradients each; ``z * (H z)`` is averaged over them before the
            absolute value is taken.
        spatial_averaging: What D is averaged over. None: nothing. ``"conv"``: kernels of convolutions (all axes from
            the third on, of tensors that have one). ``"rows"``: these, and the rows of matrices. A number: so many
            consecutive entries of a tensor; what is left over at its end is a run too. Blocks from
            :func:`blockspec.partition`: each block (with ``by="neuron"``: heads, output neurons, tokens); what lies
            in no block is not averaged. Blocks go by the parameters' names, so ``params`` must have them.
        seed: Of the probes, which are drawn on the CPU and are the same on every device. It stands in
            ``param_groups`` together with the number of steps: a run resumed from its ``state_dict`` goes on with the
            same probes.

    The last D^2 of a parameter is ``optimizer.state[parameter]["hessian_diag_sq"]``.

    ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``hessian_power`` may differ between groups; their defaults are
    those of the authors' code. ``update_each``, ``num_probes`` and ``spatial_averaging`` are not in the
    ``state_dict``.

    Raises:
        ValueError: A setting out of its range; blocks without names, or that hold none of the parameters.
        RuntimeError: In ``step``, if a measurement is due and nothing was measured; in ``backward``, if the loss has no
            second derivative.

    Mixed precision is autocast to bfloat16: a ``GradScaler`` would unscale g alone, and a v in bfloat16 is too coarse to
    decay. Activation checkpointing must be the kind with ``use_reentrant=False``, and recomputes in the backward pass,
    which therefore belongs within :meth:`second_order`. Under ``DistributedDataParallel`` only :meth:`backward` and
    :meth:`probe` work, not ``create_graph=True``. Hooks on parameters see g twice where it is measured. Parameters that are
    sharded over processes, and compiled models, which PyTorch cannot differentiate twice, are not supported.

    Source: arXiv 2006.00719, algorithm 1, and the authors' code, which takes the absolute value before it averages.
    That the last D serves in between measurements is from davda54/ada-hessian.
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
        spatial_averaging: SpatialAveraging = None,
        seed: int = 0,
    ) -> None:
        for name, value in {"update_each": update_each, "num_probes": num_probes}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.update_each = update_each
        self.num_probes = num_probes
        self.spatial_averaging = spatial_averaging
        _keep_freed_memory()
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
        self._average = averaging(spatial_averaging, self._named())

    def __getstate__(self) -> dict[str, Any]:
        own = ("update_each", "num_probes", "spatial_averaging")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also the last step of load_state_dict
        self._gathered = {}
        self._average = averaging(self.spatial_averaging, self._named())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group's settings are checked."""
        own = {"update_each", "num_probes", "spatial_averaging"} & set(param_group)
        if own:
            raise ValueError(
                f"{min(own)} is one setting for all parameters; give it to AdaHessian, not to a group"
            )
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        for name in ("seed", "num_steps"):
            self.param_groups[-1][name] = self.param_groups[0][name]
        if hasattr(self, "_average"):
            self._average = averaging(self.spatial_averaging, self._named())

    @property
    def due(self) -> bool:
        """Whether the next step measures the diagonal, so that its backward pass must go through this optimizer."""
        return self.param_groups[0]["num_steps"] % self.update_each == 0

    @contextmanager
    def second_order(self, model: nn.Module) -> Iterator[None]:
        """Within it attention can be differentiated twice, and activations cheaply, if the next step is due; otherwise
        nothing is changed."""
        if not self.due:
            yield
            return
        with (
            twice_differentiable(model),
            cheap_modules(model, ACTIVATIONS),
            elementary_weight_norms(model),
            without_reentrant_checkpoints(),
        ):
            yield

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, and if the next step is due, the measurement; the graph is freed."""
        self.probe(loss).backward()

    def probe(self, loss: Tensor) -> Tensor:
        """The same loss, whose ``backward()`` also adds z * (H z) to the measurement if the next step is due.

        Both derivatives are computed here, and the graph of ``loss`` is freed. ``backward`` hands them out times the
        gradient that it gets: a factor in between (1 / number of micro-batches) acts on both.
        """
        if not (self.due and loss.requires_grad):
            return loss
        leaves = _leaves(loss)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        given = {
            leaf: gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None
        }
        diagonal = self._measure(given)
        values = [gradient.detach() for gradient in given.values()]
        return _Measured.apply(
            loss.detach(), values, lambda factor: self._gather(diagonal, factor), *given
        )

    def rescale(self, factor: float | Tensor) -> None:
        """Multiplies what was measured since the last step, as the caller does with the gradients: for losses that are sums,
        whose number of terms is known after the last micro-batch."""
        for values in self._gathered.values():
            values.mul_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's; drops what was measured since the last step."""
        super().zero_grad(set_to_none)
        self._gathered.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the closure, if there is one, computes the loss, calls :meth:`backward` and returns the loss."""
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
                _update(group, behind, parameters, [self.state[p] for p in parameters])
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
                f"after {self.param_groups[0]['num_steps']} steps with update_each={self.update_each} the Hessian's "
                "diagonal is due, but nothing was measured: call optimizer.backward(loss) instead of loss.backward(), "
                "or loss.backward(create_graph=True)"
            )
        diagonals = _mean_over_processes([self._gathered.get(p, torch.zeros_like(p)) for p in used])
        averaged = self._average(dict(zip(used, diagonals, strict=True)))
        for parameter, square in zip(used, torch._foreach_mul(averaged, averaged), strict=True):
            self.state[parameter]["hessian_diag_sq"] = square
        self._gathered.clear()

    @torch.enable_grad()
    def _measure(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """z * (H z) of our parameters among those given, averaged over the probes; frees the gradients' graphs."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        given = [p for p in parameters if p in gradients]
        curved = [p for p in given if gradients[p].requires_grad]
        diagonal = {
            p: torch.zeros_like(p, requires_grad=False)
            for p in given
            if not gradients[p].requires_grad
        }
        totals: list[Tensor] = []
        for probe in range(self.num_probes if curved else 0):
            signs = dict(zip(parameters, self._signs(parameters, probe), strict=True))
            chosen = [signs[p] for p in curved]
            with _explained():
                products = torch.autograd.grad(
                    [gradients[p] for p in curved],
                    curved,
                    chosen,
                    retain_graph=probe < self.num_probes - 1,
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

    def _signs(self, parameters: Sequence[Tensor], probe: int) -> list[Tensor]:
        """Random signs in the shapes of the parameters: a function of seed, number of steps and probe alone."""
        first = self.param_groups[0]
        digest = hashlib.sha256(f"{first['seed']}\0{first['num_steps']}\0{probe}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        sizes = [p.numel() for p in parameters]
        packed = torch.randint(
            -(2**63), 2**63 - 1, (sum(sizes) // 64 + 1,), generator=generator
        ).view(torch.uint8)
        kinds = {(p.device, p.dtype) for p in parameters}
        flat = {
            kind: _unpacked(packed.to(kind[0]), kind[1])[: sum(sizes)].split(sizes)
            for kind in kinds
        }
        return [flat[p.device, p.dtype][i].view(p.shape) for i, p in enumerate(parameters)]

    def _named(self) -> dict[str, Tensor]:
        pairs = [
            pair
            for group in self.param_groups
            for pair in zip(
                group.get("param_names", ()), group["params"], strict="param_names" in group
            )
        ]
        return dict(pairs)


def _keep_freed_memory() -> None:
    """Lets glibc keep 64 MB of freed memory: twice the largest mapping freed so far, of which 32 MB count.

    Otherwise the graph of a small model is given back and faulted in anew on every step, a fifth of its time.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


class _Measured(torch.autograd.Function):
    """A loss whose gradients are known already; its backward pass tells by what factor they are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        gradients: list[Tensor],
        gather: Callable[[Tensor], None],
        *leaves: Tensor,
    ) -> Tensor:
        ctx.gradients, ctx.gather = gradients, gather
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        ctx.gather(factor)
        return None, None, None, *torch._foreach_mul(ctx.gradients, factor)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,) bytes -> (8 n,) signs: only bits are drawn on the CPU and travel to the device."""
    bits = (
        torch.arange(256, device=packed.device)[:, None] >> torch.arange(8, device=packed.device)
        & 1
    )
    return (2 * bits - 1).to(dtype).index_select(0, packed.int()).view(-1)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor whose ``.grad`` ``loss.backward()`` would fill, those of other optimizers too."""
    leaves: dict[Tensor, None] = {}
    nodes = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if message := hiding(node):
            raise RuntimeError(
                f"{message}, or compute the loss within optimizer.second_order(model)"
            )
        if type(node).__name__ == "AccumulateGrad":
            leaves[node.variable] = None
        new = [
            child
            for child, _ in getattr(node, "next_functions", ())
            if child is not None and child not in seen
        ]
        seen.update(new)
        nodes.extend(new)
    return list(leaves)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented" in str(error) or "double backward" in str(error):
            raise RuntimeError(
                f"the loss cannot be differentiated twice ({error}); compute it within "
                "`with optimizer.second_order(model):`, which replaces fused attention; a compiled model never can be"
            ) from error
        raise


def _mean_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(tensors)
    tensors = [tensor.contiguous() for tensor in tensors]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
    return list(torch._foreach_div(tensors, dist.get_world_size()))


def _update(
    group: Mapping[str, Any], step: int, parameters: list[Tensor], states: list[dict[str, Any]]
) -> None:
    """The step of the class's docstring, for all parameters of a group that have the same number of steps behind them."""
    for parameter, state in zip(parameters, states, strict=True):
        if not step:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_hessian_diag_sq"] = torch.zeros_like(parameter)
        state["step"] = step + 1
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    mean = [state["exp_avg"] for state in states]
    square = [state["exp_hessian_diag_sq"] for state in states]
    torch._foreach_lerp_(mean, [p.grad for p in parameters if p.grad is not None], 1 - beta1)
    torch._foreach_lerp_(square, [state["hessian_diag_sq"] for state in states], 1 - beta2)
    # Both bias corrections go into numbers: two passes over the tensors less.
    half_power = group["hessian_power"] / 2
    correction = (1 - beta2 ** (step + 1)) ** half_power
    denominator = torch._foreach_pow(square, half_power)
    torch._foreach_add_(denominator, group["eps"] * correction)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    torch._foreach_addcdiv_(
        parameters, mean, denominator, value=-lr * correction / (1 - beta1 ** (step + 1))
    )


def _check_group(group: Mapping[str, Any]) -> None:
    for name, limit in LIMITS.items():
        if not 0 <= group[name] <= limit:
            raise ValueError(
                f"{name} is {group[name]}; it must be at least 0"
                + (f" and at most {limit}" * (limit < math.inf))
            )
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; it must be two numbers from 0 to below 1")
