"""Small networks that optimizers have trained, and their Hessian in full."""

import torch
from torch import nn

from blockspec import Objective, losses
from blockspec.optim import AdaHessian

LR = 0.01


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(number=0, size=12):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def loss_of(model, number=0):
    x, y = batch(number)
    return nn.functional.cross_entropy(model(x), y)


def step(model, optimizers, number):
    for one in optimizers:
        one.zero_grad()
    loss = loss_of(model, number)
    if isinstance(optimizers[0], AdaHessian):
        optimizers[0].backward(loss)
    else:
        loss.backward()
    for one in optimizers:
        one.step()


def trained(make, steps=3):
    """A model after some steps, its optimizer, and the last step that each parameter took."""
    model = net()
    optimizer = make(model)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for number in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, optimizers, number)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return model, optimizer, moved


def corrected(state, group):
    """Adam's momentum, with its bias corrected."""
    return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))


def nadam(state, group):
    """torch's NAdam adds the gradient and the momentum, each with a factor of its own."""
    at, beta, decay = float(state["step"]), group["betas"][0], group["momentum_decay"]
    now, then = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (at, at + 1))
    product = float(state["mu_product"])
    gradient = (state["exp_avg"] - beta * state["before"]) / (1 - beta)
    return gradient * (1 - now) / (1 - product) + state["exp_avg"] * then / (1 - product * then)


def gradient(state, group):
    return state["gradient"]


DIAGONAL = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), LR), gradient),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), LR, eps=1e-3), corrected),
    "Adam amsgrad": (lambda m: torch.optim.Adam(m.parameters(), LR, amsgrad=True), None),
    "AdamW": (lambda m: torch.optim.AdamW(m.parameters(), LR, weight_decay=0.0), corrected),
    "NAdam": (lambda m: torch.optim.NAdam(m.parameters(), LR), nadam),
    "Adamax": (lambda m: torch.optim.Adamax(m.parameters(), LR, eps=1e-3), corrected),
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters(), LR, eps=1e-2), gradient),
    "RMSprop centered": (
        lambda m: torch.optim.RMSprop(m.parameters(), LR, centered=True),
        gradient,
    ),
    "Adagrad": (lambda m: torch.optim.Adagrad(m.parameters(), LR, eps=1e-3), gradient),
    "AdaHessian": (lambda m: AdaHessian(m.parameters(), LR, hessian_power=0.7), corrected),
}


def momenta(name, model, optimizer):
    """What P^-1 is multiplied with in the last step, from its gradients and state alone."""
    of = DIAGONAL[name][1] or corrected
    again = trained(DIAGONAL[name][0], steps=2)[1]
    found = {}
    for group, earlier in zip(optimizer.param_groups, again.param_groups, strict=True):
        for (n, p), q in zip(model.named_parameters(), earlier["params"], strict=True):
            state = dict(optimizer.state[p]) | {"gradient": p.grad}
            state["before"] = again.state[q].get("exp_avg")
            found[n] = of(state, group)
    return found


def muon_and_adamw(model, **settings):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, LR, **settings),
        torch.optim.AdamW(vectors, LR, weight_decay=0.0),
    ]


def objective(model):
    return Objective(model, [batch()], losses.classification)


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), LR, **settings)
