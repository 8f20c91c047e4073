"""What the parts of known architectures are called: names to kinds, to units that are cut, to
layers.

A name is the first guess of what a parameter does; :mod:`blockspec.model.roles` corrects the guess
by watching a forward pass. A name is matched by its ending, component by component, the longest
ending first, so that wrappers (``module.``, ``_orig_mod.``) and a model inside a model change
nothing. Most endings say what stands around them by ``@attention`` and the like, because the last
component alone says little: ``dense`` is an attention's output in one place and a pooler in
another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

CONTEXTS: dict[str, tuple[str, ...]] = {
    "@experts": ("expert", "moe"),
    "@router": ("router", "gating"),
    "@mixer": ("mamba", "mixer", "ssm", "linear_attn", "temporal_block", "rg_lru", "lightning"),
    "@head": ("head", "classifier", "predictions", "prediction"),
    "@attention": ("attn", "attention", "self_att"),
    "@mlp": (
        "mlp", "ffn", "feed_forward", "feedforward", "ffwd", "expert", "moe", "densereludense",
        "=ff",
    ),
    "@projector": ("projector", "connector", "projection"),
}  # fmt: skip
"""Context -> words that a component of the path around a parameter holds, in lower case; with ``=``
all of it.
"""

ENDINGS: dict[str, tuple[str, ...]] = {
    "query": (
        "q_proj", "query", "query_proj", "q_attn", "q_lin", "q_proj_weight", "wq", "w_q", "c_q",
        "to_q", "to_query", "queries", "project_q", "linear_q", "projection_query", "query_global",
        "q_b_proj", "q_a_proj", "wq_a", "wq_b", "@attention.q", "self.q", "q_head",
    ),
    "key": (
        "k_proj", "key", "key_proj", "k_lin", "k_proj_weight", "wk", "w_k", "c_k", "to_k",
        "to_key", "keys", "project_k", "linear_k", "projection_key", "key_global", "@attention.k",
        "self.k", "k_head",
    ),
    "value": (
        "v_proj", "value", "value_proj", "v_lin", "v_proj_weight", "wv", "w_v", "c_v", "to_v",
        "to_value", "values", "project_v", "linear_v", "projection_value", "value_global",
        "@attention.v", "self.v", "v_head",
    ),
    "qkv": (
        "self.in_proj", "c_attn", "crossattention.c_attn", "qkv", "qkv_proj", "Wqkv", "to_qkv",
        "query_key_value", "linear_qkv", "in_proj_weight", "in_proj_bias", "att_proj", "qkv_w",
        "qkvo_w", "queries_keys_values", "to_kv", "kv", "kv_proj", "Wkv", "keys_values",
        "linear_kv", "kv_b_proj", "kv_a_proj_with_mqa", "kv_a_proj", "wkv_a", "wkv_b", "key_value",
        "@attention.attn", "@attention.in_proj",
    ),
    "attention_output": (
        "projection.linear", "cross_attn.out", "@attention.c_proj", "@attention.proj", "o_proj",
        "out_proj", "out_lin", "@attention.output.dense", "@attention.dense", "@attention.Wo",
        "@attention.wo", "@attention.w_o", "@attention.w_out", "@attention.o", "@attention.output",
        "@attention.out", "@attention.to_out", "@attention.to_out.0", "to_out.0", "to_out",
        "@attention.attention_out", "@attention.final", "@attention.linear_out", "attn_out",
        "linear_proj", "post_proj", "o_a_proj", "o_b_proj", "@attention.final_linear", "att_out",
    ),
    "attention_gate": (
        "@attention.output_gate", "@attention.g_proj", "@attention.q_gate_proj",
        "@attention.attn_gate", "@attention.gate", "@attention.gate_proj",
    ),
    "mlp_in": (
        "linear_up.linear", "c_fc", "@mlp.fc1", "mlp_tokens.fc1", "mlp_channels.fc1",
        "layers.#.fc1", "intermediate.dense", "up_proj", "gate_up_proj", "dense_h_to_4h",
        "layers.#.linear1", "@mlp.lin1", "@mlp.Wi", "@mlp.wi", "@mlp.w3", "w3", "@mlp.wi_1",
        "encoder_layer_#.mlp.0", "fc_in", "@mlp.linear1", "@mlp.linear_1", "@mlp.dense1",
        "@mlp.w_in", "@mlp.up", "@mlp.w_up", "@mlp.w_1", "@mlp.fc_2", "@mlp.fc", "linear_fc1",
        "ff_proj", "pwconv1", "intermediate_dense", "@mlp.dense_1", "@mlp.input_linear",
        "layer.#.ffn", "layers.#.ffn", "albert_layers.#.ffn", "intermediate_query.dense",
        "@mlp.key", "net.0", "net.1", "@mlp.#.0", "@mlp.0", "w12", "@mlp.linear_in",
        "@projector.linear_1", "@mlp.linear_up.linear", "@mlp.keys", "w_in.w_1", "@mlp.#.proj",
    ),
    "mlp_gate": (
        "gate_proj", "@mlp.w1", "w1", "@mlp.wi_0", "@mlp.w_gate", "@mlp.gate_linear", "@mlp.fc_1",
        "@mlp.receptance", "w_in.w_0",
    ),
    "mlp_out": (
        "linear_down.linear", "@mlp.c_proj", "@mlp.fc2", "mlp_tokens.fc2", "mlp_channels.fc2",
        "layers.#.fc2", "output.dense", "down_proj", "dense_4h_to_h", "layers.#.linear2",
        "@mlp.lin2", "@mlp.Wo", "@mlp.w2", "w2", "@mlp.wo", "fc_out", "encoder_layer_#.mlp.3",
        "@mlp.linear2", "@mlp.linear_2", "@mlp.dense2", "@mlp.w_out", "@mlp.down", "@mlp.w_down",
        "@mlp.proj", "linear_fc2", "blocks.#.ff_out", "pwconv2", "output_dense", "@mlp.dense_2",
        "@mlp.output_linear", "layer.#.ffn_output", "layers.#.ffn_output",
        "albert_layers.#.ffn_output", "output_query.dense", "@mlp.value", "net.2", "net.3",
        "net.4", "@mlp.2", "@mlp.3", "@mlp.output", "@projector.linear_2",
        "@mlp.linear_down.linear", "@mlp.values", "@mlp.#.3", "@mlp.#.2", "@mlp.linear_out",
    ),
    "mixer": (
        "modulation.projection_in", "modulation.projection_out", "conv_out_layer",
        "conv_kernel_layer", "@mixer.out_proj", "@mixer.in_proj", "@mixer.x_proj",
        "@mixer.dt_proj", "A_log", "@mixer.D", "@mixer.o_proj", "conv.in_proj", "conv.out_proj",
        "f_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "@attention.receptance",
        "@attention.time_decay", "time_first", "time_mix_key", "time_mix_value",
        "time_mix_receptance", "time_mix_k", "forget_gate.f_proj", "@attention.b_proj",
        "@mixer.g_proj",
    ),
    "router": (
        "@router.weight", "router", "@router.layer", "@router.classifier", "@mlp.gate",
        "@mlp.gate.wg", "@experts.gate", "@router.proj", "@router.linear", "@router.gate",
    ),
    "embedding": (
        "downsample.reduction", "subsampler.dense_0", "subsampler.dense_1", "wte", "embed_tokens",
        "word_embeddings", "embed_in", "tok_embeddings", "tok_embedding", "token_embedding",
        "token_embeddings", "tokens_embed", "word_embedding", "token_emb.emb", "token_emb",
        "tok_emb", "shared", "token_type_embeddings", "patch_embeddings.projection",
        "patch_embed.proj", "patch_embedding", "stem.proj", "conv_proj", "cls_token", "mask_token",
        "dist_token", "reg_token", "class_token", "distillation_token", "register_tokens",
        "class_embedding", "^embeddings", "vision_embed_tokens", "embeddings.projection",
        "embedding_hidden_mapping_in", "embedding_transformation", "map_inputs_layer",
        "feature_projection", "feature_projection.projection", "to_patch_embedding.1",
        "to_patch_embedding.2", "patch_embed.#.proj", "embedding_projection", "embeddings_project",
        "audio_tower.conv_out", "embed.out", "subsampling.linear", "subsampling.out",
        "embeddings.patch_embeddings.layernorm", "latents", "query_tokens", "visual_projection.0",
        "multi_modal_projector.linear", "projector.linear", "multi_modal_projector",
        "projector.proj", "projector", "mm_input_projection_weight", "modality_projection",
        "modality_projection.proj", "decoder_embed", "masked_spec_embed", "model.in_proj",
        "input_projection",
    ),
    "position": (
        "wpe", "position_embeddings", "position_embedding", "embed_positions", "pos_embed",
        "pos_embedding", "positions_embed", "relative_attention_bias",
        "relative_position_bias_table", "pos_emb.emb", "pos_emb", "rel_pos_emb", "rel_embeddings",
        "distance_embedding", "relative_k_proj", "relative_key_proj", "r_proj", "linear_pos",
        "pos_key_proj", "pos_query_proj", "pos_proj", "rel_logits_proj.proj",
        "h_position_embeddings", "w_position_embeddings", "x_position_embeddings",
        "y_position_embeddings", "@attention.r", "r_kernel", "rel_pos_h", "rel_pos_w",
        "attention_biases", "position_encoding",
    ),
    "head": (
        "lm_head", "lm_heads.#", "lm_heads", "embed_out", "predictions.decoder", "lm_head.decoder",
        "predictions.transform.dense", "@head.dense", "head", "head.fc", "fc", "classifier",
        "@head.out_proj", "@head.decoder", "@head.linear1", "@head.linear2", "@head.linear",
        "@head.fc", "score", "qa_outputs", "head.#", "classifier.0", "classifier.1",
        "classifier.3", "classifier.4", "classifier.6", "pooler", "pooler.dense", "^output",
        "^output_layer", "^output_projection", "^logits", "^to_logits", "mlp_head", "output_layer",
        "transformer.ff_out", "lm_head.w_out", "vocab_transform", "vocab_projector", "mlp_head.#",
        "ctc_head", "pred_layer.proj", "to_logits", "encoder.out", "encoder.out_mid", "summary",
        "@head.proj", "visual_projection", "text_projection", "logits_proj", "lm_loss", "cls_head",
        "lm_head_w", "reg_head", "decoder_pred",
    ),
    "conv": ("pos_conv_embed.conv",),
}  # fmt: skip
"""Kind -> endings. ``#`` stands for a number in any component but the last, ``@attention`` for a
component with one of the words of CONTEXTS (first component only), ``^`` for the beginning of the
name.
"""

TOKENS = frozenset(
    {
        "wte", "embed_tokens", "word_embeddings", "embed_in", "tok_embeddings", "tok_embedding",
        "token_embedding", "token_embeddings", "tokens_embed", "word_embedding", "token_emb.emb",
        "token_emb", "tok_emb", "shared", "^embeddings", "lm_head", "lm_heads.#", "embed_out",
        "predictions.decoder", "lm_head.decoder", "@head.decoder", "^output", "^output_layer",
        "output_layer", "transformer.ff_out", "lm_head.w_out", "to_logits", "^to_logits",
        "vocab_projector", "lm_loss", "pred_layer.proj",
    }
)  # fmt: skip
"""Endings of the matrices that hold one row per token of the vocabulary."""

ADAPTERS = re.compile(
    r"\.((?:gra|rand|vb|de|poly_)?lora_[A-Za-z_]+|hada_w\w+|lokr_w\w+|ia3_l|vera_lambda_[bd]|"
    r"b?oft_[rRsS]|fourierft_\w+|waveft_\w+|hra_u|(?:bone|miss)_block|road_\w+|c3a_kernel|"
    r"shira_weight|ranknum|trainable_tokens_\w+|adapter_modules|adapters?)(\.|$)"
)
"""What stands between the name of a matrix and the names of the parameters that adapt it (PEFT,
X-MOD).
"""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
INNER = frozenset({"linear", "base_layer", "original_module", "modules_to_save"})
"""Components around, and at the end of, a name that a wrapper adds."""

CUTS: dict[str, dict[str, str]] = {
    "head": {"query": "head", "key": "head", "attention_gate": "head"},
    # Zhang et al., Adam-mini (arXiv 2406.16793), section 2: the smallest dense sub-blocks of the
    # Hessian.
    "neuron": {
        "query": "head",
        "key": "head",
        "attention_gate": "head",
        "value": "neuron",
        "attention_output": "neuron",
        "mlp_in": "neuron",
        "mlp_gate": "neuron",
        "mlp_out": "neuron",
        "token": "token",
    },
}
"""``by`` -> kind -> the unit that matrices of the kind are cut into; ``token`` are those of TOKENS.

