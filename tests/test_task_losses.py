"""Losses of other tasks, against the models' own."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from blockspec import losses
from blockspec.model.task_losses import _ctc
from blockspec.runs.hugging_face import _task

SIZES = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1}


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SIZES, **sizes, **heads)
    )


def t5():
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 40,
    }
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("build", [bart, t5])
def test_encoders_with_decoders_as_a_trainer_feeds_them(build):
    torch.manual_seed(0)
    model = build().eval()
    labels = torch.randint(2, 40, (2, 6))
    labels[0, 4:] = -100
    batch = {"input_ids": torch.randint(2, 40, (2, 9)), "labels": labels}
    total, count = losses.sequence_to_sequence(model, batch)
    assert count == 10
    torch.testing.assert_close(total / count, model(**batch).loss)
    with pytest.raises(ValueError, match="Use losses"):
        losses.next_token(model, batch)


def test_ctc_is_pytorch_s_and_has_a_second_derivative():
    torch.manual_seed(0)
    scores = torch.randn(3, 9, 5, dtype=torch.float64).log_softmax(-1).requires_grad_()
    labels = torch.tensor([[1, 1, 3], [2, 4, -100], [-100, -100, -100]])
    lengths = torch.tensor([9, 7, 8])
    inside = torch.arange(9) < lengths[:, None]
    counts = (labels >= 0).sum(1)
    expected = F.ctc_loss(
        scores.transpose(0, 1), labels[labels >= 0], lengths, counts, blank=0, reduction="none"
    )
    found = _ctc(scores, inside, labels, 0)
    torch.testing.assert_close(found, expected)
    (one,) = torch.autograd.grad(expected.sum(), scores, retain_graph=True)
    (other,) = torch.autograd.grad(found.sum(), scores, create_graph=True)
    # PyTorch's gradient is that by the logits, through log_softmax
    torch.testing.assert_close(other - scores.exp() * other.sum(-1, keepdim=True), one)
    (second,) = torch.autograd.grad(other.square().sum(), scores)
    assert torch.isfinite(second).all()


class Answering(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, **inputs):
        return self.output


def test_question_answering():
    output = transformers.modeling_outputs.QuestionAnsweringModelOutput(
        start_logits=torch.randn(3, 7), end_logits=torch.randn(3, 7)
    )
    batch = {"start_positions": torch.tensor([0, 2, 6]), "end_positions": torch.tensor([1, 5, 6])}
    total, count = losses.question_answering(Answering(output), batch)
    expected = F.cross_entropy(output.start_logits, batch["start_positions"])
    expected = (expected + F.cross_entropy(output.end_logits, batch["end_positions"])) / 2
    assert count == 6
    torch.testing.assert_close(total / count, expected)


def test_segmentation_leaves_out_255():
    logits, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 6, 6))
    labels[0, :2] = 255
    output = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
    total, count = losses.segmentation(Answering(output), {"labels": labels})
    large = F.interpolate(logits, size=(6, 6), mode="bilinear", align_corners=False)
    assert count == 60
    torch.testing.assert_close(total / count, F.cross_entropy(large, labels, ignore_index=255))


def test_multi_label():
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.randn(3, 4))
    labels = torch.randint(0, 2, (3, 4))
    total, count = losses.multi_label(Answering(output), {"labels": labels})
    expected = F.binary_cross_entropy_with_logits(output.logits, labels.float())
    torch.testing.assert_close(total / count, expected)


def test_contrasts_are_clip_s_and_siglip_s():
    class Output:
        logits_per_image = torch.randn(4, 4)

    logits = Output.logits_per_image
    total, count = losses.contrastive(Answering(Output()), {})
    own = torch.arange(4)
    both = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(total / count, both)
    total, count = losses.sigmoid_contrastive(Answering(Output()), {})
    signs = -torch.ones(4, 4) + 2 * torch.eye(4)
    torch.testing.assert_close(total / count, -F.logsigmoid(signs * logits).sum(-1).mean())


def test_a_model_s_own_loss_needs_its_number_of_terms():
    model = bart().eval()
    batch = {"input_ids": torch.randint(2, 40, (2, 9)), "labels": torch.randint(2, 40, (2, 6))}
    total, count = losses.model_loss(lambda batch: batch["labels"].numel())(model, batch)
    assert count == 12
    torch.testing.assert_close(total / 12, model(**batch).loss)
    with pytest.raises(ValueError, match="returned no loss"):
        losses.model_loss(lambda batch: 1)(model, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("model_type", "named", "task"),
    [
        ("gpt2", "GPT2LMHeadModel", "causal"),
        ("llama", "LlamaForCausalLM", "causal"),
        ("bert", "BertForMaskedLM", "masked"),
        ("xlm", "XLMWithLMHeadModel", "masked"),
        ("t5", "T5ForConditionalGeneration", "sequence"),
        ("bart", "BartForConditionalGeneration", "sequence"),
        ("bert", "BertLMHeadModel", None),
        ("bert", "BertForSequenceClassification", None),
        ("bert", "BertForPreTraining", None),
        ("electra", "ElectraForPreTraining", None),
        ("gpt2", None, "causal"),
    ],
)
def test_the_class_that_a_checkpoint_names_decides_its_loss(model_type, named, task):
    config = transformers.AutoConfig.for_model(model_type)
    config.architectures = named and [named]
    if task is None:
        with pytest.raises(ValueError, match=f"holds a {named}, and text alone gives it no loss"):
            _task("folder", config)
    else:
        assert _task("folder", config) == task
