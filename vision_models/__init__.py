"""Vision models, their data, training and settings; nothing here computes curvature."""
