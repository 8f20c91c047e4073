"""Spectra from nanoGPT's training loop: ``python examples/nanogpt_loop.py`` (half a minute on one
core).

The model and the loop are nanoGPT's, shortened; the text is the reference manual that comes with
Python, as bytes. The three lines that measure are marked. ``blockspec plot`` and ``blockspec show``
read what they leave.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import CLI
from torch import Tensor, nn

from blockspec import Objective, losses, partition
from blockspec.integrations import record


@dataclass
class GPTConfig:
    block_size: int = 32
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32
    dropout: float = 0.1
    bias: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout = config.n_head, config.n_embd, config.dropout
        self.flash = True

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)
            for part in self.c_attn(x).split(self.n_embd, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True
        )  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    transformer: Any

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                scale = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=0.02 / scale)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        places = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(places))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(
            logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
        )


TEXT = torch.frombuffer(
    bytearray("".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8
).long()
DATA = {"train": TEXT[: 9 * len(TEXT) // 10], "val": TEXT[9 * len(TEXT) // 10 :]}


def get_batch(
    split: str, *, batch_size: int, block_size: int, device: str
) -> tuple[Tensor, Tensor]:
    data = DATA[split]
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix])
    return x.to(device), y.to(device)


def main(
    out: Path | None = Path("runs/nanogpt_loop"),
    *,
    max_iters: int = 200,
    measured: tuple[int, ...] = (0, 20, 100, 200),
    num_steps: int = 20,
    batch_size: int = 16,
    gradient_accumulation_steps: int = 2,
    learning_rate: float = 3e-3,
    grad_clip: float = 1.0,
    compile: bool = False,
    seed: int = 1337,
) -> list[float]:
    """Trains; returns the losses.

    Args:
        out: The folder of the spectra; null measures nothing.
        max_iters: Updates.
        measured: Updates after which to measure.
        num_steps: Lanczos steps of a measurement.
        batch_size: Windows in a micro-batch.
        gradient_accumulation_steps: Micro-batches in an update.
        learning_rate: Of AdamW.
        grad_clip: Norm that gradients are clipped to.
        compile: Train the compiled model.
        seed: Of everything.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ctx = (
        torch.amp.autocast(device_type=device, dtype=torch.bfloat16)
        if device == "cuda"
        else nullcontext()
    )
    config = GPTConfig()
    model: Any = GPT(config).to(device)
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "block_size": config.block_size,
        "device": device,
    }
    held_out = [get_batch("val", **sizes) for _ in range(2)]
    objective, blocks = (
        Objective(model, held_out, losses.next_token),
        partition(model, exclude="*.ln_*"),
    )  # 1: before compile
    if compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )

    history = []
    X, Y = get_batch("train", **sizes)
    for iter_num in range(max_iters + 1):
        if out is not None and iter_num in measured:  # 2
            print(
                record(out, iter_num, objective, blocks, num_probes=2, num_steps=num_steps)[
                    "spectrum/js0"
                ]
            )  # 3
        if iter_num == max_iters:
            break
        for _ in range(gradient_accumulation_steps):
            with ctx:
                _, loss = model(X, Y)
                loss = loss / gradient_accumulation_steps
            X, Y = get_batch("train", **sizes)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss.item() * gradient_accumulation_steps)
    return history


if __name__ == "__main__":
    CLI(main)
