"""An optimizer's state from a file: which optimizer it is of, and which parameter is which.

``optimizer.state_dict()`` numbers its parameters, and says neither their names nor the class of the
optimizer. The class shows in the names of what it keeps (:data:`MARKS`). The numbers follow the
groups that a training made, and trainings make them by few rules (:data:`ORDERS`): a rule holds if
the groups have its sizes and every tensor has its parameter's shape. Where two rules hold and name
parameters differently, nothing is guessed.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.products.preconditioning.readers import READERS

Kind = tuple[str, str]
StateDict = Mapping[str, Any]
Named = Mapping[str, Tensor]

FILES = ("optimizer.pt", "optimizer.bin", "ckpt.pt")
"""What a checkpoint's folder calls it: transformers' Trainer, accelerate, nanoGPT."""
INSIDE = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim")
"""Where a larger dictionary has it; ``optimizer`` is nanoGPT's."""

MARKS: dict[Kind, tuple[set[str], set[str]]] = {
    ("torch", "SGD"): ({"dampening", "nesterov", "momentum"}, set()),
    ("torch", "Adam"): ({"amsgrad", "betas"}, {"exp_avg_sq"}),
    ("torch", "NAdam"): ({"momentum_decay"}, {"exp_avg_sq", "mu_product"}),
    ("torch", "Adamax"): ({"betas"}, {"exp_inf"}),
    ("torch", "RMSprop"): ({"alpha", "centered"}, {"square_avg"}),
    ("torch", "Adagrad"): ({"lr_decay", "initial_accumulator_value"}, {"sum"}),
    ("torch", "Adafactor"): ({"beta2_decay"}, {"step"}),
    ("torch", "Muon"): ({"ns_coefficients"}, {"momentum_buffer"}),
    ("transformers", "Adafactor"): ({"scale_parameter", "decay_rate"}, {"RMS"}),
    ("blockspec", "AdaHessian"): ({"hessian_power", "num_steps"}, {"exp_hessian_diag_sq"}),
    ("adam_mini", "Adam_mini"): ({"name"}, {"m", "step"}),
    ("pytorch_optimizer", "AdamMini"): ({"name", "step"}, {"m"}),
    ("pytorch_optimizer", "Shampoo"): ({"matrix_eps"}, {"inv_pre_cond_0"}),
    ("pytorch_optimizer", "SOAP"): ({"normalize_gradient"}, {"GG", "exp_avg_sq"}),
    ("emerging_optimizers", "SOAP"): ({"shampoo_beta"}, {"Q_L", "Q_R", "exp_avg_sq"}),
    ("torch_optimizer", "Shampoo"): ({"update_freq"}, {"inv_precond_0"}),
}
"""Class -> settings of its groups, and entries of its state, that tell it from the others."""

SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = dict.fromkeys(
    ("exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "sum", "momentum_buffer", "variance"),
    lambda shape: shape,
) | {
    "row_var": lambda shape: (*shape[:-1], 1),
    "exp_avg_sq_row": lambda shape: shape[:-1],
}
"""Entry of a state -> its shape, given the parameter's."""


def load_state(source: str | os.PathLike[str] | StateDict) -> StateDict:
    """The ``state_dict`` of an optimizer.

    Args:
        source: A file, a checkpoint's folder, or what such a file holds.

    Raises:
        ValueError: There is none, or the file holds more than tensors and plain values.
    """
    if isinstance(source, Mapping):
        return _inside(source, "the mapping")
    path = _file(Path(source))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, which loading could execute: if "
            f"you trust it, load it yourself and pass the state_dict ({_first_line(error)})"
        ) from None
    return _inside(content, str(path))


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise ValueError(
            f"{path} is no optimizer's state: give a file, or a folder that holds one of {FILES}"
        )
    return found[0]


def _inside(content: Any, where: str) -> StateDict:
    for part in (content, *(content.get(name) for name in INSIDE)):
        if isinstance(part, Mapping) and {"state", "param_groups"} <= part.keys():
            return part
    raise ValueError(
        f"{where} holds no optimizer's state: it has no 'state' and 'param_groups', nor one of "
        f"{INSIDE} that has"
    )


def kind_of(state: StateDict, named: str | None) -> Kind:
    """The optimizer that the state is of.

    Args:
        state: From :func:`load_state`.
        named: The class, or ``package.class``, where the user says so.

    Raises:
        ValueError: It is not known, or several fit.
    """
    if named is not None:
        return _kind_named(named)
    groups = set(state["param_groups"][0])
    entries = set(chain.from_iterable(list(state["state"].values())[:1]))
    fitting = [k for k, (g, e) in MARKS.items() if g <= groups and e <= entries]
    if len(fitting) != 1:
        raise ValueError(
            f"the state does not tell which optimizer it is of: its groups have {sorted(groups)}, "
            f"its parameters {sorted(entries)}. Name it: optimizer= one of "
            f"{[name for _, name in READERS]}"
        )
    (kind,) = fitting
    decoupled = state["param_groups"][0].get("decoupled_weight_decay")
    return ("torch", "AdamW") if kind == ("torch", "Adam") and decoupled else kind


