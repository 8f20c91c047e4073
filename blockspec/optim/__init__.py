"""Optimizers that use curvature."""

from blockspec.optim.adahessian import AdaHessian as AdaHessian
