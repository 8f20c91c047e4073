"""Models that keep a memory of their own between forward passes, without it.

In eval mode Hugging Face models make a cache of keys and values, or of a recurrent state, that a
training step does not
make: some write into it in place, which autograd refuses (RWKV), some keep graphs alive in it
(RecurrentGemma), and some keep what they computed from parameters that have changed since (LeViT's
attention biases).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from blockspec.model.walks import modules_of

STORES = ("attention_bias_cache",)
"""Attributes that hold, in eval mode, what was computed from parameters (LeViT, TinyViT)."""


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """While this is open no caches are made, and what modules keep is made anew; afterwards all is
    as it was.
    """
    switched = [(c, c.use_cache) for c in _configs(model) if getattr(c, "use_cache", None)]
    stores = [
        (module, name, vars(module)[name])
        for module in modules_of(model)
        for name in STORES
        if isinstance(vars(module).get(name), dict)
    ]
    try:
        for config, _ in switched:
            config.use_cache = False
        for module, name, _ in stores:
            vars(module)[name] = _Forgetful()
        yield
    finally:
        for config, value in switched:
            config.use_cache = value
        for module, name, store in stores:
            store.clear()  # parameters may have changed since
            vars(module)[name] = store
        _drop_graphs(model)


class _Forgetful(dict[Any, Any]):
    """A dictionary that gives each value once."""

    def __getitem__(self, key: Any) -> Any:
        return self.pop(key)


def _configs(model: nn.Module) -> list[Any]:
    found = {
        id(config): config
        for module in modules_of(model)
        if (config := getattr(module, "config", None)) is not None
    }
    return list(found.values())


def _drop_graphs(model: nn.Module) -> None:
    """Drop states that modules keep with a graph: it holds the memory of a whole pass."""
    for module in modules_of(model):
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, None)
