"""Lanczos and its kin; knows nothing of models."""
