"""Ready losses against the models' own, and against cross entropies written out."""

import math

import models
import pytest
import torch
import torch.nn.functional as F
import transformers
from problems import VOCABULARY, bert, gpt2, nanogpt, tokens, vit

from blockspec import losses


def quiet(make):
    """A problem with its model in eval mode: here nothing of the engine sees to that."""
    it = make()
    it.model.eval()
    return it


def float64(values):
    return torch.as_tensor(values, dtype=torch.float64)


def log_softmax(logits):
    return logits - logits.exp().sum(-1, keepdim=True).log()


class Constant(torch.nn.Module):
    """Gives its parameter, whatever it is asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = torch.nn.Parameter(outputs)

    def forward(self, *args, **kwargs):
        return self.outputs


def test_next_token_is_the_sum_over_shifted_pairs():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 1]])
    total, count = losses.next_token(Constant(logits), {"input_ids": ids})
    expected = -sum(log_softmax(logits)[b, t, ids[b, t + 1]] for b in range(2) for t in range(3))
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    assert count == 6


def test_next_token_leaves_out_padding_unless_labels_say_otherwise():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[0, 3, 1, 4]])
    mask = torch.tensor([[1, 1, 1, 0]])
    padded = losses.next_token(Constant(logits), {"input_ids": ids, "attention_mask": mask})
    assert padded[1] == 2
    labels = torch.tensor([[0, 3, -100, 4]])
    given = losses.next_token(
        Constant(logits), {"input_ids": ids, "attention_mask": mask, "labels": labels}
    )
    expected = -(log_softmax(logits)[0, 0, 3] + log_softmax(logits)[0, 2, 4])
    torch.testing.assert_close(given[0], expected, rtol=1e-13, atol=0)
    assert given[1] == 2


def test_next_token_is_the_loss_of_the_hugging_face_model():
    it = quiet(gpt2)
    labels = tokens(3, 6, seed=8)
    labels[0, :4] = -100
    batch = {"input_ids": tokens(3, 6, seed=9), "labels": labels}
    total, count = losses.next_token(it.model, batch)
    theirs = it.model(**batch).loss.item()  # computed in float32 there
    assert total.item() / count == pytest.approx(theirs, rel=1e-6)


def test_next_token_is_the_loss_of_nanogpt():
    it = quiet(nanogpt)
    for x, y in it.batches:
        total, count = losses.next_token(it.model, (x, y))
        assert count == int((y != -1).sum())
        torch.testing.assert_close(total / count, it.model(x, y)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("ignored", [-1, -100])
def test_both_spellings_of_left_out_targets_count_for_nanogpt(ignored):
    it = quiet(nanogpt)
    x, y = it.batches[0]
    expected = losses.next_token(it.model, (x, y))
    given = losses.next_token(it.model, (x, y.masked_fill(y == -1, ignored)))
    assert (given[0].item(), given[1]) == (expected[0].item(), expected[1])


LLAMA_LIKE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "head_dim": 4,
}
GPT2_LIKE = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
CAUSAL = {
    "gpt2": GPT2_LIKE,
    "gpt_bigcode": GPT2_LIKE,
    "gptj": GPT2_LIKE | {"rotary_dim": 4},
    "mpt": {"d_model": 8, "n_heads": 2, "n_layers": 1, "max_seq_len": 16},
    "xglm": {"d_model": 8, "ffn_dim": 12, "num_layers": 1, "attention_heads": 2},
    "bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 2},
    "opt": LLAMA_LIKE | {"ffn_dim": 12, "word_embed_proj_dim": 8},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 2},
} | {
    name: LLAMA_LIKE
    for name in ("llama", "mistral", "qwen2", "gemma2", "gpt_neox", "phi", "olmo2", "biogpt")
}
TOKEN_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def hugging_face(kind, auto, settings, seed=0):
    config = transformers.AutoConfig.for_model(kind, **TOKEN_IDS, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval().float()


@pytest.mark.parametrize("family", CAUSAL)
def test_next_token_is_the_own_loss_of_every_family(family):
    """A mapping, padded on the right, on the left or not at all, and a pair; Llama's second
    argument is its mask.
    """
    model = hugging_face(family, transformers.AutoModelForCausalLM, CAUSAL[family])
    ids = tokens(2, 6, seed=9)
    masks = torch.ones(3, 2, 6, dtype=torch.long)
    masks[0, 1, 4:] = masks[1, 1, :2] = 0
    with torch.no_grad():
        for mask in masks:
            labels = ids.masked_fill(mask == 0, -100)
            own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            total, count = losses.next_token(model, {"input_ids": ids, "attention_mask": mask})
            torch.testing.assert_close(total / count, own, rtol=1e-6, atol=0)
        total, count = losses.next_token(model, (ids[:, :-1], ids[:, 1:]))
    assert count == 10
    torch.testing.assert_close(total / count, own, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "albert"])
def test_masked_token_is_the_own_loss_of_every_family(family):
    sizes = LLAMA_LIKE | {"max_position_embeddings": 18, "embedding_size": 8}
    model = hugging_face(family, transformers.AutoModelForMaskedLM, sizes)
    labels = tokens(2, 6, seed=7)
    labels[:, ::2] = -100
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    for padded in ({}, {"attention_mask": mask}):
        batch = {"input_ids": tokens(2, 6), "labels": labels} | padded
        total, count = losses.masked_token(model, batch)
        torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("num_labels", "loss"), [(1, losses.regression), (3, losses.classification)]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_losses_of_sequences_are_those_of_every_family(family, num_labels, loss):
    sizes = (GPT2_LIKE if family == "gpt2" else LLAMA_LIKE) | {"num_labels": num_labels}
    model = hugging_face(family, transformers.AutoModelForSequenceClassification, sizes)
    labels = torch.tensor([0.5, -1.0]) if num_labels == 1 else torch.tensor([2, 0])
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = tokens(2, 6).masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    total, count = loss(model, batch)
    assert count == 2
    torch.testing.assert_close(total / count, model(**batch).loss, rtol=1e-6, atol=0)


class Passing(torch.nn.Module):
    """A wrapper that passes on whatever it gets."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Required(torch.nn.Module):
    """Wants y, whatever it calls it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x, y):
        return self.inner(x, y)


class LossAlone(Required):
    """nanochat's: the logits without targets, the loss alone with them."""

    def forward(self, idx, targets=None, loss_reduction="mean"):
        logits, loss = self.inner(idx, idx if targets is None else targets)
        return logits if targets is None else loss


