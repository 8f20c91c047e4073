"""Blockwise Hessian spectra of transformers."""

from . import losses as losses
from .blocks import Block as Block
from .blocks import partition as partition
from .couplings import Coupling as Coupling
from .couplings import coupling as coupling
from .diagonals import Diagonal as Diagonal
from .diagonals import diagonal as diagonal
from .eigenpairs import Eigenpairs as Eigenpairs
from .eigenpairs import top_eigenpairs as top_eigenpairs
from .estimate import estimate_spectra as estimate_spectra
from .estimates import Estimates as Estimates
from .heterogeneity import js0 as js0
from .heterogeneity import js_distances as js_distances
from .landscapes import Landscape as Landscape
from .landscapes import landscape as landscape
from .matrices import dense as dense
from .norms import norms as norms
from .norms import squared_norms as squared_norms
from .objective import Objective as Objective
from .probes import draw_probe as draw_probe
from .progress import progress_bar as progress_bar
from .spectra import Estimate as Estimate
from .spectra import RitzValue as RitzValue
from .spectra import Spectra as Spectra
from .spectra import Spectrum as Spectrum
from .spectra import block_diagonal as block_diagonal
from .spectra import load_spectra as load_spectra
from .traces import trace as trace

__version__ = "0.1.0"
