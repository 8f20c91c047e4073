"""What the parts of known architectures are called: names to kinds, to parts of fused tensors, to units that are cut.

A name is matched by its ending, component by component, the longest ending first, so that wrappers (``module.``,
``_orig_mod.``) and a model inside a model change nothing. ``#`` stands for a number in any component but the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

from torch import nn

ENDINGS: dict[str, tuple[str, ...]] = {
    "query": (
        "q_proj", "query", "query_proj", "q_attn", "q_lin", "q_proj_weight", "wq", "to_q",
        "SelfAttention.q", "EncDecAttention.q",
    ),
    "key": (
        "k_proj", "key", "key_proj", "k_lin", "k_proj_weight", "wk", "to_k",
        "SelfAttention.k", "EncDecAttention.k",
    ),
    "value": (
        "v_proj", "value", "value_proj", "v_lin", "v_proj_weight", "wv", "to_v",
        "SelfAttention.v", "EncDecAttention.v",
    ),
    "qkv": (
        "c_attn", "crossattention.c_attn", "qkv", "qkv_proj", "Wqkv", "to_qkv", "query_key_value",
        "in_proj_weight", "in_proj_bias",
    ),
    "attention_output": (
        "attn.c_proj", "crossattention.c_proj", "attn.proj", "attention.proj", "o_proj", "out_proj", "out_lin",
        "attention.output.dense", "crossattention.output.dense", "attention.dense", "self_attention.dense",
        "attn.Wo", "attention.wo", "SelfAttention.o", "EncDecAttention.o",
    ),
    "mlp_in": (
        "c_fc", "mlp.fc1", "mlp_tokens.fc1", "mlp_channels.fc1", "layers.#.fc1", "intermediate.dense", "up_proj",
        "gate_up_proj", "dense_h_to_4h", "layers.#.linear1", "ffn.lin1", "mlp.Wi", "feed_forward.w3",
        "DenseReluDense.wi", "DenseReluDense.wi_1", "encoder_layer_#.mlp.0",
    ),
    "mlp_gate": ("gate_proj", "feed_forward.w1", "DenseReluDense.wi_0"),
    "mlp_out": (
        "mlp.c_proj", "mlp.fc2", "mlp_tokens.fc2", "mlp_channels.fc2", "layers.#.fc2", "output.dense", "down_proj",
        "dense_4h_to_h", "layers.#.linear2", "ffn.lin2", "mlp.Wo", "feed_forward.w2", "DenseReluDense.wo",
        "encoder_layer_#.mlp.3",
    ),
    "embedding": (
        "wte", "embed_tokens", "word_embeddings", "embed_in", "tok_embeddings", "token_embedding", "tokens_embed",
        "shared", "token_type_embeddings", "patch_embeddings.projection", "patch_embed.proj", "patch_embedding",
        "stem.proj", "conv_proj", "cls_token", "mask_token", "dist_token", "reg_token", "class_token",
        "distillation_token", "register_tokens", "class_embedding",
    ),
    "position": (
        "wpe", "position_embeddings", "position_embedding", "embed_positions", "pos_embed", "pos_embedding",
        "positions_embed", "relative_attention_bias", "relative_position_bias_table",
    ),
    "head": (
        "lm_head", "embed_out", "predictions.decoder", "lm_head.decoder", "predictions.transform.dense",
        "lm_head.dense", "head", "head.dense", "head.fc", "fc", "classifier", "classifier.dense", "classifier.out_proj",
        "score", "qa_outputs",
        # HF and torchvision put dropout and activations between the layers of a classifier.
        "classifier.0", "classifier.1", "classifier.3", "classifier.4", "classifier.6",
    ),
    "other": ("mixer.out_proj",),  # of a state space model
}  # fmt: skip

TOKENS = frozenset(
    {
        "wte",
        "embed_tokens",
        "word_embeddings",
        "embed_in",
        "tok_embeddings",
        "token_embedding",
        "tokens_embed",
        "shared",
    }
    | {"lm_head", "embed_out", "predictions.decoder", "lm_head.decoder"}
)
"""Endings of the matrices that hold one row per token of the vocabulary."""

CUTS: dict[str, dict[str, str]] = {
    "head": {"query": "head", "key": "head"},
    # Zhang et al., Adam-mini (arXiv 2406.16793), section 2: the smallest dense sub-blocks of the Hessian.
    "neuron": {
        "query": "head",
        "key": "head",
        "value": "neuron",
        "attention_output": "neuron",
        "mlp_in": "neuron",
        "mlp_gate": "neuron",
        "mlp_out": "neuron",
        "token": "token",
    },
}
"""``by`` -> kind -> the unit that matrices of the kind are cut into; ``token`` are those of TOKENS. Absent: whole."""

FUSED_PARTS = {"crossattention.c_attn": ("key", "value")}
"""Endings whose fused tensor does not hold query, key and value."""

GROUPED = frozenset({"query_key_value"})
"""Fused tensors ordered by key head: its queries, its key, its value, then the next. Others: queries, keys, values."""

GROUPED_CLASSES = frozenset({"GPTBigCodeAttention"})
OPAQUE_CLASSES = frozenset(
    {"CodeGenAttention"}
)  # four interleaved shards, each ordered query, value, key

QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead", "heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head")

LAYERS = (
    "layers.#.blocks.#",  # Swin: stages of blocks
    "layers.encoder_layer_#",
    "denseblock#.denselayer#",
    "stages.#.#",
    "stage#.#",
    "layer#.#",
    "h.#",
    "layers.#",
    "layer.#",
    "blocks.#",
    "block.#",
    "resblocks.#",
    "albert_layers.#",
    "features.#",
)
"""Containers of layers: the first on a parameter's path is its layer; of several there, the first in this table."""

