"""What is minimised in the tests of AdaHessian, the steps written out in numpy, and ways to take a step."""

import torch
from torch import nn

WAYS = ("backward", "probe", "create_graph")


def descend(optimizer, loss, way):
    optimizer.zero_grad()
    if way == "backward":
        optimizer.backward(loss)
    elif way == "probe":
        optimizer.probe(loss).backward()
    else:
        loss.backward(create_graph=True)
    optimizer.step()


def diagonal(optimizer, parameter):
    return optimizer.state[parameter]["hessian_diag_sq"].sqrt()


def bowl(point, coupling=0.0):
    x, y = point
    return x**2 + 5 * y**2 + coupling * x * y


def mlp(seed=0, samples=12):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return (
        model,
        torch.randn(samples, 4, dtype=torch.float64),
        torch.randn(samples, 2, dtype=torch.float64),
    )


def squared_error(model, x, y):
    return (model(x) - y).square().mean()
