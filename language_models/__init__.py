"""Data, training and models of language; nothing here computes curvature."""
