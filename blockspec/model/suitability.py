"""Models and batches whose curvature cannot be taken, each with what to do instead.

What can be seen from the outside is refused when the objective is made; what shows only when the
loss is computed or differentiated is explained where it happens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain, pairwise
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
    "nested_": "nested tensors have none in places: give padded batches and a mask",
    "ttention": "switch it off in the model, e.g. attn_implementation='eager'",
}
"""What stands in the name of a function without a second derivative -> what to do."""

OTHERWISE = (
    "switch it off in the model (fused norms, fused losses), or write it with functions of torch "
    "that can be "
    "differentiated twice"
)

OTHER_DTYPES = ("must have the same dtype", "expected scalar type", "should be the same")
ONCE = ("once_differentiable", "is not differentiable with respect to")
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
    _check_present(model)
    _say_shared_memory(model)
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


def _check_present(model: nn.Module) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{name!r} has no shape yet: call the model with a batch once, which gives its "
                "lazy parameters theirs"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} lies on the device 'meta', which holds shapes and no numbers: load the "
                "weights (load_state_dict(..., assign=True); from_pretrained without device_map). "
                "A model that does not fit into memory: blockspec.model.weights.map_weights"
            )


def _say_shared_memory(model: nn.Module) -> None:
    """Autograd takes two parameters in the same memory for two; an optimizer moves both."""
    places = []
    for name, p in model.named_parameters():
        if p.numel() and not hasattr(p, "to_local"):
            reach = 1 + sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))
            start = p.data_ptr()
            places.append((start, start + reach * p.element_size(), reach == p.numel(), name))
    for (start, end, dense, name), (other_start, _, other_dense, other) in pairwise(sorted(places)):
        if other_start == start or (other_start < end and dense and other_dense):
            warnings.warn(
                f"the parameters {name!r} and {other!r} share memory, but are two parameters: each "
                "is measured as if the other stayed where it is, though an optimizer moves both. "
                "Make them one (the same nn.Parameter in both places) to measure them together",
                stacklevel=4,
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
    if ("derivative" in text and "is not implemented" in text) or any(
        words in text for words in ONCE
    ):
        return remedy(text)
    if "Expected mat_a to be" in text:
        return f"fused experts ({text}): call model.set_experts_implementation('eager') first"
    if "does not currently support double backward" in text or "donated buffers" in text:
        return (
            f"a part of the model or of the loss is compiled ({text}): use it as it was before "
            "torch.compile, or measure "
            "within torch.compiler.set_stance('force_eager')"
        )
    if any(words in text for words in OTHER_DTYPES):
        return (
            f"parts of the model or of the batch are of different types ({text}): bring all to one "
            "(model.to(torch.float32)), or cast in the model's forward or in the loss. An autocast "
            "of the training does not act here: give it to the loss, or to the model's forward"
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
