"""Models and batches whose curvature cannot be taken, each with what to do instead.

What can be seen from the outside is refused when the objective is made; what shows only when the
loss is computed or differentiated is explained where it happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

REMEDIES = {
    "ctc_loss": "torch's CTC loss has none; write its forward recursion in logarithms "
    "(torch.logsumexp), which has",
    "embedding_bag": "use nn.Embedding and reduce its rows yourself: embedding(x).sum(1) or "
    ".mean(1)",
    "cdist": "write the distances out: (a[:, None] - b[None]).square().sum(-1), with a root where "
    "it is not 0",
    "grid_sampler": "interpolate with differentiable indexing, or freeze what the grid depends on",
    "rnn": "within torch.backends.cudnn.flags(enabled=False) recurrent layers are made of "
    "differentiable parts",
    "ttention": "switch it off in the model, e.g. attn_implementation='eager'",
}
"""What stands in the name of a function without a second derivative -> what to do."""

OTHERWISE = (
    "switch it off in the model (fused norms, fused losses), or write it with functions of torch "
    "that can be "
    "differentiated twice"
)

CACHES = ("past_key_values", "cache_params")


def check_model(model: nn.Module) -> None:
    """Raises ValueError for what cannot be measured at all, with the remedy."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "the model is compiled (torch.compile), and a compiled model cannot be differentiated "
            "twice: pass the "
            "model that was compiled, model._orig_mod"
        )
    for name, module in model.named_modules():
        exported = isinstance(module, torch.fx.GraphModule) and "eval" in vars(module)
        if exported or isinstance(module, torch.jit.ScriptModule):
            how = "exported (torch.export)" if exported else "scripted or traced (torch.jit)"
            raise ValueError(
                f"{f'module {name!r}' if name else 'the model'} is {how}: its mode and its "
                "functions cannot be changed, as measuring needs. Put the Python module that it "
                "was made from in its place, with the same weights"
            )
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"the model ({type(model).__name__}) has no parameters: there is nothing to take the "
            "curvature by. "
            "Register what is trained as nn.Parameter, and modules as attributes or in an "
            "nn.ModuleList"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; curvature is taken by real parameters. "
                "Hold real and "
                "imaginary part in one real parameter and use torch.view_as_complex on it, or "
                "freeze it"
            )
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and isinstance(
            module, (nn.Embedding, nn.EmbeddingBag)
        ):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) makes sparse gradients, which have no "
                "second derivative: "
                f"set its sparse to False (model.get_submodule({name!r}).sparse = False); the "
                "numbers are the same"
            )
        if getattr(module, "scale_grad_by_freq", False) is True:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) divides its gradient by how often a "
                "row was read, so that the gradient is that of no function, and has no Hessian: "
                f"set model.get_submodule({name!r}).scale_grad_by_freq = False to measure the loss"
            )


def check_batch(batch: Any) -> None:
    """Raises ValueError for a batch that a forward pass changes."""
    if not isinstance(batch, Mapping):
        return
    for name, value in batch.items():
        if value is not None and (name in CACHES or hasattr(value, "get_seq_length")):
            raise ValueError(
                f"the batch holds a cache ({name!r}), to which every forward pass adds its tokens, "
                "so that the second "
                "one is of another function: leave it out and pass the whole sequence as input_ids"
            )


def length_of(batches: Iterable[Any]) -> int | None:
    """Number of batches; None where it is not known before they are read.

    Raises:
        ValueError: A DataLoader over a stream, which may never end.
    """
    if not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError as error:
        raise ValueError(
            f"the number of batches is not known ({error}): the {type(batches).__name__} reads a "
            "stream "
            "(IterableDataset), which may not end or not repeat. Take a list of some: "
            "list(itertools.islice(loader, 8))"
        ) from error


@contextmanager
def explained() -> Iterator[None]:
    """Says what to do about a function that cannot be differentiated twice."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if message := explanation(str(error)):
            raise ValueError(message) from error
        raise


def explanation(text: str) -> str | None:
    """What to say instead of an error of PyTorch's; None where it is not one of these."""
    if ("derivative" in text and "is not implemented" in text) or "once_differentiable" in text:
        return remedy(text)
    if "Expected mat_a to be" in text:
        return f"fused experts ({text}): call model.set_experts_implementation('eager') first"
    if "does not currently support double backward" in text or "donated buffers" in text:
        return (
            f"a part of the model or of the loss is compiled ({text}): use it as it was before "
            "torch.compile, or measure "
            "within torch.compiler.set_stance('force_eager')"
        )
    if "not implemented for sparse" in text or "sparse tensors" in text:
        return (
            f"a gradient or tensor is sparse ({text}): make embeddings without sparse=True, and "
            "tensors of the batch "
            "dense with .to_dense()"
        )
    return None


def remedy(what: str) -> str:
    """The message for a function without a second derivative."""
    found = [todo for name, todo in REMEDIES.items() if name in what]
    return (
        "the model uses a kernel that cannot be differentiated twice and could not be replaced "
        f"({what}); "
        f"{found[0] if found else OTHERWISE}"
    )
