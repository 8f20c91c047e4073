"""No product is believed before it was compared with the gradient.

Autograd differentiates a backward pass twice without a word even where the first one was written to
be used once: a fused loss hands out gradients that it made in its forward pass, a compiled function
or a norm keeps a number that it takes for a constant, a fused weight norm is simply wrong. The
product then lacks terms and nothing says so. But the gradient itself is right, and its central
differences are the same product, made another way.

So before the expensive part one product H d with a random direction d is compared with (g(theta + h
d) - g(theta - h d)) / 2h, and d'Hu with u'Hd, on a part of the first batch, three gradients in all.
The comparison is made on a copy of the model in float64, where a step h can be so small that hardly
any activation passes a kink (ReLU, pooling, routing) on its way; and the copy stands a hair beside
the parameters, so that none lies exactly on one. A copy that still disagrees is asked again with
other steps: the difference quotients of a smooth gradient agree with each other, whereas those over
a kink, or of rounding, do not. Only a product that disagrees with quotients that agree is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from blockspec.model.blocks import Block
from blockspec.model.differentiability import check_twice_differentiable
from blockspec.model.objective import Objective
from blockspec.numerics.memory import is_exhausted
from blockspec.products.blame import HOOKS, culprit, hooks, without_hooks
from blockspec.products.reach import Unreached, check_reach
from blockspec.products.references import Reference
from blockspec.products.trials import WAYS, Make, Tensors, Trial, part_of, trial_of

SMALLEST = 1e-9  # a step relative to the parameters, within which hardly any kink lies
STEPS = {torch.float64: (1e-7, SMALLEST, 1e-5, 1e-3), torch.float32: (1e-2, 3e-3, 3e-2)}
TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-2}
"""Of the relative error of a parameter's part of the product; see ``benchmarks/guard.py`` for right
and wrong ones.
"""
AGREEMENT = (
    0.1  # two quotients agree if they differ by less, relative to their distance from the product
)


@dataclass(frozen=True)
class Check:
    """What is known of an operator's products.

    Args:
        state: ``"passed"``, ``"unchecked"`` (it was not possible) or ``"off"`` (it was not wanted).
        reason: Why it was not possible, or what to bear in mind.
        error: Largest relative difference between product and central difference over the
            parameters.
        asymmetry: |u'Hd - d'Hu|, relative to the products' size.
    """

    state: str
    reason: str = ""
    error: float | None = None
    asymmetry: float | None = None

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


OFF = Check("off")
BORROWED = (
    "the loss computes with another model than its first argument, or the model holds functions "
    "that compute with itself and cannot be copied with it"
)
NO_DERIVATIVE = "cannot be differentiated twice"  # in any dtype: no other way can help
SWITCH = "check=False goes on without this comparison"


class WrongProduct(Exception):
    """Product and gradient disagree."""


def checked(
    objective: Objective, blocks: Sequence[Block], curvature: str, make: Make, *, way: str = "auto"
) -> Check:
    """:func:`check_products`, unless the same was checked before, and products were made in the
    same way: the objective remembers.
    """
    names = {name for block in blocks for name in block.parameters}
    state = _state(objective)
    for known, held, kind, found in objective.checks:
        if kind == (curvature, way) and names <= held and known == state:
            return found
    found = check_products(objective, blocks, curvature, make)
    objective.checks[:] = [entry for entry in objective.checks if entry[0] == state]
    objective.checks.append((state, names, (curvature, way), found))
    return found


def _state(objective: Objective) -> tuple[object, ...]:
    """What a check depends on, as far as it is known without reading numbers: tensors count their
    changes.
    """
    model = objective.model
    tensors = [*model.parameters(), *model.buffers()]
    versions = [(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
    hooked = [
        (id(m), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    gradients = [len(p._backward_hooks or ()) for p in model.parameters()]
    return id(objective.loss), objective.batch_norm, versions, hooked, gradients


@torch.random.fork_rng(devices=[])  # some models draw numbers that they do not use
def check_products(
    objective: Objective, blocks: Sequence[Block], curvature: str, make: Make
) -> Check:
    """Compares one product with central differences of the gradient, and looks whether the products
    are symmetric.

    Args:
        objective: Its model is left alone: everything is tried on a copy, on a part of the first
            batch.
        blocks: The direction is random in their parameters.
        curvature: Which matrix, see :class:`blockspec.products.curvature.Products`.
        make: Operator of that matrix for another objective.

    Returns:
        What was found; ``unchecked`` where the model cannot be copied, or its gradient is not
        smooth enough.

    Raises:
        ValueError: The products are wrong; the message names the part of the model that is to
            blame, and the remedy.
    """
    _refuse_autocast(objective.device)
    found = _tried(objective, part_of(objective), blocks, curvature, make)
    if found.state != "passed":
        with _memory_permitting():
            others = _with_terms(objective)
            found = next((_tried(objective, b, blocks, curvature, make) for b in others), found)
    if found.state != "passed":
        with _memory_permitting():
            check_twice_differentiable(objective, [n for b in blocks for n in b.parameters])
    return found


@contextmanager
def _memory_permitting() -> Iterator[None]:
    """Where memory runs out, what is inside is left out: the sweeps will cut the batch."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise


