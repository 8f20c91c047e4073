"""nanoGPT's ``ckpt.pt``: into Hugging Face's GPT-2 by name, or into nanoGPT's own class.

Nothing in the file is run.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from blockspec.model.losses import Loss, next_token
from language_models.batches import Batch, causal_batch, fixed_batches, pair_batches
from language_models.models import freeze_biases
from language_models.tokens import longest_window, open_tokens

PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and DistributedDataParallel
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")  # the causal mask of older checkpoints
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # Hugging Face stores these as [in, out]
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model's arguments and its weights under plain names; ValueError says why a file cannot be
    used.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and numbers and was refused: it could run code"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read, it is cut short or no checkpoint of torch: {reason}"
        ) from error
    if not isinstance(content, dict) or "model" not in content or "model_args" not in content:
        found = (
            sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{path} is no checkpoint of nanoGPT: it has {found} in place of 'model' and "
            "'model_args'"
        )
    absent = [name for name in SHAPE if name not in content["model_args"]]
    if absent:
        raise ValueError(f"{path}: its model_args lack {', '.join(absent)}")
    weights = {PREFIXES.sub("", name): tensor for name, tensor in content["model"].items()}
    return content["model_args"], {
        name: tensor for name, tensor in weights.items() if not BUFFERS.search(name)
    }


def to_gpt2(
    arguments: Mapping[str, Any], weights: Mapping[str, Tensor], *, activation: str = "gelu"
) -> GPT2LMHeadModel:
    """The same function as a Hugging Face GPT-2.

    Args:
        arguments: nanoGPT's ``model_args``.
        weights: Its weights, under plain names.
        activation: gelu, or gelu_new for old checkpoints, of a model.py that has new_gelu.
    """
    config = GPT2Config(
        vocab_size=arguments["vocab_size"],
        n_positions=arguments["block_size"],
        n_embd=arguments["n_embd"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        activation_function=activation,
        resid_pdrop=arguments.get("dropout", 0.0),
        embd_pdrop=arguments.get("dropout", 0.0),
        attn_pdrop=arguments.get("dropout", 0.0),
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    has_biases = any(name.endswith(".bias") for name in weights)
    if not has_biases:
        freeze_biases(model)
    ours = {
        name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    theirs = {
        name: tensor.t() if CONV1D.search(name) else tensor for name, tensor in weights.items()
    }
    _compare(ours, theirs)
    model.load_state_dict(
        theirs, strict=False
    )  # _compare was strict about all but the biases that there are none of
    return model.eval()


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """ValueError unless both have the same names and shapes."""
    if ours.keys() != theirs.keys():
        absent, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        raise ValueError(
            f"the weights do not fit model_args: {len(absent)} are missing "
            f"({', '.join(absent[:3])}), "
            f"{len(extra)} are unknown ({', '.join(extra[:3])})"
        )
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(theirs[name].shape)}; model_args make it "
                f"{tuple(tensor.shape)}"
            )


def checkpoint(
    checkpoint: str,
    *,
    data: str = "data/openwebtext",
    split: str = "val",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int | None = None,
    activation: str = "gelu",
) -> tuple[GPT2LMHeadModel, list[Batch], Loss]:
    """A ckpt.pt of nanoGPT as a Hugging Face GPT-2.

    Args:
        checkpoint: The file.
        data: Folder with train.bin and val.bin, nanoGPT's own or of language_models.data.
        split: val or train.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window; None takes the model's block_size.
        activation: gelu, or gelu_new for old checkpoints, of a model.py that has new_gelu.

    Returns:
        The model, fixed batches that are spread evenly over the split, and the cross entropy of the
        next token.
    """
    arguments, weights = read_checkpoint(checkpoint)
    model = to_gpt2(arguments, weights, activation=activation)
    window = num_tokens or arguments["block_size"]
    longest_window(model.config, window)
    tokens = open_tokens(data, split, window=window, vocabulary=arguments["vocab_size"])
    return (
        model,
        fixed_batches(
            tokens, causal_batch, num_batches=num_batches, batch_size=batch_size, window=window
        ),
        next_token,
    )


def original(
    checkpoint: str,
    *,
    code: str,
    data: str = "data/openwebtext",
    split: str = "val",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int | None = None,
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Loss]:
    """A ckpt.pt of nanoGPT in nanoGPT's own class.

    Args:
        checkpoint: The file.
        code: nanoGPT's model.py, which is imported: give only a file that you trust.
        data: Folder with train.bin and val.bin, nanoGPT's own or of language_models.data.
        split: val or train.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window; None takes the model's block_size.

    Returns:
        The model, fixed batches (x, y) that are spread evenly over the split, and the cross entropy
        of the next token.
    """
    arguments, weights = read_checkpoint(checkpoint)
    module = _load_code(Path(code))
    model = module.GPT(module.GPTConfig(**arguments))
    _compare(dict(model.named_parameters(remove_duplicate=False)), weights)
    model.load_state_dict(
        weights, strict=False
    )  # all but the causal masks, which the model has made
    model.eval()
    window = num_tokens or arguments["block_size"]
    tokens = open_tokens(data, split, window=window + 1, vocabulary=arguments["vocab_size"])
    return (
        model,
        pair_batches(tokens, num_batches=num_batches, batch_size=batch_size, window=window),
        next_token,
    )


def _load_code(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file; give nanoGPT's model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
