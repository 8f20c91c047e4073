"""Spectra from anybody's training: for ``transformers.Trainer``, and for a loop of one's own."""

from blockspec.integrations.recording import record as record
from blockspec.integrations.trainer import SpectrumCallback as SpectrumCallback
