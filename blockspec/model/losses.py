"""Losses that say how many terms they have: ``loss(model, batch) -> (sum of the loss terms, number
of terms)``.

The objective divides by the total number of terms, so that cutting the same data into other batches
changes nothing. All of them compute the loss from the logits, in the logits' own dtype: a model's
built-in ``labels=`` loss may cast to float32 and average per batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blockspec.model import heads
from blockspec.model.heads import Logits
from blockspec.model.kernels import paused
from blockspec.model.placeholders import placeholders_of, without_placeholders
from blockspec.model.second_order import cross_entropies

IGNORED = -100  # the label that torch and transformers leave out; nanoGPT uses -1
TARGETS = ("targets", "target")  # what models that want the targets of a pair call them


@dataclass(frozen=True)
class Loss:
    """A loss in two stages, so that curvatures which split there (GGN, Fisher) can.

    Calling it gives ``(sum of the terms, number of terms)``.

    Args:
        outputs: ``(model, batch) -> Tensor``: what the model predicts, of any shape: the GGN is
            linearised here.
        terms: ``(outputs, batch) -> Tensor (N,)``: one number per loss term (per predicted token,
            per image ...): the empirical Fisher is the mean of the outer products of their
            gradients.
        chunked: ``terms`` takes :class:`blockspec.model.heads.Logits`, so that the logits of a
            vocabulary need not be held whole.
        complete: ``(model, batch) -> batch``, where a batch lacks what only the model knows.
    """

    outputs: Callable[[nn.Module, Any], Tensor]
    terms: Callable[[Tensor, Any], Tensor]
    chunked: bool = False
    complete: Callable[[nn.Module, Any], Any] = lambda model, batch: batch

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        batch = self.complete(model, batch)
        with heads.deferred(model) if self.chunked else nullcontext():
            outputs = self.outputs(model, batch)
        terms = self.terms(outputs, batch)
        return terms.sum(), terms.numel()

    def __repr__(self) -> str:
        return f"Loss({name_of(self.outputs)}, {name_of(self.terms)})"


def name_of(function: Any) -> str:
    """A function's name; of anything else, what it prints."""
    return getattr(function, "__name__", None) or repr(function)


def called_otherwise(loss: Any, error: Exception) -> str:
    """What is to be said of a function that fails when it is called as a loss is, by itself and not
    within the model; "" of any other error.

    ``lambda outputs, batch: ...`` gets the model where it awaits the model's outputs.
    """
    codes, trace = [], error.__traceback__
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    own = getattr(loss, "__code__", None)
    in_model = nn.Module._call_impl.__code__ in codes
    if own is None or in_model or not (own in codes or _refuses_two(loss)):
        return ""
    return (
        f"the loss {name_of(loss)} was called as loss(model, batch), and failed: {error}. Its "
        "first argument is the model, not the model's outputs, and it returns (sum of the loss "
        "terms, number of terms); blockspec.losses.Loss(outputs, terms) makes one of two functions"
    )


def _refuses_two(loss: Callable[..., Any]) -> bool:
    """Whether the function cannot be called with two arguments."""
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError:
        return True
    return False


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, tuple) and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"the model gave a {type(output).__name__}; expected a tensor, a tuple or something with "
        ".logits"
    )


def _forward(model: nn.Module, batch: Any) -> Tensor:
    """Logits for a mapping (all but its labels are passed on) or for the x of a pair (x, y)."""
    if isinstance(batch, Mapping):
        return _first_tensor(
            model(**{name: value for name, value in batch.items() if name != "labels"})
        )
    return _first_tensor(model(_pair(batch)[0]))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(f"a batch is a mapping or a pair (x, y); this one is a {type(batch).__name__}")


