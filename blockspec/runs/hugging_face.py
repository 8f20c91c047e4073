"""A Hugging Face name or folder as a factory: the class that its config names, every weight that
the class has, and as much text as is asked for.

A weight that a checkpoint lacks is drawn at random by transformers, another one at each call, and
only printed. Here it is an error, and so is a weight that the model has no place for.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockspec.model import losses
from blockspec.model.task_losses import sequence_to_sequence
from blockspec.model.weights import map_weights

LONGEST = 128  # tokens of a sequence where the model could take more: curvature costs its square
SHOWN = 3  # names in a message
AUTO = {
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
}
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""What configs call the number of positions; the first that is there counts."""

_DECODERS = frozenset({"modernbert-decoder", "git", "trocr"})


def hugging_face(
    name: str,
    *,
    checkpoint: str | None = None,
    text: str | None = None,
    tokens: int | None = None,
    batch_size: int = 4,
    num_batches: int = 4,
    mask_share: float = 0.15,
    unused: str | None = None,
    mapped: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, list[dict[str, torch.Tensor]], losses.Loss]:
    """A causal, masked or sequence-to-sequence language model by name or folder, on a text.

    Args:
        name: Name on the hub, or a folder with config.json, weights and tokenizer.
        checkpoint: Folder of another checkpoint of the same model. Its weights are used.
        text: A text file. If left out, the English text that every CPython ships
            (pydoc_data.topics).
        tokens: Length of a sequence. If left out, 128, or the number of the model's positions where
            that is smaller.
        batch_size: Sequences in a batch.
        num_batches: Number of batches. The text is read from its beginning, as far as it is needed.
        mask_share: Share of the tokens that are masked, for masked models.
        unused: Weights of the checkpoint that the model may leave unused, as a pattern of their
            names, such as 'cls.seq_relationship.*'. If left out, each of them is an error.
        mapped: Map the weights from the safetensors files of the folder in place of reading them,
            in the type that they are stored in. --weights_device disk asks for it.
        trust_remote_code: Run code that comes with the model. Only for sources that you trust.
    """
    from transformers import AutoTokenizer

    config = _config(name, trust_remote_code=trust_remote_code)
    task = _task(name, config)
    options = {"trust_remote_code": trust_remote_code, "dtype": torch.float32}
    if mapped:
        model = _mapped(checkpoint or name, config, task)
    elif checkpoint is None:
        model = _loaded(name, config, task, unused, options)
    else:
        model = _another(checkpoint, name, config, task, unused, options)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    tokens = _length(tokens, model)
    wanted = tokens * batch_size * num_batches
    ids = torch.tensor(first_tokens(lambda part: tokenizer(part, verbose=False), text, wanted))
    if len(ids) < wanted:
        raise ValueError(
            f"the text has {len(ids)} tokens; {num_batches} batches of {batch_size} x {tokens} "
            f"need {wanted}: give a longer text, or smaller --model_args.tokens, .batch_size or "
            ".num_batches"
        )
    batches = ids.reshape(num_batches, batch_size, tokens)
    if task == "causal":
        return model, [{"input_ids": batch} for batch in batches], losses.next_token
    if task == "sequence":
        pairs = [{"input_ids": batch, "labels": batch.clone()} for batch in batches]
        return model, pairs, sequence_to_sequence
    masked = [_masked(batch, tokenizer.mask_token_id, mask_share) for batch in batches]
    return model, masked, losses.masked_token


def _config(name: str, **options: Any) -> Any:
    """The config; where there is none, the folders that may have been meant."""
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"the folder {name!r} has no config.json, so it is no Hugging Face model: write a "
            "factory, module:function, that loads it and returns (model, batches, loss)"
        )
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise
        near = near_folders(folder)
        told = f"; folders like it: {', '.join(near)}" if near else ""
        if os.path.sep in name.strip("./") or name[:1] in "./~" or near:
            raise ValueError(f"there is no folder {name!r}{told}") from None
        raise ValueError(
            f"{name!r} is neither a folder here nor a model that the hub gives ({_first(error)})"
        ) from None


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def near_folders(path: Path) -> list[str]:
    """Folders beside ``path`` whose names are like its own."""
    try:
        there = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:
        return []
    names = difflib.get_close_matches(path.name, there, n=SHOWN, cutoff=0.6)
    return [str(path.parent / name) for name in names]


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
        "masked nor a sequence-to-sequence language model. Write a factory, module:function, that "
        "returns its model, batches with labels and one of blockspec.losses"
    )


def _class(config: Any, task: str) -> Any:
    """The class that a config names; for code of the model's own, what transformers takes."""
    import transformers

    named = (config.architectures or [""])[0]
    return getattr(transformers, named, None) or getattr(transformers, AUTO[task])


