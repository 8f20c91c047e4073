"""Spectra from anybody's training: for ``transformers.Trainer``, for Lightning, and for a loop of
one's own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockspec.integrations.measuring import TrackSettings as TrackSettings
from blockspec.integrations.recording import record as record

if TYPE_CHECKING:
    from blockspec.integrations.lightning import (
        LightningSpectrumCallback as LightningSpectrumCallback,
    )
    from blockspec.integrations.trainer import SpectrumCallback as SpectrumCallback

HOMES = {"SpectrumCallback": "trainer", "LightningSpectrumCallback": "lightning"}
"""What is imported when it is asked for: the trainers take seconds to import, and may be absent."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
