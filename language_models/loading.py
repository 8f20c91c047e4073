"""Loading Hugging Face models by name or folder: nothing in them is run, and what fails gives one
line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

from training.hub import hub_or_cache

KINDS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}


def load_pretrained(
    name: str, kind: Literal["causal", "masked"], *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal or masked language model in float32 and eval mode.

    Args:
        name: Name on the hub, or a folder.
        kind: causal or masked.
        trust_remote_code: Whether code that comes with the model may run. Weights never are code:
            they are read from safetensors, or from a pickle that is refused if it holds more than
            tensors.

    Raises:
        ValueError: it cannot be read, or does not hold every weight of the model.
    """
    options = {
        "trust_remote_code": trust_remote_code,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    with _as_one_line(name), quiet_transformers():
        model, report = _from_pretrained(KINDS[kind], name, dtype=torch.float32, **options)
    if kind == "causal" and any("MaskedLM" in cls for cls in model.config.architectures or ()):
        raise ValueError(
            f"{name} is a masked language model, which sees the tokens that a causal one predicts"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} tensors of its {kind} model, such as {missing[0]}"
        )
    mismatched = sorted(report["mismatched_keys"])  # (name, shape in the file, shape in the model)
    if mismatched:
        tensor, found, wanted = mismatched[0]
        raise ValueError(
            f"{name} has {len(mismatched)} tensors of other shapes than its config.json says, such "
            f"as {tensor}: "
            f"{tuple(found)}, not {tuple(wanted)}"
        )
    return model.eval()


def _from_pretrained(auto: Any, name: str, **options: Any) -> Any:
    if Path(name).is_dir():
        return auto.from_pretrained(name, local_files_only=True, **options)
    with hub_or_cache():
        return auto.from_pretrained(name, **options)


@contextmanager
def _as_one_line(name: str) -> Iterator[None]:
    """Loaders of many formats raise many kinds of errors, over many lines."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load {name}: {first or type(error).__name__}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without tables of tensors and bars of progress; the loader checks for itself what the tables
    would say.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