def _with_terms(objective: Objective) -> Iterator[Any]:
    """The first batch with loss terms, where the first one has none in the part that was tried."""
    with objective.prepared(), torch.no_grad():
        if objective.loss_sum(part_of(objective))[1] > 0:
            return
        for batch in objective.batches():
            if objective.loss_sum(batch)[1] > 0:
                yield batch
                return


def _tried(
    objective: Objective, batch: Any, blocks: Sequence[Block], curvature: str, make: Make
) -> Check:
    reason = ""
    for way in WAYS:
        try:
            trial = trial_of(objective, batch, blocks, curvature, way)
            found = _compared(trial, make)
        except (WrongProduct, Unreached) as error:
            if trial.borrows_from(objective.model):
                return Check("unchecked", BORROWED)
            with suppress(RuntimeError):  # of what is to blame, on the way to its name
                check_twice_differentiable(trial.objective, trial.scales)
            text = str(error)
            explained = isinstance(error, Unreached)
            raise ValueError(
                f"{text}. {SWITCH}" if explained else _explained(trial, text, make)
            ) from None
        except Exception as error:  # whatever a model does with numbers that it was not made for
            if NO_DERIVATIVE in str(error):
                raise
            reason = reason or f"it cannot be tried in float64 ({type(error).__name__}: {error})"
        else:
            if found.state == "passed":
                return found
            borrowed = trial.borrows_from(objective.model)
            reason = BORROWED if borrowed else found.reason
    return Check("unchecked", reason)


def _refuse_autocast(device: torch.device) -> None:
    if torch.is_autocast_enabled(device.type):
        dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        raise ValueError(
            f"an autocast to {dtype} is open around the call, which would round the products "
            "without a word: leave it "
            f"(torch.autocast({device.type!r}, enabled=False)), or ask for precision='bfloat16', "
            "whose error is measured"
        )


def _compared(trial: Trial, make: Make) -> Check:
    direction, other = trial.direction(1000), trial.direction(5000)
    product, others = trial.products(make, direction, other)
    asymmetry = _asymmetry(trial, (direction, product), (other, others))
    del other, others
    reference, error = _settled(trial, direction, product)
    note = check_reach(trial, reference)
    if all(gradient is None for gradient in reference.gradient.values()):
        return Check("unchecked", BORROWED)
    if error > TOLERANCE[trial.dtype]:
        reason = "the gradient is not smooth enough for its central differences"
        return Check("unchecked", reason, error, asymmetry)
    if asymmetry > TOLERANCE[trial.dtype]:
        raise WrongProduct(f"u'Hv and v'Hu differ by {asymmetry:.0%}, though the product equals")
    return Check("passed", note, error, asymmetry)


