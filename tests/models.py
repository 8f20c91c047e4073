"""Tiny models of every family for the tests: real classes of transformers, stand-ins for nanoGPT,
timm, torchvision.

All take ``seed`` and ``dtype``; dropout is on in training mode as in each family's own default.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCABULARY = 32


def _made(build: Callable[[], nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(dtype)


def tiny_gpt2(
    seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2, **settings: object
) -> nn.Module:
    """GPT2LMHeadModel, its head tied to the embedding."""
    sizes = {"n_embd": 16, "n_layer": layers, "n_head": 4, "n_positions": 16}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**sizes, **tokens, **settings})
    return _made(lambda: transformers.GPT2LMHeadModel(config), seed, dtype)


def tiny_llama(
    seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2, **settings: object
) -> nn.Module:
    """LlamaForCausalLM: 4 query heads, 2 key heads."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "max_position_embeddings": 16,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**{**sizes, **heads, **settings})
    return _made(lambda: transformers.LlamaForCausalLM(config), seed, dtype)


def tiny_bert(
    seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2, **settings: object
) -> nn.Module:
    """BertForMaskedLM, its decoder tied to the embedding."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    config = transformers.BertConfig(**{**sizes, **tokens, **settings})
    return _made(lambda: transformers.BertForMaskedLM(config), seed, dtype)


def tiny_vit(
    seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2, **settings: object
) -> nn.Module:
    """ViTForImageClassification on images (3, 8, 8) with 4 patches and 5 classes."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    images = {"image_size": 8, "patch_size": 4, "num_labels": 5}
    config = transformers.ViTConfig(**{**sizes, **images, **settings})
    return _made(lambda: transformers.ViTForImageClassification(config), seed, dtype)


def tiny_resnet(seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    """ResNetForImageClassification: stages of 2 and 1 layers, 5 classes."""
    sizes = {
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [2, 1],
        "layer_type": "basic",
        "num_labels": 5,
    }
    config = transformers.ResNetConfig(**{**sizes, **settings})
    return _made(lambda: transformers.ResNetForImageClassification(config), seed, dtype)


def nanogpt(
    flash: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2
) -> nn.Module:
    """nanoGPT's GPT: ``model(idx, targets) -> (logits, loss)``."""
    config = GPTConfig(block_size=16, vocab_size=VOCABULARY, n_layer=layers, n_head=4, n_embd=16)
    return _made(lambda: GPT(config, flash), seed, dtype)


def timm_vit(seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2) -> nn.Module:
    """timm's VisionTransformer on images (3, 8, 8) with 4 patches and 5 classes."""
    return _made(lambda: VisionTransformer(8, 4, 16, layers, 4, 5), seed, dtype)


def tiny_vgg(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """torchvision's VGG without batch norm, on images (3, 8, 8), 5 classes."""
    return _made(lambda: VGG([4, "M", 8, 8, "M"], 16, 5), seed, dtype)


def alexnet(classes: int = 3) -> nn.Module:
    """torchvision's AlexNet, names and in-place ReLUs as there, for images (1, 8, 8)."""
    features = [
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    features += [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True)]
    classifier = [
        nn.Dropout(),
        nn.Linear(12, 4),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4, classes),
    ]
    parts = {
        "features": nn.Sequential(*features),
        "avgpool": nn.AdaptiveAvgPool2d(2),
        "flatten": nn.Flatten(),
    }
    return nn.Sequential(OrderedDict(parts, classifier=nn.Sequential(*classifier)))


def squeezenet(classes: int = 3) -> nn.Module:
    """torchvision's SqueezeNet with one fire module, for images of one channel."""
    features = [
        nn.Conv2d(1, 3, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Fire(3, 2, 2),
    ]
    classifier = [
        nn.Dropout(),
        nn.Conv2d(4, classes, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(
        OrderedDict(features=nn.Sequential(*features), classifier=nn.Sequential(*classifier))
    )


class Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def densenet(classes: int = 3) -> nn.Module:
    """torchvision's DenseNet with one block of two layers, for images of one channel."""
    block = nn.Sequential(OrderedDict(denselayer1=DenseLayer(2, 2), denselayer2=DenseLayer(4, 2)))
    transition = nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(6), relu=nn.ReLU(inplace=True), conv=nn.Conv2d(6, 3, 1, bias=False)
        )
    )
    stem = OrderedDict(
        conv0=nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False), norm0=nn.BatchNorm2d(2)
    )
    features = nn.Sequential(
        OrderedDict(stem, denseblock1=block, transition1=transition, norm5=nn.BatchNorm2d(3))
    )
    parts = {"features": features, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, classifier=nn.Linear(3, classes)))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(self.relu1(self.norm1(x)))], 1)


# nanoGPT, model.py (Andrej Karpathy, MIT): names, shapes and forward pass as there.


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self.flash = flash
        if not self.flash:
            mask = torch.tril(torch.ones(config.block_size, config.block_size))
            self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPTMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class GPTBlock(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, flash)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = GPTMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([GPTBlock(config, flash) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        position = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


# timm, models/vision_transformer.py: names, shapes and forward pass of vit_base_patch16_224.


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(
        self, image: int, patch: int, width: int, depth: int, num_heads: int, classes: int
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.Sequential(*[ViTBlock(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# torchvision, models/vgg.py: names and forward pass.


class VGG(nn.Module):
    def __init__(self, plan: list[int | str], hidden: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in plan:
            if isinstance(step, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [
                    nn.Conv2d(channels, step, kernel_size=3, padding=1),
                    nn.ReLU(inplace=True),
                ]
                channels = step
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, hidden),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
