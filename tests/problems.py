"""Small problems with a known truth: a model, batches, its loss, and the same loss written anew for
the oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import dense_truth
import models
import torch
import torch.nn.functional as F

from blockspec import Objective, losses

VOCABULARY = 12


@dataclass(frozen=True)
class Problem:
    """logits(call, batch) -> (N, C) and labels(batch) -> (N,): one row per loss term, written
    without blockspec.
    """

    model: torch.nn.Module
    batches: list[Any]
    loss: losses.Loss
    logits: Callable[..., torch.Tensor]
    labels: Callable[..., torch.Tensor]

    def terms(self, call, batch):
        return F.cross_entropy(self.logits(call, batch), self.labels(batch), reduction="none")

    def objective(self, **settings):
        return Objective(self.model, self.batches, self.loss, **settings)

    def update(self, optimizer):
        """One step of a training, on the first batch."""
        total, terms = self.loss(self.model, self.batches[0])
        (total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()


def roughened(model, *, size=0.2, seed=0):
    """Parameters far from initialisation, where whole blocks have hardly any curvature and norms
    are the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return model


def tokens(*shape, seed=0):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _padded():
    """Two batches of unequal size; the first has padding on the right, the second labels that are
    left out.
    """
    first = {
        "input_ids": tokens(2, 6),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    }
    second = {"input_ids": tokens(1, 5, seed=1), "labels": tokens(1, 5, seed=1)}
    second["labels"][0, 2] = -100
    return [first, second]


def _counted(batch):
    """(B, T - 1) which next tokens count."""
    if "labels" in batch:
        return batch["labels"][:, 1:] != -100
    return batch["attention_mask"][:, 1:] == 1


def _next_logits(call, batch):
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return call(**given).logits[:, :-1][_counted(batch)]


def _next_labels(batch):
    return batch["input_ids"][:, 1:][_counted(batch)]


def causal(model):
    return Problem(roughened(model), _padded(), losses.next_token, _next_logits, _next_labels)


def gpt2(**settings):
    small = {"n_embd": 8, "n_head": 2, "n_positions": 6, "vocab_size": VOCABULARY, "layers": 1}
    return causal(models.tiny_gpt2(**small | settings))


def llama(**settings):
    small = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layers": 1,
    }
    model = models.tiny_llama(**small | {"vocab_size": VOCABULARY} | settings)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(_rms_norm, module)
    return causal(model)


def _rms_norm(norm, x):
    """Without the original's cast to float32, which would leave a float64 truth good to 1e-6
    only.
    """
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def nanogpt(*, flash=True, dropout=0.0):
    config = models.GPTConfig(6, VOCABULARY, n_layer=1, n_head=2, n_embd=8, dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = roughened(models.GPT(config, flash).double())
    batches = [
        (tokens(2, 6, seed=2), tokens(2, 6, seed=3)),
        (tokens(1, 4, seed=4), tokens(1, 4, seed=5)),
    ]
    batches[0][1][1, 3:] = -1
    logits = lambda call, batch: call(*batch)[0][batch[1] != -1]  # noqa: E731
    return Problem(
        model, batches, losses.next_token, logits, lambda batch: batch[1][batch[1] != -1]
    )


def bert():
    small = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "max_position_embeddings": 6,
    }
    model = models.tiny_bert(layers=1, vocab_size=VOCABULARY, **small)
    labels = tokens(2, 6, seed=7)
    labels[:, ::2] = -100
    batches = [{"input_ids": tokens(2, 6, seed=6), "labels": labels}]
    logits = lambda call, batch: call(input_ids=batch["input_ids"]).logits[batch["labels"] != -100]  # noqa: E731
    return Problem(
        roughened(model),
        batches,
        losses.masked_token,
        logits,
        lambda batch: batch["labels"][batch["labels"] != -100],
    )


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(
        count
    ) % 5


def _classifier(model, output=lambda out: out.logits):
    batches = [_images(3, 0), _images(2, 1)]
    return Problem(
        roughened(model),
        batches,
        losses.classification,
        lambda call, b: output(call(b[0])),
        lambda batch: batch[1],
    )


def vit():
    return _classifier(
        models.tiny_vit(layers=1, hidden_size=8, intermediate_size=12, num_attention_heads=2)
    )


def timm_vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.VisionTransformer(
            image=8, patch=4, width=8, depth=1, num_heads=2, classes=5
        ).double()
    return _classifier(model, lambda out: out)


def resnet():
    return _classifier(models.tiny_resnet(embedding_size=3, hidden_sizes=[3, 6]))


PROBLEMS = {
    "gpt2": gpt2,
    "nanogpt": nanogpt,
    "llama": llama,
    "vit": vit,
    "resnet": resnet,
    "bert": bert,
    "timm": timm_vit,
}


@cache
def problem(name):
    return PROBLEMS[name]()


@cache
def truth(name, curvature="hessian"):
    """(P, P) the dense matrix."""
    it = problem(name)
    if curvature == "hessian":
        return dense_truth.dense_hessian(it.model, it.batches, it.terms)
    if curvature == "fisher":
        return dense_truth.dense_fisher(it.model, it.batches, it.terms)
    return dense_truth.dense_ggn_of_cross_entropy(it.model, it.batches, it.logits)
