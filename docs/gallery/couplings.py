"""
Which blocks of a transformer are coupled?
==========================================

How large the Hessian is between each two blocks, beside how large it is within them. A few random
probes tell it, without the matrix.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.toolbox import coupling_heatmap

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
batches = [{"input_ids": torch.randint(64, (8, 16))}]
objective = blockspec.Objective(model, batches, blockspec.losses.next_token)

# %%
# Sixteen probes, each a product of the full matrix.

blocks = blockspec.partition(model, include="*weight*", exclude=["*ln_*", "*wpe*"])
found = blockspec.coupling(objective, blocks, num_probes=16)
share = found.off_diagonal_share
print(f"{share.value:.3f} ± {share.stderr:.3f} of the squared norm lies between blocks")
matrices = coupling_heatmap(found)

# %%
# The same between layers: squared norms add up.


def layer_of(block):
    return "outside the layers" if block.layer is None else f"layer {block.layer}"


layers = coupling_heatmap(found.grouped(layer_of))
