"""
Do the heads of a layer differ?
===============================

Query and key are cut by attention head, and each head is a block of its own.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures.plots import quantiles_by_block, tails_by_block

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double()
batches = [{"input_ids": torch.randint(64, (8, 16))}]
objective = blockspec.Objective(model, batches, blockspec.losses.next_token)

# %%
# 20 blocks: four heads of query and of key, and what is not cut, in each layer.

blocks = blockspec.partition(model, by="head", include="*.h.*c_*weight*")
spectra = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=20)

# %%
# A row a block: below which magnitude a share of its eigenvalues lies.

quantiles = quantiles_by_block(spectra)

# %%
# The same as curves: how many eigenvalues are beyond x. Heads of one matrix have one colour.

tails = tails_by_block(spectra)
