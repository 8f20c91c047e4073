"""Tiny models of the architectures of transformers, from their own default configs with small
numbers put in.

``build(name)`` makes the model of a model type, ``inputs(model)`` a batch of one example that it
    takes.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

WORDS = {
    32: """hidden_size d_model n_embd dim embed_dim width encoder_embed_dim decoder_embed_dim emb_dim
        word_embed_proj_dim embedding_size decoder_hidden_size hidden_dim projection_dim d_latents
        cross_attention_hidden_size""",
    48: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dim_feedforward
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size d_inner
        ffn_hidden_size decoder_intermediate_size dim_ff dff""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads nhead
        decoder_attention_heads decoder_num_attention_heads num_query_heads num_experts
        num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks
        num_decoder_layers num_encoder_layers depth num_key_value_heads num_kv_heads n_head_kv
        num_experts_per_tok type_vocab_size eos_token_id""",
    64: """max_position_embeddings n_positions max_sequence_length n_ctx max_source_positions
        max_target_positions""",
    8: "head_dim qk_nope_head_dim v_head_dim d_kv patch_size dim_head",
    1: "n_group topk_group bos_token_id decoder_start_token_id",
    0: "pad_token_id",
    5: "num_labels",
    12: "q_lora_rank kv_lora_rank qk_head_dim",
    16: "num_mel_bins",
    96: "vocab_size",
}
SMALL = {name: number for number, names in WORDS.items() for name in names.split()} | {
    "image_size": 32
}
"""Number in a config -> what it is made."""

MIXED = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_next": MIXED | DELTA,
    "qwen3_5_text": MIXED | DELTA,
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon": {"new_decoder_architecture": True},
    "minimax": MIXED | {"block_size": 16},
}
"""What a model type needs beside."""

LARGE = frozenset(
    {
        *("blt", "vibevoice_asr", "efficientnet", "luke", "roc_bert", "cvt", "regnet", "bit"),
        *("textnet", "hgnet_v2", "resnet", "cpmant", "phi4_multimodal", "qwen3_asr", "got_ocr2"),
        *("kimi_linear", "falcon_h1", "perceiver", "nemotron_h"),
    }
)
"""Model types that stay large or slow, whatever their numbers."""

TABLES = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_CTC_MAPPING_NAMES,
)


def _small(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    fixed = [n for n in SMALL if isinstance(getattr(type(config), n, None), property)]
    numbers = {name: getattr(config, name, None) for name in SMALL if name not in fixed}
    return {n: SMALL[n] for n, value in numbers.items() if type(value) is int} | own


def build(name: str) -> nn.Module:
    """The model of a model type, with weights large enough that nothing is flat."""
    named = next(table[name] for table in TABLES if name in table)
    kind = getattr(transformers, named if isinstance(named, str) else named[0])
    config = kind.config_class()
    small = _small(config, OWN.get(name, {}))
    for part in getattr(type(config), "sub_configs", {}):
        inner = getattr(config, part, None)
        if hasattr(inner, "to_dict"):
            small[part] = type(inner)(**_small(inner, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(kind.config_class(**small))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(model: Any) -> dict[str, Tensor]:
    """A batch of one example."""
    random = torch.Generator().manual_seed(1)
    config, name = model.config, model.main_input_name
    tokens = torch.randint(5, 90, (1, 12), generator=random)
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        sizes = (1, getattr(config, "num_channels", 3), size, size)
        batch = {name: torch.randn(sizes, generator=random)}
    elif name == "input_features":
        sizes = (1, getattr(config, "num_mel_bins", 16), 128)
        batch = {name: torch.randn(sizes, generator=random)}
    elif name == "input_values":
        batch = {name: torch.randn((1, 2000), generator=random)}
    else:
        batch = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens[:, :9]
    return batch
