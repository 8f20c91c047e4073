"""Which rows of a matrix are one head, and of a fused tensor query, key and value, as far as names
and attributes tell.

A row means an output of the matrix. What attributes do not tell stays whole: a wrong cut gives
    numbers that look right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

from torch import nn

from blockspec.model.architectures import Role

FUSED_PARTS = {
    "crossattention.c_attn": ("key", "value"),
    **dict.fromkeys(
        ("to_kv", "kv", "kv_proj", "Wkv", "keys_values", "linear_kv", "key_value"), ("key", "value")
    ),
}
"""Endings whose fused tensor does not hold query, key and value."""

UNCUT = frozenset({"kv_b_proj", "kv_a_proj_with_mqa", "kv_a_proj", "wkv_a", "wkv_b", "qkvo_w"})
"""Fused tensors whose order no attribute tells (latent attention)."""

GROUPED = frozenset({"query_key_value", "linear_qkv", "@attention.attn"})
"""Fused tensors ordered by key head: its queries, its key, its value, then the next;
``attn.attn`` is litgpt's before 0.5.

Others: queries, keys, values.
"""

GROUPED_CLASSES = frozenset({"GPTBigCodeAttention"})
BY_HEAD_CLASSES = frozenset({"MiniMaxLightningAttention", "DisentangledSelfAttention"})
"""Fused tensors ordered by query head, each with a key of its own."""

GATED_CLASSES = frozenset(
    {"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpAttention"}
)
"""Attention whose query matrix holds, head by head, the query and then an output gate of the same
size.
"""

OPAQUE_CLASSES = frozenset(
    {"CodeGenAttention"}
)  # four interleaved shards, each ordered query, value, key
OPAQUE_ATTRIBUTES = ("head_first", "key_dim", "val_dim", "attn_ratio", "multi_query_group_num")
"""Attributes of attention that orders its rows by head, or in another way that its names do not
tell (timm, GLM).
"""

QUERY_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "nhead",
    "heads",
    "n_local_heads",
)
KEY_HEADS = (
    "num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups",
    "num_query_groups", "num_heads_kv", "n_head_kv", "kv_n_heads", "effective_n_kv_heads",
)  # fmt: skip
HEAD_SIZES = ("head_dim", "head_size", "head_width", "d_head", "dim_head", "kv_channels")


@dataclass(frozen=True)
class Heads:
    """Numbers of heads around a parameter, each None where nothing counts it."""

    queries: int | None = None
    keys: int | None = None
    size: int | None = None  # rows of a head

    def counts(self, matrix: str, rows: int, inputs: int | None) -> int | None:
        """Heads of a query or key matrix of so many rows and inputs; None where they are not known.

        Key heads that nothing counts are as many as query heads where the matrix is square, as it
        is without groups.
        """
        count = self.keys if matrix == "key" else self.queries
        if self.size and rows % self.size == 0 and (matrix == "key" or count is None):
            count = (
                rows // self.size
            )  # layers of one model may differ, and their config counts one of them
        elif matrix == "key" and count is None and rows == inputs:
            count = self.queries
        return count if count and rows % count == 0 else None


def heads_around(modules: Mapping[str, nn.Module], path: str) -> Heads:
    """The nearest of the attributes of the module at ``path``, its config, and those of the modules
    around it.

    An attribute that stands farther out than the number of query heads says nothing about this
    attention.
    """
    found: dict[str, int | None] = {"keys": None, "size": None}
    for level in _levels(modules, path):
        for key, names in (("keys", KEY_HEADS), ("size", HEAD_SIZES)):
            found[key] = found[key] or _count(level, names)
        queries = _count(level, QUERY_HEADS)
        if queries:
            config = getattr(level, "config", None)
            groups = _count(level, ("num_key_value_groups",))
            keys = found["keys"] or (queries // groups if groups else _count(config, KEY_HEADS))
            if isinstance(level, nn.MultiheadAttention):
                keys = queries
            return Heads(queries, keys, found["size"] or _count(config, HEAD_SIZES))
    return Heads(None, found["keys"], found["size"])


def _levels(modules: Mapping[str, nn.Module], path: str) -> Iterator[Any]:
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = modules[".".join(parts[:length])]
        yield from (module, getattr(module, "config", None))


def _count(holder: Any, names: Sequence[str]) -> int | None:
    for name in names:
        try:
            value = getattr(holder, name, None)
        except Exception:  # configs raise errors of their own where layers differ
            continue
        if type(value) is int and value > 0:
            return value
    return None


def fused_rows(
    role: Role, size: int, owner: nn.Module, heads: Heads, inputs: int | None
) -> dict[str, Sequence[int]]:
    """Which of the ``size`` rows of a fused tensor are query, key, value and gate; empty where that
    is not known.

    Args:
        role: The tensor's, from its name.
        size: Its number of rows.
        owner: The attention module.
        heads: Around it.
        inputs: Of the matrix, or of the matrix beside a bias; None where there is none.
    """
    shares = _shares(role, size, owner, heads, inputs)
    groups = _groups(role, owner, heads)
    total = sum(shares.values())
    if not total or size % (total * groups):
        return {}
    edges = [0, *accumulate(share * size // (total * groups) for share in shares.values())]
    starts = range(0, size, size // groups)
    return {
        part: tuple(chain.from_iterable(range(s + low, s + high) for s in starts))
        for part, (low, high) in zip(shares, pairwise(edges), strict=True)
    }


def _groups(role: Role, owner: nn.Module, heads: Heads) -> int:
    """How many times the parts follow each other."""
    name = type(owner).__name__
    if role.matrix == "query" or name in BY_HEAD_CLASSES:
        return heads.queries or 1
    grouped = role.ending in GROUPED or name in GROUPED_CLASSES
    return (heads.keys or heads.queries or 1) if grouped else 1


def _shares(
    role: Role, size: int, owner: nn.Module, heads: Heads, inputs: int | None
) -> dict[str, int]:
    """Part -> its share of a group's rows; empty where it is not known."""
    if role.matrix == "query":
        gated = type(owner).__name__ in GATED_CLASSES and heads.queries and heads.size
        whole = gated and size == 2 * heads.queries * heads.size  # type: ignore[operator]
        return {"query": 1, "attention_gate": 1} if whole else {}
    name = type(owner).__name__
    opaque = name in OPAQUE_CLASSES or role.ending in UNCUT
    if role.matrix != "qkv" or opaque or any(hasattr(owner, a) for a in OPAQUE_ATTRIBUTES):
        return {}
    parts = FUSED_PARTS.get(role.ending, ("query", "key", "value"))
    queries, keys = heads.queries or 1, heads.keys
    if name in BY_HEAD_CLASSES or (keys is None and _equal(size, parts, inputs)):
        keys = queries
    if keys is None:
        return {}
    if role.ending in GROUPED or name in GROUPED_CLASSES:
        known = heads.queries and queries % keys == 0
        return {"query": queries // keys, "key": 1, "value": 1} if known else {}
    shares = {"query": 1, "key": 1, "value": 1}
    if name not in BY_HEAD_CLASSES:
        shares = {"query": queries, "key": keys, "value": keys}
    return {part: shares[part] for part in parts}


def _equal(size: int, parts: Sequence[str], inputs: int | None) -> bool:
    """Whether the parts are surely of one size: each as wide as the input, or key and value
    alone.
    """
    return size == len(parts) * (inputs or 0) or "query" not in parts
