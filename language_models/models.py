"""Fresh models from settings: GPT-2 and BERT of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from training.checkpoints import read_record


@dataclass(frozen=True)
class ModelSettings:
    """The shape of a model.

    Args:
        architecture: gpt2 (predicts the next token) or bert (predicts masked tokens).
        num_layers: Transformer layers.
        num_heads: Attention heads of each layer.
        width: Width of the residual stream; a multiple of num_heads.
        vocabulary: Size of the vocabulary; None takes the data's.
        bias: Whether linear layers and norms have biases; without, they are held at 0 and not
            trained.
        dropout: Share of activations dropped in training.
        tied: Whether the token embedding is the output layer too.
    """

    architecture: Literal["gpt2", "bert"] = "gpt2"
    num_layers: int = 2
    num_heads: int = 4
    width: int = 64
    vocabulary: int | None = None
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True


def _gpt2(
    settings: ModelSettings, vocabulary: int, window: int, end_token: int | None
) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocabulary,
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
    return GPT2LMHeadModel(config)


def _bert(
    settings: ModelSettings, vocabulary: int, window: int, end_token: int | None
) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=vocabulary,
        max_position_embeddings=window,
        hidden_size=settings.width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        tie_word_embeddings=settings.tied,
        eos_token_id=end_token,
        # windows are full; BERT's default, token 0, would have an embedding that is not trained
        pad_token_id=None,
    )
    return BertForMaskedLM(config)


BUILDERS: Mapping[str, Callable[[ModelSettings, int, int, int | None], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "bert": _bert,
}


def build(
    settings: ModelSettings, *, vocabulary: int, window: int, end_token: int | None
) -> PreTrainedModel:
    """A model with fresh weights, drawn from torch's global generator.

    Args:
        settings: Its shape.
        vocabulary: Size of the data's vocabulary.
        window: Longest sequence.
        end_token: The token between documents, if there is one.
    """
    if settings.width % settings.num_heads:
        raise ValueError(
            f"width is {settings.width}; it must be a multiple of num_heads, {settings.num_heads}"
        )
    size = settings.vocabulary or vocabulary
    if size < vocabulary:
        raise ValueError(
            f"the model's vocabulary is {size}, the data's is {vocabulary}: set model.vocabulary "
            "to it or more"
        )
    model = BUILDERS[settings.architecture](settings, size, window, end_token)
    if not settings.bias:
        freeze_biases(model)
    return model


def freeze_biases(model: nn.Module) -> None:
    """Makes the model the one without biases: they are 0 and no parameters that are trained or
    measured.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)


def trained_record(checkpoint: str, architecture: str) -> dict[str, Any]:
    """What ``language_models.train`` wrote beside a checkpoint of that architecture."""
    record = read_record(checkpoint)
    found = record["model"].get("architecture")
    if found != architecture:
        raise ValueError(
            f"{checkpoint} is a {found}, not a {architecture}: take the factory of its own kind"
        )
    return record
