"""Hugging Face models: names of attention implementations that can be differentiated twice, for the
time being.

``sdpa`` ends in ``scaled_dot_product_attention``, which :mod:`blockspec.model.kernels` answers.
Models that cannot go through it (the sinks of GPT-OSS, the soft caps of Gemma 2) get an
implementation of our own, by the way that Hugging Face has for that: its ``AttentionInterface``. It
is the model's own eager function where sequences are short. Where they are long it is
:func:`blockspec.model.attention.attention`, if that agrees with the eager function on the first
tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from blockspec.model.attention import attention
from blockspec.model.lengths import is_long, say_once
from blockspec.model.patching import shared
from blockspec.model.walks import modules_of

OWN = "blockspec"
"""The name that is registered with Hugging Face, for as long as the process lives: it harms
nobody.
"""
FIRST = 16  # tokens on which the eager function and ours are compared
AGREEMENT = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
}  # some eager functions take softmax in float32
AGREEMENT_OF_HALF = 3e-2  # bfloat16 keeps 8 bits


@contextmanager
def switched(model: nn.Module) -> Iterator[None]:
    """While this is open, no config of the model's modules names an implementation without a second
    derivative.

    Models may share a config, in other threads too: the last one that leaves restores it.
    """
    with ExitStack() as stack:
        for config in _configs(model):
            key = ("attention implementation", id(config))
            stack.enter_context(shared(key, partial(_switch, model, config)))
        yield


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs of the model's modules that name an attention implementation."""
    configs = [getattr(module, "config", None) for module in modules_of(model)]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _switch(model: nn.Module, config: Any) -> Callable[[], None]:
    """Of this config alone: Hugging Face's own setter goes through those of its parts. Key-value
    caches, which copy keys and values for tokens to come, are off.
    """
    inner = "_attn_implementation_internal"
    name = inner if hasattr(config, inner) else "_attn_implementation"
    changes: dict[str, Any] = {name: _replacement(model, config)}
    if getattr(config, "use_cache", None):
        changes["use_cache"] = False
    before = {name: getattr(config, name) for name in changes}
    _set_all(config, changes)
    return partial(_set_all, config, before)


def _set_all(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(target, name, value)


def _replacement(model: nn.Module, config: Any) -> str | None:
    """The name of an implementation that can be differentiated twice; the config's own, if that
    can.
    """
    name = config._attn_implementation
    owners = [m for m in modules_of(model) if getattr(m, "config", None) is config]
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # sdpa leaves caps out
    through_sdpa = not capped and all(getattr(m, "_supports_sdpa", True) for m in owners)
    registry = any(getattr(m, "_supports_attention_backend", False) for m in owners)
    if name in ("sdpa", None):
        return name
    if name == "eager" and (through_sdpa or getattr(config, "output_attentions", False)):
        return name  # it was chosen
    if through_sdpa:
        return "sdpa"
    if registry:
        _register()
        return OWN
    return "eager"


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(OWN, _own)
    AttentionMaskInterface.register(OWN, _own_mask)


def _own_mask(*given: Any, **settings: Any) -> Tensor | None:
    """Boolean, or None for a causal one, where sequences are long; else as eager functions want
    it.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    sizes = (settings["q_length"], settings["kv_length"])
    device = torch.device(settings.get("device", "cpu"))
    long = is_long(*sizes, device, causal=False)
    return (sdpa_mask if long else eager_mask)(*given, **settings)


def _own(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    eager = _eager(module)
    if not is_long(query.shape[2], key.shape[2], query.device, causal=False):
        return eager(module, query, key, value, attention_mask, **settings)
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1

    def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(
            q,
            k,
            v,
            causal=causal,
            mask=mask,
            scale=settings.get("scaling"),
            softcap=settings.get("softcap"),
            sinks=settings.get("s_aux"),
        ).transpose(1, 2)

    def theirs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        return eager(module, q, k, v, _additive(q, k, mask, causal), **settings)

    given = (query, key, value, attention_mask)
    reason = "dropout of attention weights" if settings.get("dropout") else None
    if reason is None and not _agree(ours, theirs, given):
        reason = f"{type(module).__name__}, which computes more than softmax of products"
    if reason is None:
        return ours(*given).contiguous(), None
    say_once(reason)
    return theirs(*given)


def _agree(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Any],
    given: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> bool:
    """On the first tokens: what a model's eager function does beyond the settings that it is given
    cannot be known.
    """
    *tensors, mask = given
    start = [t[:, :, :FIRST] for t in tensors]
    first = None if mask is None else mask[..., :FIRST, :FIRST]
    with torch.no_grad():
        mine, other = ours(*start, first), theirs(*start, first)[0]
    difference = mine - other
    if (
        first is not None and first.dtype is torch.bool
    ):  # a row that sees nothing is zero here, and anything there
        difference *= first.any(-1).transpose(1, 2)[..., None]
    bound = AGREEMENT.get(other.dtype, AGREEMENT_OF_HALF) * other.abs().max()
    return bool(difference.abs().max() <= bound)


def _additive(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """A mask as eager functions want it."""
    if mask is None and causal:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype is not torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)


def _eager(module: nn.Module) -> Any:
    """The function of that name beside the class of the module, or beside one that it is made
    of.
    """
    files = (sys.modules[c.__module__] for c in type(module).__mro__)
    return next(f for file in files if (f := getattr(file, "eager_attention_forward", None)))
