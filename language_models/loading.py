"""Loading Hugging Face models: safetensors only, no code from the checkpoint, one clear line when it fails."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load_pretrained(
    name: str, kind: Literal["causal", "masked"], *, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal or masked language model by hub name or folder, in eval mode."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(DTYPES)}")
    model = KINDS[kind].from_pretrained(
        name, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.eval()
