"""Hugging Face folders: the class that they name, all of their weights, as much text as is needed."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_cli import save_tokenizer
from torch import nn

from blockspec.runs import hugging_face as hub
from blockspec.runs.factories import find_factory
from blockspec.runs.hugging_face import hugging_face

SPECIAL = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>"}
BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 16,
}
GPT2 = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
QUIET = {"bos_token_id": 0, "eos_token_id": 0}


def folder_of(path, model):
    torch.manual_seed(0)
    model.save_pretrained(path)
    save_tokenizer(path, SPECIAL)
    return str(path)


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | QUIET | changes))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 200)
    return str(tmp_path / "text.txt")


def test_sequences_are_as_long_as_the_model_has_positions(tmp_path, text):
    folder = folder_of(tmp_path / "gpt2", gpt2())
    _, batches, _ = hugging_face(folder, text=text)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 16)] * 4
    with pytest.raises(ValueError, match="tokens=17 is more than the model's 16 positions"):
        hugging_face(folder, text=text, tokens=17)


def test_positions_that_a_model_keeps_for_itself_are_none(tmp_path, text):
    """RoBERTa's first ones, up to its padding index, are for no token."""
    config = transformers.RobertaConfig(**BERT, **QUIET, pad_token_id=1)
    folder = folder_of(tmp_path / "roberta", transformers.RobertaForMaskedLM(config))
    model, batches, loss = hugging_face(folder, text=text)
    assert batches[0]["input_ids"].shape == (4, 14)
    total, _ = loss(model, batches[0])
    assert total.isfinite()


@pytest.mark.parametrize("saved", ["classifier", "encoder"])
def test_weights_that_a_checkpoint_lacks_are_an_error(tmp_path, text, saved):
    """A config that promises a masked model over weights of something else: its head was random,
    another one at each call.
    """
    config = transformers.BertConfig(**BERT)
    classes = {
        "classifier": transformers.BertForSequenceClassification,
        "encoder": transformers.BertModel,
    }
    folder = folder_of(tmp_path / "bert", classes[saved](config))
    path = tmp_path / "bert/config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(ValueError, match=r"lacks \d weights of BertForMaskedLM \(cls.predictions"):
        hugging_face(folder, text=text)


def test_weights_in_excess_are_an_error_unless_they_are_named(tmp_path, text):
    folder = folder_of(tmp_path / "gpt2", gpt2())
    path = tmp_path / "gpt2/model.safetensors"
    save_file(load_file(path) | {"score.weight": torch.ones(2, 8)}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 weights that GPT2LMHeadModel has no place for \(score"
    ):
        hugging_face(folder, text=text)
    model, _, _ = hugging_face(folder, text=text, unused="score.*")
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize("changes", [{"n_layer": 2}, {"n_embd": 16}, {"n_positions": 32}])
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, text, changes):
    folder = folder_of(tmp_path / "gpt2", gpt2())
    gpt2(**changes).save_pretrained(tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match=r"checkpoint-5' is not one of .*transformer\.\S+ is "):
        hugging_face(folder, checkpoint=str(tmp_path / "checkpoint-5"), text=text)


def test_a_checkpoint_of_the_same_model_brings_its_weights(tmp_path, text):
    folder = folder_of(tmp_path / "gpt2", gpt2())
    other = gpt2()
    with torch.no_grad():
        other.transformer.wte.weight.add_(1.0)
    other.save_pretrained(tmp_path / "checkpoint-5")
    model, _, _ = hugging_face(folder, checkpoint=str(tmp_path / "checkpoint-5"), text=text)
    torch.testing.assert_close(model.transformer.wte.weight, other.transformer.wte.weight)
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is no folder"):
        hugging_face(folder, checkpoint=str(tmp_path / "weights.pt"), text=text)


def test_a_name_that_is_not_there_names_the_folders_like_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinygpt").mkdir()
    for name in ("./tinygtp", "tinygtp"):
        with pytest.raises(ValueError, match=r"there is no folder .*; folders like it: tinygpt"):
            hugging_face(name)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hugging_face("tinygpt")


def words(part):
    """A tokenizer that closes a text, as BERT's does; counts what it was given."""
    words.seen.append(len(part))
    return {"input_ids": [*map(int, part.split()), -1]}


@pytest.mark.parametrize("wanted", [1, 100, 5000, 20_000])
def test_a_text_is_read_as_far_as_it_is_needed(tmp_path, wanted):
    numbers = [i * 7919 % 100_000 for i in range(20_000)]
    (tmp_path / "long.txt").write_text(" ".join(map(str, numbers)))
    words.seen = []
    assert hub.first_tokens(words, str(tmp_path / "long.txt"), wanted) == numbers[:wanted]
    assert max(words.seen) <= max(16 * wanted + 4000, 2001)


def test_a_short_text_is_the_whole_of_it(tmp_path):
    (tmp_path / "short.txt").write_text("1 2 3")
    words.seen = []
    assert hub.first_tokens(words, str(tmp_path / "short.txt"), 100) == [1, 2, 3, -1]
    (tmp_path / "empty.txt").write_text("")
    assert hub.first_tokens(words, str(tmp_path / "empty.txt"), 100) == [-1]


def pair():
    return nn.Linear(1, 1), []


def typed(*, width: int = 3):
    return nn.Linear(width, 1), [], None


MISTAKES = {
    "two values": ("test_hugging_face:pair", {}, r"returned \(Linear, list\); a factory returns"),
    "an argument": ("test_hugging_face:typed", {"widht": 3}, r"'widht', .*did you mean 'width'"),
    "a file": (
        "models/mine.py:tiny",
        {},
        "without .py and with dots for slashes: models.mine:tiny",
    ),
    "of the hub": ("nowhere", {"token": 3}, r"'token', .*did you mean 'tokens'"),
}


@pytest.mark.parametrize(("name", "given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_wrong_with_a_factory_is_said(name, given, message):
    with pytest.raises(ValueError, match=message):
        find_factory(name)(**given)