@pytest.mark.parametrize("wrapper", [Passing, Required, LossAlone])
def test_a_pair_reaches_models_that_want_the_targets(wrapper):
    it = quiet(nanogpt)
    wrapped = wrapper(it.model)
    for batch in it.batches:
        expected, given = (losses.next_token(model, batch) for model in (it.model, wrapped))
        assert (given[0].item(), given[1]) == (expected[0].item(), expected[1])


def test_a_wrapped_hugging_face_model_gets_the_tokens_of_a_pair_alone():
    it = quiet(gpt2)
    ids = tokens(2, 6)
    expected = losses.next_token(it.model, {"input_ids": ids})
    given = losses.next_token(Passing(it.model), (ids[:, :-1], ids[:, 1:]))
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)


def test_masked_token_is_the_loss_of_the_hugging_face_model():
    it = quiet(bert)
    (batch,) = it.batches
    total, count = losses.masked_token(it.model, batch)
    assert count == 6
    assert total.item() / count == pytest.approx(it.model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["pair", "list", "mapping"])
def test_classification_of_pairs_and_mappings(form):
    it = quiet(vit)
    x, y = it.batches[0]
    batch = {"pair": (x, y), "list": [x, y], "mapping": {"pixel_values": x, "labels": y}}[form]
    total, count = losses.classification(it.model, batch)
    expected = -log_softmax(it.model(x).logits)[range(3), y].sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    assert count == 3


@pytest.mark.parametrize("as_mapping", [False, True])
def test_regression_sums_over_outputs_and_counts_examples(as_mapping):
    outputs, targets = float64([[1.0, 2.0], [3.0, 5.0]]), float64([[0.0, 0.0], [3.0, 1.0]])
    batch = {"x": outputs, "labels": targets} if as_mapping else (outputs, targets)
    total, count = losses.regression(Constant(outputs), batch)
    assert (total.item(), count) == (1 + 4 + 0 + 16, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_keep_the_dtype_of_the_logits(dtype):
    """Half a digit of float32 in the loss would leave a float64 Hessian symmetric to 3e-9 only."""
    logits = torch.tensor([[[1.0, 1 + 1e-9, 0.5]] * 2], dtype=dtype)
    total, _ = losses.next_token(Constant(logits), {"input_ids": torch.tensor([[0, 1]])})
    assert total.dtype == dtype
    expected = math.log(math.e + math.exp(1 + 1e-9) + math.exp(0.5)) - (1 + 1e-9)
    assert total.item() == pytest.approx(expected, rel=1e-15 if dtype == torch.float64 else 1e-6)


def test_a_batch_that_is_left_out_entirely_counts_nothing_and_keeps_a_graph():
    it = quiet(gpt2)
    batch = {"input_ids": tokens(1, 5), "labels": torch.full((1, 5), -100)}
    total, count = losses.next_token(it.model, batch)
    assert (total.item(), count) == (0, 0)
    gradients = torch.autograd.grad(total, list(it.model.parameters()), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)


def test_tuples_and_tensors_are_outputs_too():
    outputs, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 2])

    class Pair(Constant):
        def forward(self, x):
            return self.outputs, None

    wrapped, bare = (losses.classification(kind(outputs), (y, y))[0] for kind in (Pair, Constant))
    assert wrapped.item() == bare.item()


