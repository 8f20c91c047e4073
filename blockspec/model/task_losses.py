"""Losses of other tasks than language models and classes: pairs of sequences, speech, answers,
pixels, contrasts.

All of them compute the terms from what the model predicts, as :mod:`blockspec.model.losses` does,
and have second
derivatives: PyTorch's own CTC loss has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockspec.model.losses import (
    IGNORED,
    Loss,
    _cross_entropies,
    _first_tensor,
    _forward,
    _targets,
)

PIXEL_IGNORED = 255  # what data sets and transformers leave out of segmentations


def _with_labels(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model makes its decoder's inputs from the labels, as in training."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(
            "a batch of sequences to sequences is a mapping with 'labels' (and 'input_ids' or "
            "another "
            "input of the encoder); this one is "
            f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}"
        )
    return _first_tensor(model(**batch).logits)


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    left_out = ("start_positions", "end_positions")
    output = model(**{name: value for name, value in batch.items() if name not in left_out})
    return torch.stack([output.start_logits, output.end_logits], dim=1)  # (B, 2, T)


def _answer_terms(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    places = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1).clamp(min=0)
    return _cross_entropies(logits, places.masked_fill(places >= logits.shape[-1], IGNORED))


def _pixel_terms(logits: Tensor, batch: Any) -> Tensor:
    labels = _targets(batch)
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    labels = labels.masked_fill(labels == PIXEL_IGNORED, IGNORED)
    return _cross_entropies(logits.movedim(1, -1), labels)


def _multi_label_terms(logits: Tensor, batch: Any) -> Tensor:
    labels = _targets(batch).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").reshape(-1)


def _similarities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    return output.logits_per_image if hasattr(output, "logits_per_image") else _first_tensor(output)


def _contrast_terms(logits: Tensor, batch: Any) -> Tensor:
    own = torch.arange(len(logits), device=logits.device)
    return (_cross_entropies(logits, own) + _cross_entropies(logits.T, own)) / 2


def _sigmoid_contrast_terms(logits: Tensor, batch: Any) -> Tensor:
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum(-1)


def _frames(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits (B, T, C + 1); the last column is 1 where a frame is of the recording, 0 where it is
    padding.
    """
    logits = _forward(model, batch)
    mask = batch.get("attention_mask")
    lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
    if mask is not None:
        counts = mask.sum(-1).to(torch.long)
        convert = getattr(model, "_get_feat_extract_output_lengths", None)
        lengths = counts if convert is None else convert(counts)
    inside = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    return torch.cat([logits, inside[..., None].to(logits)], dim=-1)


def ctc(blank: int = 0) -> Loss:
    """Connectionist temporal classification, one term per recording: minus the log probability of
    its labels.

    Args:
        blank: The class of the blank; Hugging Face's models have it at ``config.pad_token_id``.

    Returns:
        A loss of mappings with ``labels`` (B, L), -100 or another negative number where there is
        none. Terms are sums over a recording, as Hugging Face's ``ctc_loss_reduction="sum"``.
    """

    def terms(frames: Tensor, batch: Any) -> Tensor:
        logits, inside = frames[..., :-1], frames[..., -1] > 0
        return _ctc(logits.log_softmax(-1), inside, _targets(batch), blank)

    return Loss(_frames, terms)


def _ctc(scores: Tensor, inside: Tensor, labels: Tensor, blank: int) -> Tensor:
    """Graves et al. (2006), equations 6 to 8, in logarithms; (B, T, C) scores, (B, T) frames that
    count -> (B,).
    """
    counts = (labels >= 0).sum(1)
    states = labels.new_full((len(labels), 2 * labels.shape[1] + 1), blank)
    states[:, 1::2] = labels.clamp(min=0)
    repeated = F.pad(states[:, 2:] == states[:, :-2], (2, 0), value=True)
    skipping = (states != blank) & ~repeated  # a label may follow another one without a blank
    emitted = scores.gather(2, states[:, None].expand(-1, scores.shape[1], -1))  # (B, T, S)
    low = -1e30  # finite: the gradient of logsumexp at minus infinity is not a number
    places = torch.arange(states.shape[1], device=states.device)
    alpha = emitted[:, 0].masked_fill(places > 1, low)
    for time in range(1, scores.shape[1]):
        before = [alpha, F.pad(alpha[:, :-1], (1, 0), value=low)]
        before += [F.pad(alpha[:, :-2], (2, 0), value=low).masked_fill(~skipping, low)]
        stepped = torch.stack(before).logsumexp(0) + emitted[:, time]
        alpha = torch.where(inside[:, time, None], stepped, alpha)
    ends = torch.stack([2 * counts, (2 * counts - 1).clamp(min=0)], dim=1)
    last = alpha.gather(1, ends)
    last = torch.stack([last[:, 0], last[:, 1].masked_fill(counts == 0, low)], dim=1)
    return -last.logsumexp(1)


def model_loss(
    num_terms: Callable[[Any], float],
) -> Callable[[nn.Module, Any], tuple[Tensor, float]]:
    """The loss that a model returns itself, for anything with ``.loss``.

    A mean of means is not a mean: the number of terms that the model averaged over has to be told,
    or batches of unequal numbers weigh wrongly. The curvatures ``ggn`` and ``fisher`` need a
    :class:`Loss` instead.

    Args:
        num_terms: ``batch -> number of terms`` that the model's loss is the mean of:
            ``lambda batch: len(batch["labels"])``.
    """

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
        mean = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if mean is None:
            raise ValueError(
                f"{type(model).__name__} returned no loss; give the batch its labels, or use a "
                "loss of "
                "blockspec.losses that is computed from the logits"
            )
        count = num_terms(batch)
        return mean * count, count

    return loss


sequence_to_sequence = Loss(
    _with_labels, lambda logits, batch: _cross_entropies(logits, _targets(batch))
)
"""Cross entropy of an encoder-decoder's tokens: a mapping with ``labels`` as a Trainer gives it
(BART, T5, Whisper). The model makes the decoder's inputs from the labels; -100 is left out.
"""

question_answering = Loss(_answers, _answer_terms)
"""Cross entropy of an answer's start and end, two terms per example: a mapping with
``start_positions``, ``end_positions``.
"""

segmentation = Loss(_forward, _pixel_terms)
"""Cross entropy of each pixel's class, logits enlarged to the labels (B, H, W); 255 and -100 are
left out.
"""

multi_label = Loss(_forward, _multi_label_terms)
"""Binary cross entropy, one term per example and label: ``labels`` (B, C) of zeros and ones."""

contrastive = Loss(_similarities, _contrast_terms)
"""CLIP: cross entropy of each pair among all pairs of the batch, both ways; one term per pair.

Batches must stay whole.
"""

sigmoid_contrastive = Loss(_similarities, _sigmoid_contrast_terms)
"""SigLIP: every pair of the batch is a yes or a no; one term per image. Batches must stay whole."""
