"""Spectra from anybody's training: for ``transformers.Trainer``, and for a loop of one's own."""

from typing import TYPE_CHECKING, Any

from blockspec.integrations.recording import record as record

if TYPE_CHECKING:
    from blockspec.integrations.trainer import SpectrumCallback as SpectrumCallback


def __getattr__(name: str) -> Any:
    if name == "SpectrumCallback":  # imported when it is asked for: Trainer takes seconds to import
        from blockspec.integrations.trainer import SpectrumCallback

        return SpectrumCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
