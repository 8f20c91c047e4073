"""Transformers in the styles of other people's code, with names that tell nothing: what is known is
found by watching.

Every class has its layers in ``parts``; ``TRUTH`` says what each parameter of a layer is.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE, VOCABULARY = 16, 4, 4, 24


class Fused(nn.Module):
    """Attention from one matrix ``a``; ``order`` says how its rows are split into query, key and
    value.
    """

    def __init__(self, order: str, keys: int = HEADS, kernel: str = "sdpa") -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, (HEADS + 2 * keys) * SIZE, bias=order == "thirds")
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.order, self.keys_, self.kernel = order, keys, kernel

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        rows = self.a(x)
        if self.order == "thirds":  # nanoGPT, litgpt: all queries, all keys, all values
            parts = rows.split([HEADS * SIZE, self.keys_ * SIZE, self.keys_ * SIZE], dim=-1)
            return tuple(p.view(B, T, -1, SIZE).transpose(1, 2) for p in parts)
        if self.order == "heads":  # TinyViT, GPT-NeoX: query, key and value of each head
            return rows.view(B, T, HEADS, 3 * SIZE).transpose(1, 2).split(SIZE, dim=-1)
        share = HEADS // self.keys_  # litgpt before 0.5, Falcon: by group
        rows = rows.view(B, T, self.keys_, share + 2, SIZE).permute(0, 2, 3, 1, 4)
        query, key, value = rows.split([share, 1, 1], dim=2)
        return query.reshape(B, HEADS, T, SIZE), key[:, :, 0], value[:, :, 0]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        repeats = HEADS // key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = torch.einsum("b h i d, b h j d -> b h i j", query, key) / math.sqrt(SIZE)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -1e4).softmax(dim=-1)
            y = torch.einsum("b h i j, b h j d -> b h i d", weights, value)
        return self.b(y.transpose(1, 2).flatten(2))


class Apart(nn.Module):
    """Attention as x-transformers writes it: a matrix of its own for queries, a fused one for keys
    and values.
    """

    def __init__(self, keys: int = HEADS, gate: bool = False) -> None:
        super().__init__()
        self.m1 = nn.Linear(WIDTH, HEADS * SIZE * (2 if gate else 1), bias=False)
        self.m2 = nn.Linear(WIDTH, 2 * keys * SIZE, bias=False)
        self.m3 = nn.Linear(HEADS * SIZE, WIDTH)
        self.keys_, self.gate = keys, gate

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        query = self.m1(x)
        if self.gate:  # Qwen3-Next: head by head, the query and its output gate
            query, gate = query.view(B, T, HEADS, 2 * SIZE).chunk(2, dim=-1)
        query = query.reshape(B, T, HEADS, SIZE)
        key, value = self.m2(x).view(B, T, 2, self.keys_, SIZE).unbind(2)
        if self.keys_ == 1:  # multi-query: no axis of heads
            scores = torch.einsum("bihd,bjd->bhij", query, key[:, :, 0]) * SIZE**-0.5
            y = torch.einsum("bhij,bjd->bihd", scores.softmax(-1), value[:, :, 0])
        else:
            scores = torch.einsum("bihd,bjhd->bhij", query, key) * SIZE**-0.5
            y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)
        if self.gate:
            y = y * gate.sigmoid()
        return self.m3(y.reshape(B, T, -1))


class Wide(nn.Module):
    """An MLP: ``act`` is ``relu2`` (ReLU squared), ``gelu``, ``swiglu`` (two matrices) or ``fused``
    (gate in the same).
    """

    def __init__(self, act: str) -> None:
        super().__init__()
        self.u = nn.Linear(WIDTH, 24 * (2 if act in ("fused", "twisted") else 1), bias=False)
        self.g = nn.Linear(WIDTH, 24, bias=False) if act == "swiglu" else None
        self.d = nn.Linear(24, WIDTH)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.act == "fused":  # value first, gate second
            value, gate = self.u(x).chunk(2, dim=-1)
            return self.d(value * F.gelu(gate))
        if self.act == "twisted":  # gate and value take turns
            gate, value = self.u(x)[..., ::2], self.u(x)[..., 1::2]
            return self.d(F.silu(gate) * value)
        if self.act == "swiglu":
            return self.d(F.silu(self.g(x)) * self.u(x))
        return self.d(F.relu(self.u(x)).square() if self.act == "relu2" else F.gelu(self.u(x)))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, parallel: bool = False) -> None:
        super().__init__()
        self.p, self.q = attention, mlp
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.p(self.n1(x)) + self.q(self.n1(x))
        x = x + self.p(self.n1(x))
        return x + self.q(self.n2(x))


class Model(nn.Module):
    """Tokens to logits; the head may be stored as (in, out)."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, parallel: bool = False) -> None:
        super().__init__()
        self.t = nn.Embedding(VOCABULARY, WIDTH)
        self.s = nn.Parameter(0.1 * torch.randn(1, 32, WIDTH))
        self.parts = nn.ModuleList([Layer(attention, mlp, parallel)])
        self.z = nn.Parameter(0.1 * torch.randn(WIDTH, VOCABULARY))

    def forward(self, x: Tensor) -> Tensor:
        y = self.t(x) + self.s[:, : x.shape[1]]
        for part in self.parts:
            y = part(y)
        return y @ self.z


@dataclass(frozen=True)
class Style:
    attention: object
    mlp: str
    truth: dict[str, str]  # below ``parts.0``
    heads: tuple[int, int]  # of queries and keys
    parallel: bool = False


def _a(**kinds: str) -> dict[str, str]:
    return {name.replace("_", ".") + ".weight": kind for name, kind in kinds.items()}


_FUSED = _a(p_a="qkv", p_b="attention_output")
_APART = _a(p_m1="query", p_m2="qkv", p_m3="attention_output")
_PLAIN = _a(q_u="mlp_in", q_d="mlp_out")
_GATED = _a(q_u="mlp_in", q_g="mlp_gate", q_d="mlp_out")

STYLES = {
    "nanogpt": Style(lambda: Fused("thirds"), "gelu", _FUSED | _PLAIN, (4, 4)),
    "mingpt": Style(lambda: Fused("thirds", kernel="einsum"), "gelu", _FUSED | _PLAIN, (4, 4)),
    "litgpt": Style(lambda: Fused("thirds", 2), "swiglu", _FUSED | _GATED, (4, 2)),
    "litgpt_grouped": Style(lambda: Fused("groups", 2), "swiglu", _FUSED | _GATED, (4, 2)),
    "tinyvit": Style(lambda: Fused("heads"), "gelu", _FUSED | _PLAIN, (4, 4)),
    "neox": Style(lambda: Fused("heads", kernel="einsum"), "gelu", _FUSED | _PLAIN, (4, 4), True),
    "x_transformers": Style(lambda: Apart(), "relu2", _APART | _PLAIN, (4, 4)),
    "multi_query": Style(lambda: Apart(1), "fused", _APART | _PLAIN, (4, 1)),
    "gated": Style(lambda: Apart(gate=True), "twisted", _APART | _PLAIN, (4, 4)),
}


def build(style: Style) -> Model:
    """The model, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(style.attention(), Wide(style.mlp), style.parallel).double()
