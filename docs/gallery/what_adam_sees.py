"""
Does Adam make the blocks alike?
================================

The curvature of the loss, and the one that AdamW sees: its second moments divide the steps, and so
they divide the Hessian from both sides.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.plots import distance_heatmaps, edges_by_block

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
tokens = torch.randint(64, (16, 16))
objective = blockspec.Objective(model, [{"input_ids": tokens}], blockspec.losses.next_token)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(30):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %%
# The same blocks and probes, without and with the preconditioner.

blocks = blockspec.partition(model, include="*.h.*weight*", exclude="*ln_*")
P = blockspec.Preconditioner.from_optimizer(optimizer, model)
plain = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=20)
seen = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=20, precondition=P)

# %%
# Of the loss: the blocks lie apart.

of_loss = edges_by_block(plain)

# %%
# As AdamW sees it. The dashed line is where its step becomes unstable.

limits = {limit.label: limit.value for limit in blockspec.stability_thresholds(optimizer)}
of_adam = edges_by_block(seen, thresholds=limits)

# %%
# The mean distance between two blocks says it in one number.

print("Hessian:", blockspec.js0(plain))
print("as AdamW sees it:", blockspec.js0(seen))
maps = distance_heatmaps(
    {"Hessian": blockspec.js_distances(plain), "AdamW": blockspec.js_distances(seen)}
)
