"""Tiny models of many architectures, kinks among them: ReLU, max pooling, float32 norms, routing to
experts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import torch
import transformers
from torch import Tensor, nn

from blockspec import Objective, losses

WORDS, CLASSES = 32, 3
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 32),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    "vocab_size": WORDS, "head_dim": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_size": 16, "patch_size": 8, "num_labels": CLASSES, "num_channels": 3, "embedding_size": 16, "rotary_dim": 4,
    "word_embed_proj_dim": 16, "state_size": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "window_size": 4,
    "max_source_positions": 32, "max_target_positions": 32,
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    **{name: {} for name in (
        "GPT2", "Llama", "Mistral", "Gemma", "Gemma2", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe", "Qwen2Moe", "Phi", "Phi3",
        "OPT", "Bloom", "Falcon", "GPTNeoX", "GPTJ", "CodeGen", "Mpt", "StableLm", "Olmo", "Olmo2", "Olmoe", "Cohere",
        "Starcoder2", "GPTBigCode", "Granite", "Nemotron", "Persimmon", "XGLM", "BioGpt", "CTRL", "Glm", "Helium",
        "Ernie4_5", "SmolLM3", "Mamba", "GptOss", "Cohere2", "Arcee",
    )},
    "DeepseekV3": {"num_key_value_heads": 4},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 24},
    "Mamba2": {"num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 8},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {
    **{name: {} for name in (
        "Bert", "Roberta", "Albert", "Electra", "DistilBert", "MPNet", "FNet", "RoFormer", "SqueezeBert", "ModernBert",
        "ConvBert", "Nystromformer", "Ernie", "XLMRoberta", "Camembert", "Deberta", "DebertaV2",
    )},
}  # fmt: skip
IMAGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("ViT", "DeiT", "Beit", "Dinov2", "ViTMSN", "Data2VecVision")},
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
    "Swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 2},
    "ConvNext": {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "image_size": 64, "patch_size": 4, "num_stages": 4},
    "ConvNextV2": {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "image_size": 64, "patch_size": 4, "num_stages": 4},
    "ResNet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1], "layer_type": "basic"},
    "RegNet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "groups_width": 2},
    "MobileNetV1": {"image_size": 32, "depth_multiplier": 0.25},
    "MobileNetV2": {"image_size": 32, "depth_multiplier": 0.25},
    "PoolFormer": {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "image_size": 64, "patch_size": 16},
    "Segformer": {"hidden_sizes": [4, 6, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2], "image_size": 64},
    "FocalNet": {
        "embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16], "patch_size": 2, "focal_levels": [1, 1],
        "focal_windows": [3, 3],
    },
    "Bit": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_groups": 2},
}  # fmt: skip
SOUND = {
    "conv_dim": (4, 4), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 4, "squeeze_factor": 2,
    "num_hidden_layers": 1,
}  # fmt: skip
AUDIO: dict[str, dict[str, Any]] = {
    name: SOUND for name in ("Wav2Vec2", "Hubert", "WavLM", "SEW", "UniSpeech")
}


def config_of(name: str, own: dict[str, Any]) -> Any:
    kind = getattr(transformers, f"{name}Config")
    aliases = {key for key, other in kind.attribute_map.items() if other in own}
    known = {*inspect.signature(kind).parameters, *kind.attribute_map, *own, "num_labels"} - aliases
    return kind(**{key: value for key, value in {**SIZES, **own}.items() if key in known})


def model_of(name: str, ending: str, own: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(transformers, name + ending)(config_of(name, own)).to(dtype)
        for p in model.parameters():  # away from initialisation, where whole parts do nothing
            p.data += 0.05 * torch.randn(p.shape).to(p)
    return model


def tokens(shape: tuple[int, ...] = (2, 8), seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def causal(name: str, dtype: torch.dtype) -> Objective:
    ending = "LMHeadModel" if name in ("GPT2", "CTRL") else "ForCausalLM"
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    return Objective(model_of(name, ending, CAUSAL[name], dtype), [batch], losses.next_token)


def masked(name: str, dtype: torch.dtype) -> Objective:
    labels = tokens().masked_fill(torch.arange(8) % 3 > 0, -100)
    model = model_of(name, "ForMaskedLM", MASKED[name], dtype)
    return Objective(model, [{"input_ids": tokens(seed=1), "labels": labels}], losses.masked_token)


def images(name: str, dtype: torch.dtype) -> Objective:
    model = model_of(name, "ForImageClassification", IMAGES[name], dtype)
    side = IMAGES[name].get("image_size", 16)
    return Objective(
        model, [(numbers(2, 3, side, side), torch.tensor([0, 2]))], losses.classification
    )


def audio(name: str, dtype: torch.dtype) -> Objective:
    model = model_of(name, "ForSequenceClassification", AUDIO[name], dtype)
    return Objective(model, [(numbers(2, 64), torch.tensor([0, 2]))], losses.classification)


def t5(dtype: torch.dtype) -> Objective:
    model = model_of(
        "T5",
        "ForConditionalGeneration",
        {"d_kv": 4, "d_ff": 24, "decoder_start_token_id": 0},
        dtype,
    )
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1), "labels": tokens(seed=2)}
    return Objective(model, [batch], losses.masked_token)


def bart(dtype: torch.dtype) -> Objective:
    model = model_of("Bart", "ForConditionalGeneration", {}, dtype)
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1), "labels": tokens(seed=2)}
    return Objective(model, [batch], losses.masked_token)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.cells, self.head = (
            nn.Embedding(WORDS, 8),
            kind(8, 8, batch_first=True),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(x))[0][:, -1])


class Routed(nn.Module):
    """A mixture of experts of which each token takes the best one, and an activation with kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.router = nn.Embedding(WORDS, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        share, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.stack([expert(x) for expert in self.experts], -2)
        out = out.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, 8)).squeeze(-2)
        return self.head((x + share[..., None] * out).mean(1))