def test_extra_entries_of_a_mapping_reach_the_model():
    """Position ids, token types, attention masks: the loss is that of the model called with all of
    them.
    """
    it = quiet(gpt2)
    ids, positions = tokens(1, 5), torch.tensor([[3, 1, 0, 2, 4]])
    total, _ = losses.next_token(it.model, {"input_ids": ids, "position_ids": positions})
    logits = it.model(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(total, F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    assert total.item() != losses.next_token(it.model, {"input_ids": ids})[0].item()


LONG = torch.zeros(2, 7, dtype=torch.long)
EMBEDS = {"inputs_embeds": torch.zeros(2, 3, 4)}
SHAPES = {
    "embeddings without labels": (
        losses.next_token,
        EMBEDS,
        r"this batch has \['inputs_embeds'\]. Give it 'labels'",
    ),
    "next labels that are none": (
        losses.next_token,
        {"input_ids": LONG, "labels": None},
        r"labels of a batch are None.*leave the entry out",
    ),
    "labels that are none": (
        losses.masked_token,
        {"input_ids": LONG, "labels": None},
        r"labels of a batch are None; they must be a tensor",
    ),
    "four-dimensional mask": (
        losses.next_token,
        {"input_ids": LONG[:, :3], "attention_mask": torch.ones(2, 1, 3, 3)},
        r"shape of input_ids, \(2, 3\); this one has \(2, 1, 3, 3\)",
    ),
    "pair of another length": (
        losses.next_token,
        (LONG, LONG[:, 1:]),
        r"every one of the targets \(2, 6\); the model gave \(2, 3, 5\)",
    ),
    "classes": (
        losses.classification,
        (torch.zeros(2), LONG[0, :4]),
        r"need labels of shape \(2,\), got \(4,\)",
    ),
    "tokens": (
        losses.next_token,
        {"input_ids": LONG},
        r"need labels of shape \(2, 2\), got \(2, 6\)",
    ),
    "no labels": (
        losses.masked_token,
        {"input_ids": LONG},
        r"needs 'labels'; this one has \['input_ids'\]",
    ),
    "targets": (
        losses.regression,
        (torch.zeros(2), torch.zeros(2)),
        r"need targets of that shape, got \(2,\)",
    ),
}


@pytest.mark.parametrize(("loss", "batch", "message"), SHAPES.values(), ids=SHAPES)
def test_a_batch_of_another_shape_is_an_error_that_names_the_shapes(loss, batch, message):
    outputs = (
        torch.zeros(2, 3)
        if loss in (losses.classification, losses.regression)
        else torch.zeros(2, 3, 5)
    )
    with pytest.raises(ValueError, match=message):
        loss(Constant(outputs), batch)


@pytest.mark.parametrize("batch", [torch.zeros(2), (torch.zeros(1),) * 3, "text"])
def test_a_batch_that_is_neither_mapping_nor_pair_is_an_error(batch):
    with pytest.raises(TypeError, match=r"a batch is a mapping or a pair \(x, y\); this one is a"):
        losses.classification(Constant(torch.zeros(2, 3)), batch)


def test_a_model_without_logits_is_an_error():
    class Odd(Constant):
        def forward(self, x):
            return {"hidden": self.outputs}

    with pytest.raises(TypeError, match=r"the model gave a dict; expected a tensor"):
        losses.classification(
            Odd(torch.zeros(2, 3)), (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
        )


def test_next_token_of_a_model_in_float32_gives_float32():
    model = models.tiny_gpt2(
        dtype=torch.float32, vocab_size=VOCABULARY, n_embd=8, n_head=2, layers=1
    )
    assert losses.next_token(model, {"input_ids": tokens(1, 4)})[0].dtype == torch.float32
