"""Spectra from anybody's training: for ``transformers.Trainer``, and for a loop of one's own."""

from .recording import record as record
from .trainer import SpectrumCallback as SpectrumCallback
