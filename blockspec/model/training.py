"""A model in the middle of its training: what is measured there must not be noticed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

WRAPPERS = {  # class names: torch's own are not importable in every build
    "DistributedDataParallel": "pass its .module",
    "DataParallel": "pass its .module",
    "OptimizedModule": "pass the model as it was before torch.compile, its ._orig_mod",
    "FullyShardedDataParallel": "measure its checkpoints with blockspec run instead",
}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Training does not notice what is done while this is open: random numbers are given back,
    mixed precision is off.
    """
    own, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others use
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.callback(random.setstate, own)
        stack.callback(np.random.set_state, numbers)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_without_autocast(model))
        yield


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Neither the autocast of a surrounding block nor the one that accelerate puts around a model's
    forward.
    """
    wrapped, plain = (vars(model).get(name) for name in ("forward", "_original_forward"))
    try:
        if wrapped is not None and plain is not None:
            model.forward = plain
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None and plain is not None:
            model.forward = wrapped


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model inside another one, with the remedy."""
    if (name := type(model).__name__) in WRAPPERS:
        raise ValueError(f"the objective's model is a {name}: {WRAPPERS[name]}")