def zeroed() -> nn.Module:
    """ReLUs and a pooling that stand exactly on their kinks: biases of zero, black pixels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Hardtanh(),
        nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    for layer in (model[0], model[3]):
        nn.init.zeros_(layer.bias)
    return model


def own(build: Callable[[], nn.Module], x: Tensor) -> Callable[[torch.dtype], Objective]:
    def make(dtype: torch.dtype) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build().to(dtype)
        return Objective(model, [(x, torch.arange(len(x)) % CLASSES)], losses.classification)

    return make


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(WORDS, 8), inner, nn.Flatten(), nn.Linear(64, CLASSES))


def mlp(*activations: nn.Module) -> nn.Module:
    layers = [layer for a in activations for layer in (nn.Linear(8, 8), a)]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def wide() -> nn.Module:
    """50,688 ReLUs in each layer: far more pass zero on the way of a large step than can be left
    out of account.
    """
    return nn.Sequential(
        nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )


BLACK = numbers(3, 3, 8, 8).clamp(min=0) * (torch.arange(8) > 3)
SMOOTH = [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.Mish()]
KINKED = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.ReLU6(),
    nn.Hardswish(),
    nn.PReLU(),
    nn.Softshrink(),
    nn.ELU(),
]
OWN: dict[str, Callable[[torch.dtype], Objective]] = {
    "LSTM": own(lambda: Recurrent(nn.LSTM), tokens((3, 8))),
    "GRU": own(lambda: Recurrent(nn.GRU), tokens((3, 8))),
    "experts, one of four": own(Routed, tokens((3, 8))),
    "kinks at zero": own(zeroed, BLACK),
    "TransformerEncoder": own(encoder, tokens((3, 8))),
    "smooth activations": own(lambda: mlp(*SMOOTH), numbers(9, 8)),
    "activations with kinks": own(lambda: mlp(*KINKED), numbers(9, 8)),
    "wide ReLU": own(wide, numbers(99, 8)),
    "AlexNet": own(models.alexnet, numbers(3, 1, 8, 8)),
    "SqueezeNet": own(models.squeezenet, numbers(3, 1, 16, 16)),
    "DenseNet": own(models.densenet, numbers(3, 1, 8, 8)),
    "VGG": own(models.tiny_vgg, numbers(3, 3, 8, 8)),
    "timm ViT": own(models.timm_vit, numbers(3, 3, 8, 8)),
    "T5": t5,
    "Bart": bart,
}  # fmt: skip


def zoo() -> dict[str, Callable[[torch.dtype], Objective]]:
    """Name -> objective of a dtype."""
    families = ((causal, CAUSAL), (masked, MASKED), (images, IMAGES), (audio, AUDIO))
    return {name: partial(make, name) for make, names in families for name in names} | OWN
