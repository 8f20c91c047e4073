"""Nodes and weights -> densities, distances, errors."""
