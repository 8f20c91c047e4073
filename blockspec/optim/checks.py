"""Mistakes with AdaHessian that are answered at once, and what it says on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

LIMITS = {**dict.fromkeys(("lr", "eps", "weight_decay"), math.inf), "hessian_power": 1.0}
"""The largest value of each setting; the smallest is 0."""


def check_parameters(group: Mapping[str, Any]) -> None:
    names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name} is {parameter.dtype}: AdaHessian's probes are real; hold real "
                "and imaginary part in one real "
                "parameter and use torch.view_as_complex on it"
            )
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"parameter {name} is sharded over processes (DTensor, FSDP2), which AdaHessian "
                "cannot measure; use "
                "DistributedDataParallel, or another optimizer"
            )
    narrow = [
        (name, parameter.dtype)
        for name, parameter in zip(names, group["params"], strict=True)
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4
    ]
    if narrow:
        warnings.warn(
            f"{len(narrow)} parameters are of 16 bits, such as {narrow[0][0]} ({narrow[0][1]}), "
            "and so are the averages of their curvature: in bfloat16 they do not decay (0.999 of "
            "a number is rounded to it), and squares overflow in float16. Keep the parameters in "
            "float32, and compute the loss under torch.autocast",
            stacklevel=4,
        )


def check_group(group: Mapping[str, Any]) -> None:
    for name, limit in LIMITS.items():
        if not 0 <= group[name] <= limit:
            raise ValueError(
                f"{name} is {group[name]}; it must be at least 0"
                + (f" and at most {limit}" * (limit < math.inf))
            )
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; it must be two numbers from 0 to below 1")


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError for the state of another optimizer."""
    for group in state["param_groups"]:
        if missing := {"hessian_power", "seed", "num_steps"} - set(group):
            raise ValueError(
                f"the state is not AdaHessian's: its groups lack {sorted(missing)} and have "
                f"{sorted(set(group) - {'params'})}. Averages of squared gradients (Adam, AdamW) "
                "are "
                "not curvature: begin without a state"
            )


def check_dense(gradients: Mapping[Tensor, Tensor], names: Mapping[Tensor, str]) -> None:
    """Raises RuntimeError for sparse gradients."""
    for parameter, gradient in gradients.items():
        if gradient.is_sparse or gradient.is_sparse_csr:
            raise RuntimeError(
                f"the gradient of {described(parameter, names)} is sparse, and a sparse gradient "
                "has no "
                "second derivative: make its module without sparse=True"
            )


def warn_of_nonfinite(what: str, lost: int, numel: int, step: int) -> None:
    """Says what becomes of entries whose curvature is not finite."""
    warnings.warn(
        f"the curvature of {lost} of the {numel} entries of {what} is NaN or infinite at step "
        f"{step}: "
        "entries keep their last finite curvature, and a tensor that has none yet stays as it is. "
        "The "
        "loss has no second derivative there, as the norm of a zero vector has none (F.normalize "
        "or "
        "cosine_similarity of padding): leave such rows out, or add an eps under the root. This is "
        "said "
        "once; optimizer.nonfinite_entries counts on",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_of_unmeasured(what: str, number: int) -> None:
    """Says what becomes of parameters that have a gradient and no curvature."""
    warnings.warn(
        f"{what} has a gradient whose curvature was not measured ({number} such tensors): they "
        "keep "
        "their last curvature, or stay as they are. Either a part of the loss went through "
        "loss.backward() alone, or reentrant checkpointing hides them: compute the loss within "
        "optimizer.second_order(model) and call optimizer.backward(loss). This is said once",
        RuntimeWarning,
        stacklevel=2,
    )


def described(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    """A parameter in words: its name, where it has one."""
    name = names.get(parameter)
    return f"a tensor of shape {tuple(parameter.shape)}" if name is None else repr(name)