Absent: whole.
"""

LAYERS = (
    "layers.#.blocks.#",  # Swin: stages of blocks
    "layers.encoder_layer_#",
    "denseblock#.denselayer#",
    "albert_layer_groups.#.albert_layers.#",
    "stages.#.#",
    "stage#.#",
    "layer#.#",
    "block.#.#",  # PVT and Funnel: stages of layers
    "blocks.#.#",
    "h.#",
    "layers.#",
    "layer.#",
    "decoder_layers.#",
    "encoder_layers.#",
    "blocks.#",
    "block.#",
    "resblocks.#",
    "self_attends.#",
    "cross_attends.#",
    "albert_layers.#",
    "features.#",
)
"""Containers of layers: the first on a parameter's path is its layer; of several there, the first
in this table.
"""

BESIDE = ("attentions", "encoder_attn", "layer_norm1", "ffns", "layer_norm15", "layer_norm2")
"""XLM keeps the parts of its layers in lists side by side: the first stands for the layer."""

NO_LAYERS = re.compile(
    r"(^|\.)(embeddings|embedder|patch_embed\w*|downsampl\w*|subsampl\w*|feature_extractor|"
    r"to_patch_embedding|"
    r"patch_embedding|conv_layers|projector|projection_head|head|classifier|connector|neck)\."
)
"""Numbered parts within these are not layers (patch embeddings and downsampling between stages)."""

_NUMBERED = "|".join(re.escape(c).replace(r"\#", r"\d+") for c in LAYERS)
_LAYER = re.compile(rf"(?:^|\.)(?:{_NUMBERED})(?=\.)")
_BESIDE = re.compile(rf"(?:^|\.)(?:{'|'.join(BESIDE)})\.\d+(?=\.)")
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
Names = Mapping[str, Sequence[str]]
"""Kind -> endings, as in ENDINGS: what a user teaches."""


@dataclass(frozen=True)
class Role:
    """What a parameter does: its kind, the kind of the matrix beside it if it is a bias, and what
    its rows are.
    """

    kind: str
    # for a bias the kind of its weight, for an adapter that of the matrix it adapts, else the kind
    matrix: str
    ending: str  # of ENDINGS; "" if none matched
    axis: int  # that counts the outputs


def role(name: str, owner: nn.Module, names: Names | None = None) -> Role:
    """The role of parameter ``name``, a direct parameter of the module ``owner``.

    Args:
        name: As ``named_parameters()`` gives it.
        owner: The module that holds it; its class tells norms, convolutions and embeddings.
        names: Endings of one's own, kind -> endings as in ENDINGS; they come before those of
            ENDINGS.
    """
    adapter = ADAPTERS.search(name)
    path, last = _path(name[: adapter.start()] if adapter else name)
    kind, ending = _matched(path, _frozen(names))
    matrix = kind or _default(path, owner)
    if isinstance(owner, _CONVOLUTIONS) and matrix not in ("embedding", "head") and not adapter:
        matrix = "conv"
    # transformers' Conv1D is a linear layer that stores [in, out].
    axis = 1 if type(owner).__name__ == "Conv1D" and last == "weight" else 0
    return Role("adapter" if adapter else _kind(last, matrix, owner), matrix, ending, axis)


def _path(name: str) -> tuple[str, str]:
    """The module's path without wrappers, or the parameter's where it is no weight or bias, and
    what comes last.
    """
    name = re.sub(r"\.parametrizations\.(\w+)\.original\d?", r".\1", "." + name)[1:]
    name = re.sub(r"\.(weight|bias)_(g|v|orig)$", r".\1", name)
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    last = parts[-1]
    if last in ("weight", "bias"):
        parts.pop()
        while len(parts) > 1 and parts[-1] in INNER and not _known(parts):
            parts.pop()
    return ".".join(parts), last


def _known(parts: Sequence[str]) -> bool:
    return ".".join(parts[-2:]) in _KIND_OF


def _default(path: str, owner: nn.Module) -> str:
    """The kind of what no ending knows."""
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.RNNBase):
        return "mixer"
    contexts = {context for part in path.split(".") for context in _contexts(part)}
    return next((c[1:] for c in ("@router", "@mixer", "@head") if c in contexts), "other")


def _kind(last: str, matrix: str, owner: nn.Module) -> str:
    if "Norm" in type(owner).__name__:
        return "norm"
    return "bias" if last == "bias" or (last.endswith("_bias") and matrix != "position") else matrix


def _frozen(names: Names | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((kind, tuple(endings)) for kind, endings in (names or {}).items())


@lru_cache(maxsize=100_000)
def _matched(path: str, names: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str | None, str]:
    """Kind and the longest ending of ``path`` in the user's table, else in ENDINGS; None and "" if
    there is none.
    """
    *front, last = path.split(".")
    parts = [*(re.sub(r"\d+", "#", part) for part in front), last]
    own = {ending: kind for kind, endings in names for ending in endings}
    for table in (own, _KIND_OF):
        if table and "^" + path in table:
            return table["^" + path], "^" + path
        longest = _LONGEST if table is _KIND_OF else _longest(table)
        for length in range(min(longest, len(parts)), 0, -1):
            for ending in _spellings(parts, len(parts) - length):
                if ending in table:
                    return table[ending], ending
    return None, ""


def _spellings(parts: Sequence[str], start: int) -> list[str]:
    """The ending from ``start`` on as it stands, and with the context of its first component that
    has no number.
    """
    rest = parts[start + 1 :]
    named = next((part for part in reversed(parts[: start + 1]) if part != "#"), "")
    contexts = _contexts(named) if rest else []
    return [".".join(parts[start:]), *(".".join([context, *rest]) for context in contexts)]


@lru_cache(maxsize=10_000)
def _contexts(part: str) -> list[str]:
    """The contexts that a component of a path stands for, those that decide first."""
    part = part.lower()
    return [
        context
        for context, words in CONTEXTS.items()
        if any(word in part or word == "=" + part for word in words)
        and not (context == "@attention" and "linear" in part)
        and not (context == "@head" and ("attention" in part or "attn" in part))
    ]


def _longest(table: Iterable[str]) -> int:
    """Components of the longest ending."""
    return max((ending.count(".") + 1 for ending in table), default=0)


_KIND_OF = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
_LONGEST = _longest(_KIND_OF)


def layer_prefix(name: str) -> str | None:
    """The path of the layer that parameter ``name`` lies in (``transformer.h.0``); None outside the
    layers.
    """
    beside = _BESIDE.search(name)
    found = _LAYER.search(name)
    if beside and not (found and found.start() < beside.start()):
        return name[: beside.end()]
    outside = NO_LAYERS.search(name)
    if found is None or (outside and outside.start() < found.end()):
        return None
    return name[: found.end()]


def layer_key(prefix: str) -> str:
    """The same for the prefixes of one layer whose parts stand in several lists."""
    return re.sub(rf"(^|\.)(?:{'|'.join(BESIDE)})\.(\d+)$", rf"\1{BESIDE[0]}.\2", prefix)


def unit(by: str, matrix: str, tokens: bool) -> str | None:
    """What ``by`` cuts a matrix of this kind into: head, neuron, token, or None: nothing."""
    return CUTS.get(by, {}).get("token" if tokens else matrix)
