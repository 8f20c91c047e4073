"""The model, its batches and blocks, made differentiable twice."""
