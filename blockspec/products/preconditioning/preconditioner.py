"""The preconditioner P of an optimizer, parameter by parameter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.numerics.content import Digest
from blockspec.products.finiteness import is_finite
from blockspec.products.preconditioning.readers import READERS, STATELESS, Held, NotReady, Reader
from blockspec.products.preconditioning.scalings import Diagonal, Rotated, Scaling
from blockspec.products.preconditioning.states import Kind, StateDict, kind_of, load_state, names_of

Item = tuple[str, Tensor, Held, Reader]


class Preconditioner:
    """P, a symmetric positive matrix for each parameter, so that a step is ``-lr P^-1 m``.

    With ``estimate_spectra(..., precondition=P)``, and everywhere else where ``curvature=`` is
    taken, the matrix that is measured is ``P^(-1/2) H P^(-1/2)``. It has the eigenvalues of
    ``P^-1 H``: the curvature that the optimizer sees. The momentum m is the bias-corrected one.

    It is a snapshot: what the optimizer does afterwards does not change it, unless it follows.
    Weight decay, clipping, learning rates (also those that differ between groups) and factors of
    the step that a whole tensor shares are no part of it.

    Args:
        scalings: Parameter name -> P^-1 of the parameter.
        name: What results call it.
        again: Reads it anew, see :meth:`renewed`.

    Attributes:
        name: What results call it, such as ``AdamW``.
    """

    def __init__(
        self,
        scalings: Mapping[str, Scaling],
        *,
        name: str,
        again: Callable[[], Preconditioner] | None = None,
    ) -> None:
        self.scalings = dict(scalings)
        self.name = name
        self._again = again

    @classmethod
    def diagonal(cls, values: Mapping[str, Tensor], *, name: str = "diagonal") -> Preconditioner:
        """A diagonal P of one's own.

        Args:
            values: Parameter name -> the entries of P, above 0, in the parameter's shape.
            name: What results call it.

        Raises:
            ValueError: An entry is not above 0 and finite.
        """
        for n, v in values.items():
            if not (torch.isfinite(v) & (v > 0)).all():
                raise ValueError(
                    f"P of {n!r} cannot be inverted: P has entries that are not above 0 and finite"
                )
        made = {
            n: _invertible(n, Diagonal(1 / v.detach().to(_wide(v))), "P has entries")
            for n, v in values.items()
        }
        return cls(made, name=name)

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        model: nn.Module,
        *,
        follow: bool = False,
    ) -> Preconditioner:
        """P as the optimizer holds it now.

        Known are the optimizers of ``blockspec.products.preconditioning.readers.READERS``: SGD
        (the identity), Adam, AdamW, NAdam, Adamax, RMSprop, Adagrad, Adafactor and Muon of torch,
        Adafactor of transformers, AdaHessian of blockspec, Adam-mini, and Shampoo and SOAP of
        pytorch_optimizer, heavyball and others.

        Args:
            optimizer: One that has taken a step, or several that share the model's parameters
                (Muon for matrices, AdamW for the rest).
            model: Whose parameters they are.
            follow: What measures again and again (``blockspec.track``) reads P anew each time.

        Raises:
            ValueError: The optimizer is not known, has none of the model's parameters, or has no
                state of one yet; the message names it.
        """
        optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        names = {parameter: name for name, parameter in model.named_parameters()}
        found: dict[str, Scaling] = {}
        titles = []
        for one in map(unwrapped, optimizers):
            kind = kind_of_class(type(one))
            items = _live(one, names, READERS[kind])
            found |= _read(items, stateless=kind in STATELESS)
            titles.append(kind[1])
        if not found:
            raise ValueError(
                f"the optimizer steps none of the parameters of this {type(model).__name__}: pass "
                "the model that it was made for, not a copy of it"
            )
        again = partial(cls.from_optimizer, optimizers, model, follow=True) if follow else None
        return cls(found, name=" + ".join(dict.fromkeys(titles)), again=again)

    @classmethod
    def from_state(
        cls,
        source: str | os.PathLike[str] | StateDict,
        model: nn.Module,
        *,
        optimizer: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Preconditioner:
        """P from a saved state: ``optimizer.pt`` of transformers' Trainer, ``optimizer.bin`` of
        accelerate, nanoGPT's ``ckpt.pt``, or ``optimizer.state_dict()``, saved or not.

        Files are loaded with ``weights_only=True``: nothing in them is executed.

        Args:
            source: A file, the folder of a checkpoint, or a ``state_dict``.
            model: Whose parameters they are.
            optimizer: The class, such as ``"AdamW"`` or ``"pytorch_optimizer.SOAP"``, where the
                state does not tell.
            names: The parameters' names in the order in which the optimizer got them, where the
                state does not tell. Known are the orders of torch, of the Trainer and of nanoGPT.

        Raises:
            ValueError: The file, the class or the order is not known, or a parameter has no state.
        """
        state = load_state(source)
        kind = kind_of(state, optimizer)
        found = names_of(state, model, names)
        items = _saved(state, found, dict(model.named_parameters()), READERS[kind])
        return cls(_read(items, stateless=kind in STATELESS), name=kind[1])

    @cached_property
    def digest(self) -> str:
        """Of the numbers: what results are keyed by."""
        content = Digest()
        for parameter in sorted(self.scalings):
            content.add([parameter, self.scalings[parameter].content()])
        return content.text()

    def renewed(self) -> Preconditioner:
        """As it is now, where it follows an optimizer; else the same."""
        return self if self._again is None else self._again()

    def __or__(self, other: Preconditioner) -> Preconditioner:
        """Both, for a model whose parameters two optimizers share; where both have a parameter,
        the second counts.
        """
        name = " + ".join(dict.fromkeys([self.name, other.name]))
        return Preconditioner(self.scalings | other.scalings, name=name)

    def apply(self, tensors: Mapping[str, Tensor], exponent: float = 1.0) -> dict[str, Tensor]:
        """P^-1 to a power, times tensors.

        Args:
            tensors: Parameter name -> tensor of the parameter's shape.
            exponent: 1 gives P^-1 X, 1/2 gives P^(-1/2) X.
        """
        return {
            name: self.scalings[name].power(exponent).to(x.dtype, x.device)(x)
            for name, x in tensors.items()
        }

    def __str__(self) -> str:
        return f"{self.name} {self.digest}"

    def __repr__(self) -> str:
        return f"Preconditioner({self.name}, {len(self.scalings)} parameters, {self.digest})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Preconditioner:
        return self  # it never changes, and may be as large as the model


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, where accelerate has wrapped it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"an optimizer of torch is needed, got a {type(optimizer).__name__}")
    return inner


def kind_of_class(cls: type) -> Kind:
    """The entry of the table for a class, or for the class that it adds nothing to."""
    for base in cls.__mro__:
        kind = (base.__module__.split(".")[0], base.__name__)
        if kind in READERS:
            return kind
        if "step" in vars(base):  # another step is another optimizer
            break
    known = [".".join(kind) for kind in READERS]
    raise ValueError(
        f"what {cls.__module__}.{cls.__name__} does to its momentum is not known; known are "
        f"{known}. Give the entries of P yourself: Preconditioner.diagonal({{name: tensor}})"
    )


def _live(optimizer: torch.optim.Optimizer, names: Mapping[Any, str], reader: Reader) -> list[Item]:
    return [
        (names[p], p, Held(optimizer.state.get(p, {}), group, p.shape, vars(optimizer)), reader)
        for group in optimizer.param_groups
        for p in group["params"]
        if p in names and p.requires_grad
    ]


def _saved(
    state: StateDict, names: list[list[str]], parameters: Mapping[str, Tensor], reader: Reader
) -> list[Item]:
    items = []
    groups = [group for group in state["param_groups"] if group["params"]]
    for group, some in zip(groups, [part for part in names if part], strict=True):
        for number, name in zip(group["params"], some, strict=True):
            p = parameters[name]
            if not p.requires_grad:
                continue
            own = state["state"].get(number, {})
            items.append((name, p, Held(own, group, p.shape, {}), reader))
    return items


def _read(items: Sequence[Item], *, stateless: bool) -> dict[str, Scaling]:
    empty = [name for name, _, held, _ in items if not held.state]
    if empty and not stateless:
        raise ValueError(
            f"the optimizer has no state of {len(empty)} of its {len(items)} parameters "
            f"({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}): it has not stepped "
            "them yet. Take a step first; what never gets a gradient is to be left out of the "
            "optimizer"
        )
    return {name: _scaling(name, p, held, reader) for name, p, held, reader in items}


def _scaling(name: str, parameter: Tensor, held: Held, reader: Reader) -> Scaling:
    try:
        with torch.no_grad():
            found = reader(held)
    except NotReady as error:
        raise ValueError(f"the optimizer has no preconditioner of {name!r} yet: {error}") from None
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"the optimizer's state of {name!r} cannot be read ({type(error).__name__}: {error}); "
            f"it has {sorted(map(str, held.state))}"
        ) from error
    found = found.to(_wide(parameter), parameter.device)
    return _invertible(name, found, "the optimizer's state has entries")


def _tensors(content: Any) -> Iterable[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (list, tuple)):
        for part in content:
            yield from _tensors(part)


def _invertible(name: str, scaling: Scaling, what: str) -> Scaling:
    """P^-1 itself, where it is finite and, entry by entry, above 0: else P is infinite there.

    A small matrix may be singular: Muon moves nothing where its momentum has no part.
    """
    inverse = all(map(is_finite, _tensors(scaling.content())))
    if isinstance(scaling, Diagonal | Rotated) and scaling.values.numel():
        inverse = inverse and bool(scaling.values.amin() > 0)
    if not inverse:
        raise ValueError(
            f"P of {name!r} cannot be inverted: {what} that are negative, infinite, no numbers, or "
            "0 (an epsilon of 0, or one too small for the parameter's dtype?)"
        )
    return scaling


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