def _settled(trial: Trial, direction: Tensors, product: Tensors) -> tuple[Reference, float]:
    """The quotient that agrees with the product, or the first one, and the error.

    Raises:
        WrongProduct: Two quotients agree with each other and not with the product.
    """
    seen: list[tuple[float, Reference, dict[str, float]]] = []
    for step in STEPS[trial.dtype]:
        reference = trial.reference(direction, step)
        errors = _errors(trial, product, reference, step)
        if max(errors.values(), default=0.0) <= TOLERANCE[trial.dtype]:
            return reference, max(errors.values(), default=0.0)
        for before, earlier, known in seen:
            off = [n for n in errors if min(errors[n], known[n]) > TOLERANCE[trial.dtype]]
            worst = _worst(trial, product, earlier, reference, off)
            if worst is not None and _can_be_trusted(trial, before, step):
                raise WrongProduct(f"the part of {worst!r} is {errors[worst]:.0%} away from")
        seen.append((step, reference, errors))
    step, reference, errors = min(seen, key=lambda item: max(item[2].values()))
    return reference, max(errors.values())


def _errors(trial: Trial, product: Tensors, reference: Reference, step: float) -> dict[str, float]:
    """By parameter: the difference relative to the reference, or to what can be told from
    rounding.
    """
    sizes = {name: trial.size(name, t) for name, t in reference.product.items()}
    gradient = math.hypot(
        *(trial.size(n, g) for n, g in reference.gradient.items() if g is not None)
    )
    rounding = 1e3 * torch.finfo(trial.dtype).eps / step * gradient
    floor = 1e-3 * math.hypot(*sizes.values()) + rounding + math.ulp(0.0)
    return {
        name: trial.size(name, product[name] - t) / (sizes[name] + floor)
        for name, t in reference.product.items()
    }


def _worst(
    trial: Trial, product: Tensors, one: Reference, other: Reference, names: Iterable[str]
) -> str | None:
    """The first parameter where two quotients agree with each other and the product with
    neither.
    """
    for name in names:
        spread = trial.size(name, one.product[name] - other.product[name])
        away = min(trial.size(name, product[name] - r.product[name]) for r in (one, other))
        if spread < AGREEMENT * away:
            return name
    return None


def _can_be_trusted(trial: Trial, *steps: float) -> bool:
    """Whether quotients that agree are right: over many kinks they are means, which agree too."""
    return min(steps) <= SMALLEST or not trial.has_kinks()


def _asymmetry(trial: Trial, one: tuple[Tensors, Tensors], other: tuple[Tensors, Tensors]) -> float:
    """|u'Hv - v'Hu| over the norms of Hu and Hv, for pairs (u, Hu) and (v, Hv)."""
    (u, hu), (v, hv) = one, other
    difference = sum(float((u[n] * hv[n]).sum() - (v[n] * hu[n]).sum()) for n in u)
    size = math.hypot(*(trial.size(n, t) for h in (hu, hv) for n, t in h.items()))
    return abs(difference) / size if size else 0.0


def _explained(trial: Trial, what: str, make: Make) -> str:
    where, remedy = _hook(trial, make) or (None, None)
    if where is None:
        try:
            note = check_reach(trial, trial.reference(trial.direction(1000), STEPS[trial.dtype][0]))
        except Unreached as error:
            return f"{error}. {SWITCH}"
        where, remedy = (
            ("a part of the model or the loss", note)
            if note
            else culprit(trial.objective, trial.unmodified)
        )
    return (
        f"products with the {trial.curvature} would be wrong without a word: {what} the central "
        "difference of the gradient. "
        f"To blame is {where}: {remedy}. {SWITCH}"
    )


def _hook(trial: Trial, make: Make) -> tuple[str, str] | None:
    """Whether all is well without the hooks on gradients."""
    hooked = hooks(trial.objective.model)
    if not hooked:
        return None
    without_hooks(trial.objective.model)
    try:
        _compared(trial, make)
    except (WrongProduct, Unreached, RuntimeError):
        return None
    return "a hook on gradients", HOOKS.format(where=", ".join(hooked[:3]))
