"""The curvature that an optimizer sees: its state as a matrix P, and P^(-1/2) H P^(-1/2)."""
