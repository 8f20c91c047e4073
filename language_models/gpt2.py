"""GPT-2: models of any size, and the factories that give ``(model, batches, loss)`` to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from blockspec.losses import Loss, next_token
from language_models.batches import Batch, causal_batch, spread_windows, to_device
from language_models.loading import load_pretrained
from language_models.tokens import open_tokens
from training.checkpoints import read_record


@dataclass(frozen=True)
class ModelSettings:
    """The size of a model.

    Args:
        architecture: gpt2 (next token) or bert (masked tokens).
        num_layers: Transformer layers.
        num_heads: Attention heads of each layer.
        width: Width of the residual stream; a multiple of num_heads.
        vocabulary: Size of the vocabulary; None takes the data's.
        bias: Whether linear layers and norms have biases; without, they are held at 0 and not trained.
        dropout: Share of activations dropped in training.
        tied: Whether the token embedding is the output layer too.
    """

    architecture: str = "gpt2"
    num_layers: int = 2
    num_heads: int = 4
    width: int = 64
    vocabulary: int | None = None
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True


def build(settings: ModelSettings, *, vocabulary: int, window: int, end_token: int) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights, drawn from torch's global generator."""
    if settings.width % settings.num_heads:
        raise ValueError(f"width {settings.width} is no multiple of num_heads {settings.num_heads}")
    config = GPT2Config(
        vocab_size=settings.vocabulary or vocabulary,
        n_positions=window,
        n_embd=settings.width,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        tie_word_embeddings=settings.tied,
        bos_token_id=end_token,
        eos_token_id=end_token,
        use_cache=False,  # keys and values of past tokens: of no use in training
    )
    model = GPT2LMHeadModel(config)
    if not settings.bias:
        freeze_biases(model)
    return model


def freeze_biases(model: nn.Module) -> None:
    """Makes the model the one without biases: they are 0, and no parameters of it."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)


def held_out(
    data: str, *, num_batches: int, batch_size: int, num_tokens: int, vocabulary: int | None = None, split: str = "val"
) -> list[Batch]:
    """Fixed batches of held-out windows, spread evenly over the split."""
    tokens = open_tokens(data, split, window=num_tokens, vocabulary=vocabulary)
    windows = spread_windows(tokens, num_batches=num_batches, batch_size=batch_size, window=num_tokens)
    return [causal_batch(batch) for batch in windows]


def checkpoint(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "val",
    num_batches: int = 4,
    batch_size: int = 4,
    num_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[nn.Module, list[Batch], Loss]:
    """A checkpoint of ``language_models.train``, with held-out windows of the data that it was trained on.

    Args:
        checkpoint: Folder of the checkpoint, such as runs/tiny/step_000300.
        data: embedded, or a folder with train.bin and val.bin; None takes the data of the training.
        split: val or train.
        num_batches: Number of batches.
        batch_size: Windows in a batch.
        num_tokens: Tokens in a window; None takes the window of the training.
        dtype: float32, float64 or bfloat16.
        device: cpu, cuda, cuda:1 ...

    Returns:
        The model, the batches and the loss: the mean cross entropy of the next token.
    """
    record = read_record(Path(checkpoint))
    trained_on = record["data"]
    model = load_pretrained(checkpoint, "causal", dtype=dtype)
    if not record["model"]["bias"]:
        freeze_biases(model)
    batches = held_out(
        data or trained_on["source"],
        num_batches=num_batches,
        batch_size=batch_size,
        num_tokens=num_tokens or trained_on["num_tokens"],
        vocabulary=model.config.vocab_size,
        split=split,
    )
    return model.to(device), to_device(batches, device), next_token
