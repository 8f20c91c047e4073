"""Optimizers that use curvature."""

from blockspec.optim.adahessian import AdaHessian as AdaHessian
from blockspec.optim.measurement import keep_freed_memory as keep_freed_memory