_KIND_OF = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
_LONGEST = max(ending.count(".") + 1 for ending in _KIND_OF)
_LAYER = re.compile(
    r"(?:^|\.)(?:" + "|".join(re.escape(c).replace(r"\#", r"\d+") for c in LAYERS) + r")(?=\.)"
)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class Role:
    """What a parameter does: its kind, the kind of the matrix beside it if it is a bias, and what its rows are."""

    kind: str
    matrix: str  # for a bias the kind of its weight, else the kind
    ending: str  # of ENDINGS; "" if none matched
    axis: int  # that counts the outputs


def role(name: str, owner: nn.Module) -> Role:
    """The role of parameter ``name``, a direct parameter of the module ``owner``."""
    path, _, last = name.rpartition(".")
    ending = _ending(path if last in ("weight", "bias") else name)
    matrix = _KIND_OF.get(ending, "embedding" if isinstance(owner, nn.Embedding) else "other")
    if isinstance(owner, _CONVOLUTIONS) and matrix != "embedding":
        matrix = "conv"
    # transformers' Conv1D is a linear layer that stores [in, out].
    axis = 1 if type(owner).__name__ == "Conv1D" and last == "weight" else 0
    return Role(_kind(last, matrix, owner), matrix, ending, axis)


def _kind(last: str, matrix: str, owner: nn.Module) -> str:
    if "Norm" in type(owner).__name__:
        return "norm"
    return "bias" if last == "bias" or (last.endswith("_bias") and matrix != "position") else matrix


def _ending(path: str) -> str:
    """The longest ending of ``path`` in ENDINGS, or ""."""
    *front, last = path.split(".")
    parts = [*(re.sub(r"\d+", "#", part) for part in front), last]
    candidates = (".".join(parts[-length:]) for length in range(min(_LONGEST, len(parts)), 0, -1))
    return next((candidate for candidate in candidates if candidate in _KIND_OF), "")


def layer_prefix(name: str) -> str | None:
    """The path of the layer that parameter ``name`` lies in (``transformer.h.0``); None outside the layers."""
    found = _LAYER.search(name)
    return name[: found.end()] if found else None


def unit(by: str, matrix: str, ending: str) -> str | None:
    """What ``by`` cuts a matrix of this kind and name into: head, neuron, token, or None: nothing."""
    return CUTS.get(by, {}).get("token" if ending in TOKENS else matrix)


def fused_rows(
    role: Role, size: int, owner: nn.Module, heads: tuple[int, int] | None
) -> dict[str, Sequence[int]]:
    """Which of the ``size`` rows of a fused tensor are query, key and value; empty if it is not known how to cut it.

    ``owner`` is the attention module, ``heads`` its numbers of query heads and key heads.
    """
    parts = FUSED_PARTS.get(role.ending, ("query", "key", "value"))
    name = type(owner).__name__
    if role.matrix != "qkv" or name in OPAQUE_CLASSES:
        return {}
    queries, keys = heads or (1, 1)
    if role.ending in GROUPED or name in GROUPED_CLASSES:
        groups, shares = keys, {"query": queries // keys, "key": 1, "value": 1}
        if heads is None or queries % keys:
            return {}
    else:
        groups, shares = 1, {"query": queries, "key": keys, "value": keys}
    share = sum(shares[part] for part in parts) * groups
    if size % share:
        return {}
    period = size // groups
    edges = [0, *accumulate(shares[part] * size // share for part in parts)]
    starts = range(0, size, period)
    return {
        part: tuple(chain.from_iterable(range(s + low, s + high) for s in starts))
        for part, (low, high) in zip(parts, pairwise(edges), strict=True)
    }


def head_counts(modules: Mapping[str, nn.Module], path: str) -> tuple[int, int] | None:
    """Numbers of query heads and key heads of the module at ``path``; None if neither it nor one around it knows.

    The nearest of the attributes of the module, its config, and those of the modules around it. Key heads that no one
    counts are as many as query heads.
    """
    keys = None
    for level in _levels(modules, path):
        keys = keys or _count(level, KEY_HEADS)
        queries = _count(level, QUERY_HEADS)
        if queries:
            return queries, keys or _count(getattr(level, "config", None), KEY_HEADS) or queries
    return None


def _levels(modules: Mapping[str, nn.Module], path: str) -> Iterator[Any]:
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = modules[".".join(parts[:length])]
        yield from (module, getattr(module, "config", None))


def _count(holder: Any, names: Sequence[str]) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)
