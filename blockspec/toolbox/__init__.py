"""Traces, diagonals, eigenpairs, couplings, norms, matrices, landscapes."""
