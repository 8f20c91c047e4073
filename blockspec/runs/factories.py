"""Where a model, its data and its loss come from: ``module:function``, or a Hugging Face name or
folder.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockspec.model import losses
from blockspec.model.task_losses import sequence_to_sequence

Factory = Callable[..., tuple[nn.Module, Any, Any]]


def find_factory(name: str) -> Factory:
    """The factory of that name; anything without a colon is a Hugging Face name or folder.

    Raises:
        ValueError: The module or the function does not exist; the message says what was found.
    """
    if ":" not in name:
        return lambda **arguments: hugging_face(name, **arguments)
    module_name, function_name = name.split(":", 1)
    if (
        str(Path.cwd()) not in sys.path
    ):  # a console script does not look in the working folder, where users' factories are
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"no module {module_name!r} for the factory {name!r} ({error}); run from the folder it "
            "is in"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        functions = [
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module_name and n[0] != "_"
        ]
        raise ValueError(
            f"module {module_name!r} has no factory {function_name!r}; it has {functions}"
        )
    return factory


def hugging_face(
    name: str,
    *,
    checkpoint: str | None = None,
    text: str | None = None,
    tokens: int = 128,
    batch_size: int = 4,
    num_batches: int = 4,
    mask_share: float = 0.15,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, list[dict[str, torch.Tensor]], losses.Loss]:
    """A causal, masked or sequence-to-sequence language model by name or folder, on a text.

    Args:
        name: Name on the hub, or a folder with config.json, weights and tokenizer.
        checkpoint: Folder of another checkpoint of the same model; its weights are used.
        text: A text file; the English text that every CPython ships (pydoc_data.topics) if left
            out.
        tokens: Length of a sequence.
        batch_size: Sequences a batch.
        num_batches: Batches.
        mask_share: Share of the tokens that are masked, for masked models.
        trust_remote_code: Run code that comes with the model. Only for sources that you trust.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    task = _task(name, config)
    model = getattr(transformers, AUTO[task]).from_pretrained(
        checkpoint or name, trust_remote_code=trust_remote_code, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    ids = torch.tensor(tokenizer(_text(text), verbose=False)["input_ids"])
    wanted = tokens * batch_size * num_batches
    if len(ids) < wanted:
        raise ValueError(
            f"the text has {len(ids)} tokens; {num_batches} batches of {batch_size} x {tokens} "
            f"need {wanted}"
        )
    batches = ids[:wanted].reshape(num_batches, batch_size, tokens)
    if task == "causal":
        return model, [{"input_ids": batch} for batch in batches], losses.next_token
    if task == "sequence":
        pairs = [{"input_ids": batch, "labels": batch.clone()} for batch in batches]
        return model, pairs, sequence_to_sequence
    return (
        model,
        [_masked(batch, tokenizer.mask_token_id, mask_share) for batch in batches],
        losses.masked_token,
    )


AUTO = {
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
}


def _task(name: str, config: Any) -> str:
    """What the checkpoint was trained for, by the class that its config names.

    Raises ValueError for a class that text alone gives no loss for: another class of the same
    family would have a loss too, but an encoder that sees the token it predicts is measured without
    a word.
    """
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "sequence": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    named = list(config.architectures or [])
    if not named:
        return "causal"
    both = config.model_type in tables["masked"] and not getattr(config, "is_decoder", False)
    for task, table in tables.items():
        known = {
            n for names in table.values() for n in ([names] if isinstance(names, str) else names)
        }
        if task == "causal" and both and config.model_type not in _DECODERS:
            continue  # a bidirectional encoder with a causal head
        if known & set(named) or (task == "causal" and named[0].endswith("ForCausalLM")):
            return task
    raise ValueError(
        f"{name!r} holds a {named[0]}, and text alone gives it no loss: it is neither a causal, a "
        "masked nor a "
        "sequence-to-sequence language model. Write a factory, module:function, that returns its "
        "model, "
        "batches with labels and one of blockspec.losses"
    )


_DECODERS = frozenset({"modernbert-decoder", "git", "trocr"})


def _masked(batch: torch.Tensor, mask_token: int, share: float) -> dict[str, torch.Tensor]:
    chosen = torch.rand(batch.shape, generator=torch.Generator().manual_seed(0)) < share
    return {
        "input_ids": batch.masked_fill(chosen, mask_token),
        "labels": batch.masked_fill(~chosen, losses.IGNORED),
    }


def _text(path: str | None) -> str:
    if path is not None:
        return Path(path).read_text()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
