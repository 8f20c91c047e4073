"""
Is the Hessian of a small network block diagonal?
=================================================

The exhibit of "Why Transformers Need Adam" (arXiv 2402.16788, figure 2): a perceptron of eight
neurons, whose Hessian can be seen entry by entry.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import blockspec
from blockspec.figures.plots import full_and_block_diagonal
from blockspec.figures.toolbox import hessian_blocks

torch.manual_seed(0)
digits = load_digits()
pixels = torch.tensor(digits.data[:500] / 16)
odd = torch.tensor(digits.target[:500] % 2)
model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)).double()
objective = blockspec.Objective(model, [(pixels, odd)], blockspec.losses.classification)
(whole,) = blockspec.partition(model, "model")


def matrix():
    return blockspec.dense(objective, whole)


# %%
# Its 528 x 528 entries before and after training.

pictures = {"at the start": matrix()}
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    nn.functional.cross_entropy(model(pixels), odd).backward()
    optimizer.step()
    optimizer.zero_grad()
pictures["after 100 steps"] = matrix()
entries = hessian_blocks(pictures)

# %%
# How much of its squared norm lies between neurons? A neuron is a row of a weight.

neuron = torch.cat(
    [torch.arange(8).repeat_interleave(64), 8 + torch.arange(2).repeat_interleave(8)]
)
between = (neuron[:, None] != neuron).numpy()
for name, picture in pictures.items():
    print(f"{name}: {(picture[between] ** 2).sum() / (picture**2).sum():.0%} between neurons")

# %%
# The spectrum of the full matrix, and the one that it would have if it were block diagonal.

blocks = (*blockspec.partition(model, by="tensor"), whole)
spectra = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=30)
full = full_and_block_diagonal(spectra)
