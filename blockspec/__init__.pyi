"""The public names, each with the module that defines it.

``__init__.py`` imports a name when it is first used.
"""

from blockspec import losses as losses
from blockspec.engine.estimate import estimate_spectra as estimate_spectra
from blockspec.model.blocks import partition as partition
from blockspec.model.objective import Objective as Objective
from blockspec.model.pieces import Block as Block
from blockspec.numerics.probes import draw_probe as draw_probe
from blockspec.numerics.progress import progress_bar as progress_bar
from blockspec.products.operators import FunctionOperator as FunctionOperator
from blockspec.products.operators import Operator as Operator
from blockspec.products.preconditioning.operator import Preconditioned as Preconditioned
from blockspec.products.preconditioning.preconditioner import Preconditioner as Preconditioner
from blockspec.products.preconditioning.stability import Threshold as Threshold
from blockspec.products.preconditioning.stability import (
    stability_thresholds as stability_thresholds,
)
from blockspec.runs.loading import Run as Run
from blockspec.runs.loading import load_run as load_run
from blockspec.spectra.collection import Spectra as Spectra
from blockspec.spectra.collection import block_diagonal as block_diagonal
from blockspec.spectra.collection import load_spectra as load_spectra
from blockspec.spectra.estimates import Estimates as Estimates
from blockspec.spectra.heterogeneity import js0 as js0
from blockspec.spectra.heterogeneity import js_distances as js_distances
from blockspec.spectra.spectrum import Estimate as Estimate
from blockspec.spectra.spectrum import RitzValue as RitzValue
from blockspec.spectra.spectrum import Spectrum as Spectrum
from blockspec.toolbox.couplings import Coupling as Coupling
from blockspec.toolbox.couplings import coupling as coupling
from blockspec.toolbox.diagonals import Diagonal as Diagonal
from blockspec.toolbox.diagonals import diagonal as diagonal
from blockspec.toolbox.directional import Directional as Directional
from blockspec.toolbox.directional import directional as directional
from blockspec.toolbox.directional import directionals as directionals
from blockspec.toolbox.eigenpairs import Eigenpairs as Eigenpairs
from blockspec.toolbox.eigenpairs import top_eigenpairs as top_eigenpairs
from blockspec.toolbox.landscapes import Landscape as Landscape
from blockspec.toolbox.landscapes import landscape as landscape
from blockspec.toolbox.matrices import dense as dense
from blockspec.toolbox.norms import norms as norms
from blockspec.toolbox.norms import squared_norms as squared_norms
from blockspec.toolbox.traces import trace as trace
from blockspec.toolbox.tracking import Tracker as Tracker
from blockspec.toolbox.tracking import track as track

__version__: str
