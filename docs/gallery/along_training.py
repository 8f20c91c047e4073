"""
How do blocks change in training?
=================================

The spectra of a small GPT-2 before and after 60 steps of AdamW on one sentence.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.plots import distance_heatmaps, tails_by_block, tails_of_full

torch.manual_seed(0)
sizes = {"vocab_size": 128, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
text = b"the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4
batch = {"input_ids": torch.tensor(list(text[:256])).view(16, 16)}
objective = blockspec.Objective(model, [batch], blockspec.losses.next_token)
blocks = blockspec.partition(model, exclude="*bias*") + blockspec.partition(model, "model")


def measure():
    return blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=25)


# %%
# Measure, train, measure.

before = measure()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
after = measure()
print(f"loss after training: {loss.item():.2f}")

# %%
# Before training, query and key have eigenvalues that are far smaller than those of the rest.

first = tails_by_block(before.parts)

# %%
# Training brings them closer.

last = tails_by_block(after.parts)

# %%
# One number for each pair of blocks, and their mean.

distances = distance_heatmaps(
    {name: blockspec.js_distances(s.parts) for name, s in (("before", before), ("after", after))}
)
print(blockspec.js0(before.parts), blockspec.js0(after.parts))

# %%
# The full Hessian, and what it would be if it were block diagonal.

full = tails_of_full({0: before, 60: after})
