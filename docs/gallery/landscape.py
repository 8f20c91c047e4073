"""
How does the loss look along its sharpest directions?
=====================================================

The landscapes of PyHessian (arXiv 1912.07145): the loss in the plane of the two top eigenvectors,
of a deep network without and with residual connections.
"""

import torch
from torch import nn

import blockspec
from blockspec.figures.toolbox import landscape_surface

torch.manual_seed(0)
x, y = torch.randn(128, 8), torch.randint(3, (128,))


class Layer(nn.Module):
    def __init__(self, residual):
        super().__init__()
        self.residual, self.linear = residual, nn.Linear(16, 16)

    def forward(self, x):
        return torch.tanh(self.linear(x)) + (x if self.residual else 0)


def trained(residual):
    layers = [Layer(residual) for _ in range(8)]
    model = nn.Sequential(nn.Linear(8, 16), *layers, nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def seen(model):
    objective = blockspec.Objective(model, [(x, y)], blockspec.losses.classification)
    (whole,) = blockspec.partition(model, "model")
    return landscape_surface(blockspec.landscape(objective, whole, points=15))


# %%
# Eight layers of tanh, one behind the other.

plain = seen(trained(residual=False))

# %%
# The same with residual connections.

residual = seen(trained(residual=True))