def _loaded(
    folder: str, config: Any, task: str, unused: str | None, options: Mapping[str, Any]
) -> nn.Module:
    """The model of a folder, with every weight from there."""
    model, info = _class(config, task).from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    kind = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder!r} lacks {len(missing)} weights of {kind} ({_some(missing)}), which would be "
            "random: it holds another model, or a part of one"
        )
    if other := sorted(str(key) for key in info["mismatched_keys"]):
        raise ValueError(
            f"{folder!r} holds {len(other)} weights of other shapes than {kind} with its "
            f"config.json has ({_some(other)})"
        )
    excess = [n for n in info["unexpected_keys"] if unused is None or not fnmatchcase(n, unused)]
    if excess := sorted(excess):
        raise ValueError(
            f"{folder!r} holds {len(excess)} weights that {kind} has no place for "
            f"({_some(excess)}): it is another model. If they are to be left out, say so with "
            "--model_args.unused and a pattern of their names"
        )
    return model


def _mapped(folder: str, config: Any, task: str) -> nn.Module:
    """The model of a folder, its weights mapped from the files."""
    from accelerate import init_empty_weights

    if not Path(folder).is_dir():
        raise ValueError(f"weights on disk need a folder with safetensors files, got {folder!r}")
    kind = _class(config, task)
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config) if kind.__name__ == AUTO[task] else kind(config)
    return map_weights(model, folder)


def _another(
    folder: str, name: str, config: Any, task: str, unused: str | None, options: Mapping[str, Any]
) -> nn.Module:
    """Another checkpoint of the model ``name``: of the same class, names and shapes."""
    from transformers import AutoConfig

    if not Path(folder).is_dir():
        raise ValueError(
            f"the checkpoint {folder!r} of {name!r} is no folder: a Hugging Face checkpoint is a "
            "folder with config.json and weights; other files need a factory of your own"
        )
    own = config
    if (Path(folder) / "config.json").exists():
        trusted = options["trust_remote_code"]
        own = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        own.architectures = own.architectures or config.architectures
    found = _loaded(folder, own, task, unused, options)
    if different := _differences(_empty(config, task), found):
        raise ValueError(
            f"the checkpoint {folder!r} is not one of {name!r}: {different}. Measure it as a model "
            "of its own, in another run"
        )
    return found


def _empty(config: Any, task: str) -> nn.Module:
    """The model of a config without memory for its weights."""
    kind = _class(config, task)
    with torch.device("meta"):
        return kind.from_config(config) if kind.__name__ == AUTO[task] else kind(config)


def _differences(one: nn.Module, other: nn.Module) -> str:
    """In what two models differ; "" where they are alike but for their numbers."""
    if type(one) is not type(other):
        return f"it is a {type(other).__name__}, not a {type(one).__name__}"
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (one, other)]
    for name in {**shapes[0], **shapes[1]}:
        first, second = (shape.get(name, "absent") for shape in shapes)
        if first != second:
            return f"{name} is {second} there, {first} here"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _length(tokens: int | None, model: nn.Module) -> int:
    """Tokens of a sequence: what is asked for, or as many as the model has positions for."""
    limit = _positions(model)
    if tokens is None:
        return LONGEST if limit is None else min(LONGEST, limit)
    if limit is not None and tokens > limit:
        raise ValueError(f"tokens={tokens} is more than the model's {limit} positions")
    return tokens


def _positions(model: nn.Module) -> int | None:
    """How many positions a model has; None where it has no such number, or a relative one."""
    config: Any = model.config
    number = next((n for name in POSITIONS if (n := getattr(config, name, None))), None)
    if not isinstance(number, int):
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    padded = [m.padding_idx for m in tables if m.num_embeddings == number]
    return number - max((p + 1 for p in padded if p is not None), default=0)  # RoBERTa's first one


def first_tokens(tokenize: Callable[[str], Any], path: str | None, wanted: int) -> list[int]:
    """The first tokens of a text, which is read and tokenised no further than they need."""
    for part, whole in _beginnings(path, 8 * wanted + 2000):
        ids = tokenize(part)["input_ids"]
        # a cut word or a closing token changes the last tokens of a part, not those before
        if whole or len(ids) >= wanted + 64:
            break
    return ids[:wanted]


def _beginnings(path: str | None, size: int) -> Iterator[tuple[str, bool]]:
    """Longer and longer beginnings of a text, and whether each is the whole of it."""
    if path is None:
        text = _own_text()
        while size < len(text):
            yield text[:size], False
            size *= 2
        yield text, True
        return
    with Path(path).open(encoding="utf-8") as file:
        text = ""
        while more := file.read(size):
            text += more
            size = len(text)
            following = file.read(1)
            yield text, not following
            text += following
    yield text, True


def _own_text() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _masked(batch: torch.Tensor, mask_token: int, share: float) -> dict[str, torch.Tensor]:
    chosen = torch.rand(batch.shape, generator=torch.Generator().manual_seed(0)) < share
    return {
        "input_ids": batch.masked_fill(chosen, mask_token),
        "labels": batch.masked_fill(~chosen, losses.IGNORED),
    }
