"""
Does training stop at the edge of stability?
============================================

Gradient descent of a fixed learning rate drives the largest eigenvalue up to 2 / lr, and then
stays there (arXiv 2103.00065).
"""

import torch
from torch import nn

import blockspec
from blockspec.figures.tracking import tracked_eigenvalues

torch.manual_seed(0)
x, y = torch.randn(64, 8), torch.randn(64, 3)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
objective = blockspec.Objective(model, [(x, y)], blockspec.losses.regression)

# %%
# Two eigenvalues are followed at every 20th step: a few products each, since a measurement starts
# from the one before.

lr = 0.08
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
tracker = blockspec.track(objective, k=2, every=20)
for step in range(1500):
    (model(x) - y).square().sum(1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    tracker(step + 1)

# %%
# The dashed line is the edge.

course = tracked_eigenvalues(tracker.table, {f"2/lr = {2 / lr:g}": 2 / lr})
