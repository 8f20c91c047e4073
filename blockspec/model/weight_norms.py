"""Weight norm, w = g v / |v|, with a right second derivative.

PyTorch computes it in a fused function whose double backward is wrong where the norm is taken over
all but the first or the last axis: it is not symmetric, and ``torch.autograd.gradgradcheck`` fails
(torch 2.13; Wav2Vec2's positional convolution is off by 12.5 %). The same function made of
elementary operations is right, so these take its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from blockspec.model.patching import patched
from blockspec.model.walks import modules_of

PARAMETRIZATION = parametrizations._WeightNorm


@contextmanager
def elementary_weight_norms(model: nn.Module) -> Iterator[None]:
    """While this is open, weight norms in ``model`` are made of elementary operations.

    Both kinds are known: ``torch.nn.utils.parametrizations.weight_norm``, and
    ``torch.nn.utils.weight_norm``, which sets the weight in a hook before each forward pass.
    Nothing is left behind, also when something raises.
    """
    parametrized = [
        (module, "forward", _forward(module))
        for module in modules_of(model)
        if type(module) is PARAMETRIZATION and "forward" not in vars(module)
    ]
    hooks = [
        (hook, "compute_weight", _compute_weight(hook))
        for module in modules_of(model)
        for hook in _hooks(module)
    ]
    with patched([*parametrized, *hooks]):
        yield


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """g v / |v|, with one norm for each index of ``dim``; -1: one norm for all of v."""
    wide = torch.promote_types(v.dtype, torch.float32)  # the fused function has wide norms, too
    norm = torch.norm_except_dim(v.to(wide), 2, dim)
    return (v * (g / norm)).to(v.dtype)


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of the old kind; ``torch.nn.utils.weight_norm`` is a function that hides their
    module.
    """
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if type(hook).__name__ == "WeightNorm" and type(hook).__module__.startswith("torch.nn.")
    ]


def _forward(module: Any) -> Any:
    return lambda weight_g, weight_v: weight_norm(weight_v, weight_g, module.dim)


def _compute_weight(hook: Any) -> Any:
    def compute_weight(module: nn.Module) -> Tensor:
        v, g = (getattr(module, f"{hook.name}_{part}") for part in "vg")
        return weight_norm(v, g, hook.dim)

    return compute_weight
