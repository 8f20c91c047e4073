"""
What does the next step of an optimizer do?
===========================================

How much each block gains by the step that AdamW would take, and how the blocks help or hinder each
other.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.toolbox import directional_waterfall
from blockspec.toolbox import directions

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double()
batches = [{"input_ids": torch.randint(64, (8, 16))}]
objective = blockspec.Objective(model, batches, blockspec.losses.next_token)

# %%
# Nothing is changed: the step is computed, not taken.

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
step = directions.next_step(optimizer, objective)

# %%
# The loss's change, as the quadratic model predicts it and as it is.

found = blockspec.directional(objective, blockspec.partition(model, by="layer"), step)
print(f"predicted {found.predicted.value:.4f}, measured {found.measured.value:.4f}")
waterfall = directional_waterfall(found)
