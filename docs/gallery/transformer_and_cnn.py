"""
Are the blocks of a transformer less alike than those of a CNN?
===============================================================

The exhibit of "Why Transformers Need Adam" (arXiv 2402.16788, figures 3 and 4), on two models that
train in a second.
"""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.plots import distance_heatmaps, esd_by_block

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
transformer = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
cnn = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
    *(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
)
tokens = torch.randint(64, (16, 16))
images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
objectives = {
    "GPT-2": blockspec.Objective(transformer, [{"input_ids": tokens}], blockspec.losses.next_token),
    "CNN": blockspec.Objective(cnn, [(images, labels)], blockspec.losses.classification),
}

# %%
# Both learn their data by heart a little, so that what is seen is not the noise of the beginning.

for objective in objectives.values():
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=3e-3)
    for _ in range(20):
        for name, gradient in objective.gradient().items():
            objective.parameters()[name].grad = gradient
        optimizer.step()

# %%
# Weight matrices and kernels are the blocks.

blocks = {
    "GPT-2": blockspec.partition(transformer, exclude=["*bias*", "*ln_*", "*wpe*"]),
    "CNN": blockspec.partition(cnn, exclude="*bias*"),
}
spectra = {
    name: blockspec.estimate_spectra(objective, blocks[name], num_probes=2, num_steps=20)
    for name, objective in objectives.items()
}
of_transformer = esd_by_block(spectra["GPT-2"])

# %%
# The blocks of the CNN.

of_cnn = esd_by_block(spectra["CNN"])

# %%
# One number for each pair of blocks. Their mean is the heterogeneity of the model.

distances = distance_heatmaps(
    {name: blockspec.js_distances(found) for name, found in spectra.items()}
)
for name, found in spectra.items():
    mean = blockspec.js0(found)
    print(f"{name}: {mean.value:.3f} ± {mean.stderr:.3f} nats")