def _kind_named(named: str) -> Kind:
    package, _, name = named.rpartition(".")
    fitting = [k for k in READERS if k[1] == name and package.split(".")[0] in ("", k[0])]
    if not fitting:
        known = [".".join(kind) for kind in READERS]
        raise ValueError(f"optimizer {named!r} is not one that can be read: {known}")
    return fitting[0]


def names_of(
    state: StateDict, model: nn.Module, given: Sequence[str] | None = None
) -> list[list[str]]:
    """The names of the parameters, group by group.

    Args:
        state: From :func:`load_state`.
        model: Whose parameters they are.
        given: All names in the order of the optimizer, where the user says so.

    Raises:
        ValueError: No order fits, or two orders do.
    """
    groups = state["param_groups"]
    if given is not None:
        found = _split(list(given), [len(group["params"]) for group in groups])
        if found is None:
            number = sum(len(group["params"]) for group in groups)
            raise ValueError(f"names are {len(given)}, but the optimizer has {number} parameters")
        _check_shapes(state, dict(model.named_parameters()), found)
        return found
    if own := _own_names(groups):
        return own
    parameters = dict(model.named_parameters())
    fitting = [names for names in _orders(model, groups) if not _misfit(state, parameters, names)]
    different = [names for names in fitting if names != fitting[0]]
    if not fitting or different:
        raise ValueError(
            "the state numbers its parameters, and "
            + (
                f"two orders of the model's names fit ({_where(fitting[0], different[0])})"
                if different
                else "no order of the model's names fits their shapes and groups "
                f"({[len(group['params']) for group in groups]} parameters)"
            )
            + ": is it the same model? Then give the names in the order in which the optimizer got "
            "them, names=[...]"
        )
    return fitting[0]


def _own_names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]] | None:
    """torch keeps the names if the optimizer was given ``named_parameters()``; Adam-mini does."""
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    if all(isinstance(group.get("name"), str) and len(group["params"]) == 1 for group in groups):
        return [[group["name"]] for group in groups]
    return None


def _in_order(model: nn.Module, parameters: Named) -> list[list[str]]:
    return [list(parameters)]


def _matrices_first(model: nn.Module, parameters: Named) -> list[list[str]]:
    """nanoGPT, and this project's training."""
    matrices = [name for name, p in parameters.items() if p.ndim >= 2]
    return [matrices, [name for name, p in parameters.items() if p.ndim < 2]]


def _decayed_first(model: nn.Module, parameters: Named) -> list[list[str]]:
    """transformers' Trainer: all but biases and norms have weight decay."""
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    return [
        [name for name in parameters if name in decayed],
        [name for name in parameters if name not in decayed],
    ]


ORDERS = (_in_order, _matrices_first, _decayed_first)


def _orders(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> Iterator[list[list[str]]]:
    """The names in groups of the given sizes, by every rule that makes groups of these sizes."""
    sizes = [len(group["params"]) for group in groups]
    everything = dict(model.named_parameters())
    trained = {name: p for name, p in everything.items() if p.requires_grad}
    for parameters in (trained, everything):
        for rule in ORDERS:
            found = [part for part in rule(model, parameters) if part]
            wanted = [size for size in sizes if size]
            if len(found) == 1:
                split = _split(found[0], sizes)
            else:
                split = found if [len(part) for part in found] == wanted else None
            if split is not None:
                yield split


def _split(names: list[str], sizes: Sequence[int]) -> list[list[str]] | None:
    """The names cut into parts of these sizes; None where they are more, or fewer."""
    if sum(sizes) != len(names):
        return None
    rest = iter(names)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _misfit(state: StateDict, parameters: Named, names: Sequence[Sequence[str]]) -> str:
    """The first parameter whose state has another shape; empty where all fit."""
    for group, some in zip(state["param_groups"], names, strict=False):
        for number, name in zip(group["params"], some, strict=True):
            for entry, shape_of in SHAPES.items():
                value = state["state"].get(number, {}).get(entry)
                shape = shape_of(tuple(parameters[name].shape))
                if isinstance(value, Tensor) and tuple(value.shape) != shape:
                    return f"{name!r} has the shape {shape}, its {entry} {tuple(value.shape)}"
    return ""


def _check_shapes(state: StateDict, parameters: Named, names: Sequence[Sequence[str]]) -> None:
    if unknown := [n for n in chain.from_iterable(names) if n not in parameters]:
        raise ValueError(f"names has {unknown[0]!r}, which is no parameter of the model")
    if misfit := _misfit(state, parameters, names):
        raise ValueError(f"the names do not fit the state: {misfit}")


def _where(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> str:
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    first, second = next(pair for pair in pairs if pair[0] != pair[1])
    return f"where one has {first!r}, the other has {second!r}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
