"""Blockwise Hessian spectra of transformers."""

from . import losses as losses
from .blocks import Block as Block
from .blocks import partition as partition
from .estimate import estimate_spectra as estimate_spectra
from .heterogeneity import js0 as js0
from .heterogeneity import js_distances as js_distances
from .objective import Objective as Objective
from .probes import draw_probe as draw_probe
from .spectra import Estimate as Estimate
from .spectra import RitzValue as RitzValue
from .spectra import Spectra as Spectra
from .spectra import Spectrum as Spectrum
from .spectra import block_diagonal as block_diagonal
from .spectra import load_spectra as load_spectra

__version__ = "0.1.0"
