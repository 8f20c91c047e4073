"""Attention that can be differentiated twice.

Fused attention kernels have no second derivative (``derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward
is not implemented``). Under PyTorch's MATH backend the same function is made of differentiable parts; implementations that do
not go through ``scaled_dot_product_attention`` (flash, flex) are switched to it for the time being.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

DIFFERENTIABLE = (
    "eager",
    "sdpa",
    None,
)  # values of Hugging Face's `_attn_implementation` that work under MATH


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """While this is open, attention in ``model`` can be differentiated twice; afterwards all is as it was.

    Works for everything that calls ``torch.nn.functional.scaled_dot_product_attention`` (nanoGPT, timm, Hugging Face's
    default) and for Hugging Face models with a flash or flex implementation. The values computed are the same up to
    rounding. A kernel of another library that is called directly cannot be replaced; the error of its backward pass
    is explained by :mod:`blockspec.products.curvature`.
    """
    switched = [(config, config._attn_implementation) for config in _fused_configs(model)]
    replacement = (
        "sdpa"
        if all(getattr(module, "_supports_sdpa", True) for module in model.modules())
        else "eager"
    )
    try:
        for config, _ in switched:
            config._attn_implementation = replacement
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for (
            config,
            implementation,
        ) in switched:  # a model comes before its parts, whose own setting then stands
            config._attn_implementation = implementation


def _fused_configs(model: nn.Module) -> list[Any]:
    """The distinct configs of the model's modules whose attention implementation is a fused one."""
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    return [
        c
        for c in configs.values()
        if getattr(c, "_attn_implementation", None) not in DIFFERENTIABLE
    ]