def _targets(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        return _pair(batch)[1]
    if "labels" not in batch:
        raise ValueError(f"a batch needs 'labels'; this one has {sorted(batch)}")
    if batch["labels"] is None:
        raise ValueError(
            "the labels of a batch are None; they must be a tensor. Give the batch its labels, or "
            "leave the entry out where the loss is next_token: its labels default to input_ids"
        )
    return batch["labels"]


@paused()
def _cross_entropies(logits: Tensor, labels: Tensor, *, ignored: int = IGNORED) -> Tensor:
    """(..., C) logits and (...) class labels -> (N,) cross entropies of the labels that are not
    ignored.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need labels of shape "
            f"{tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}: check the batch"
        )
    kept = labels != ignored
    if kept.all():
        kept = ...  # type: ignore[assignment]
    logits, labels = (
        _rows(logits, lambda x: x[kept].reshape(-1, x.shape[-1])),
        labels[kept].reshape(-1),
    )
    return (
        heads.cross_entropies(logits, labels)
        if isinstance(logits, Logits)
        else cross_entropies(logits, labels)
    )


def _rows(logits: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """``choose`` acts on all dimensions but the last."""
    return logits.rows(choose) if isinstance(logits, Logits) else choose(logits)


def _causal_logits(model: nn.Module, batch: Any) -> Tensor:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"next_token is a loss of decoders, and {type(model).__name__} is an encoder with a "
            "decoder: "
            "its labels are not the tokens that follow its input. Use losses.sequence_to_sequence"
        )
    if isinstance(batch, Mapping):
        return _forward(model, batch)
    tokens, targets = _pair(batch)
    # nanoGPT gives logits of every position only when it gets targets, and leaves out -1 alone
    given = {name: targets.masked_fill(targets == IGNORED, -1) for name in _target_names(model)}
    logits = _first_tensor(model(tokens, **given))
    if given and logits.dim() == 0:  # nanochat gives its loss alone when it gets targets
        logits = _first_tensor(model(tokens))
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"next_token needs logits for every one of the targets {tuple(targets.shape)}; the "
            f"model gave {tuple(logits.shape)}. A pair (x, y) holds tokens and the tokens that "
            "follow them, of one shape; a model that wants y too has an argument named one of "
            f"{TARGETS}"
        )
    return logits


def _target_names(model: nn.Module) -> tuple[str, ...]:
    """What the model calls the targets; nothing where it has no such argument.

    Another model's second argument is something else: Hugging Face's take an attention mask there.
    """
    for module in (model, *_wrapped(model)):
        names = inspect.signature(module.forward).parameters
        required = [name for name, p in list(names.items())[1:2] if _is_required(p)]
        if found := [name for name in TARGETS if name in names] or required:
            return (found[0],)
    return ()


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return named and parameter.default is inspect.Parameter.empty


def _wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """What a wrapper passes its arguments on to: the one module that it holds."""
    children = list(model.children())
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    if len(children) == 1 and inspect.Parameter.VAR_KEYWORD in kinds:
        yield children[0]
        yield from _wrapped(children[0])


def _next_token_terms(logits: Tensor, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        labels = _next_labels(batch)
        return _cross_entropies(_rows(logits, lambda x: x[:, :-1]), labels[:, 1:])
    targets = _pair(batch)[1]
    return _cross_entropies(logits, targets.masked_fill(targets == -1, IGNORED))


def _without_pictures(model: nn.Module, batch: Any) -> Any:
    """The batch, with labels that leave out what stands for pictures; as it is where nothing
    does.
    """
    if not isinstance(batch, Mapping) or not placeholders_of(model):
        return batch
    labels = _next_labels(batch)
    kept = without_placeholders(labels, model, IGNORED)
    return batch if kept is labels else {**batch, "labels": kept}


def _next_labels(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch, or its tokens without the padding."""
    if "labels" in batch:
        return _targets(batch)
    if "input_ids" not in batch:
        raise ValueError(
            f"next_token needs to know which tokens follow; this batch has {sorted(batch)}. Give "
            "it "
            "'labels' (the tokens themselves, -100 where none counts) beside 'inputs_embeds'"
        )
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return labels
    if mask.shape != labels.shape:
        raise ValueError(
            f"next_token takes padding from an attention_mask of the shape of input_ids, "
            f"{tuple(labels.shape)}; this one has {tuple(mask.shape)}. Give the batch 'labels' "
            "(-100 where no token counts)"
        )
    return labels.masked_fill(mask == 0, IGNORED)


def _squared_errors(outputs: Tensor, batch: Any) -> Tensor:
    targets = _targets(batch)
    if outputs.shape == (*targets.shape, 1):  # Hugging Face's models with one label
        outputs = outputs.squeeze(-1)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} need targets of that shape, got "
            f"{tuple(targets.shape)}"
        )
    return (outputs - targets).square().reshape(len(outputs), -1).sum(1)


next_token = Loss(_causal_logits, _next_token_terms, chunked=True, complete=_without_pictures)
"""Cross entropy of the next token, one term per predicted token.

Batches: a mapping for Hugging Face causal models (``labels`` default to ``input_ids``, are shifted
by one here, -100 is left out, and so are the placeholders of pictures, films and sounds that the
model's configuration names), or nanoGPT's pair ``(x, y)`` of already shifted tokens. A model gets
y too where its ``forward`` has an argument ``targets``: ``model(x, targets=y) -> (logits, loss)``.
"""

masked_token = Loss(
    _forward, lambda logits, batch: _cross_entropies(logits, _targets(batch)), chunked=True
)
"""Cross entropy of the masked tokens: a mapping with ``labels`` that are -100 everywhere else."""

classification = Loss(_forward, lambda logits, batch: _cross_entropies(logits, _targets(batch)))
"""Cross entropy of the class, one term per example: a pair ``(x, y)`` or a mapping with
``labels``.
"""

regression = Loss(_forward, _squared_errors)
"""Squared error summed over an example's outputs, one term per example: a pair ``(x, y)`` or a
mapping with ``labels``.
"""
