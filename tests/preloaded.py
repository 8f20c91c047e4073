"""What the server of :mod:`launching` imports once, for all processes that it forks."""

import accelerate  # noqa: F401
import pandas  # noqa: F401
import pytest  # noqa: F401
from transformers import BertForMaskedLM, GPT2LMHeadModel, Trainer  # noqa: F401

import blockspec
import blockspec.integrations.trainer

for name in blockspec.__all__:
    getattr(blockspec, name)
