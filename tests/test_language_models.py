"""Models to measure: what is loaded is the same function, whole, and nothing of the file was
run.
"""

import json
import os
import zipfile
from pathlib import Path

import nanogpt_model
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from blockspec import partition
from blockspec.model.losses import masked_token, next_token
from language_models import bert, embedded, gpt2, nanogpt
from language_models.loading import load_pretrained
from language_models.models import ModelSettings, build
from language_models.tokens import open_tokens
from language_models.train import DataSettings, make_model, make_task, save_with_tokenizer
from training.checkpoints import write_checkpoint

CODE = Path(nanogpt_model.__file__)
SMALL = {"num_batches": 2, "batch_size": 3, "num_tokens": 12}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def random_gpt(*, bias: bool) -> nanogpt_model.GPT:
    torch.manual_seed(0)
    model = nanogpt_model.GPT(nanogpt_model.GPTConfig(bias=bias))
    for parameter in model.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3
        )  # norms and biases too: a swap of any two must show
    return model


def write_nanogpt(path: Path, model: nanogpt_model.GPT, *, prefix: str = "", **more) -> Path:
    """What nanoGPT's train.py saves; older ones have the causal mask as a buffer."""
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    content = {
        "model": weights,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {**vars(model.config), "dropout": 0.1},
        "iter_num": 100,
        "best_val_loss": torch.tensor(2.0),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
        **more,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def data(tmp_path) -> str:
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 64, 500).astype(np.uint16).tofile(
            tmp_path / f"{split}.bin"
        )
    return str(tmp_path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_nanogpt_as_gpt2_is_the_same_function(bias, prefix, data, tmp_path):
    source = random_gpt(bias=bias)
    model, batches, loss = nanogpt.checkpoint(
        str(write_nanogpt(tmp_path / "ckpt.pt", source, prefix=prefix)), data=data
    )
    assert isinstance(model, GPT2LMHeadModel)
    assert not model.training
    tokens = batches[0]["input_ids"]
    assert tokens.shape == (4, 16)
    with torch.no_grad():
        expected = source.double()(tokens, tokens)[0]
        torch.testing.assert_close(model.double()(tokens).logits, expected, rtol=1e-10, atol=1e-10)
        total, terms = loss(model, batches[0])
        torch.testing.assert_close(
            total / terms,
            torch.nn.functional.cross_entropy(
                expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            ),
        )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in source.named_parameters()} - {"lm_head.weight"} | {
        "transformer.wte.weight"
    }
    assert model.lm_head.weight is model.transformer.wte.weight


def test_nanogpt_in_its_own_class(data, tmp_path):
    source = random_gpt(bias=False)
    path = write_nanogpt(tmp_path / "ckpt.pt", source, prefix="_orig_mod.")
    model, batches, loss = nanogpt.original(str(path), code=str(CODE), data=data, **SMALL)
    assert type(model).__name__ == "GPT"
    assert not model.training
    x, y = batches[1]
    assert x.shape == y.shape == (3, 12)
    with torch.no_grad():
        total, terms = loss(model, (x, y))
        torch.testing.assert_close(total / terms, source(x, y)[1])
        torch.testing.assert_close(model(x, y)[0], source(x, y)[0])


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    harmed = tmp_path / "harmed"
    path = write_nanogpt(
        tmp_path / "ckpt.pt", random_gpt(bias=True), surprise=Evil(f"touch {harmed}")
    )
    with pytest.raises(
        ValueError, match=r"ckpt.pt holds more than tensors and numbers and was refused"
    ):
        nanogpt.read_checkpoint(path)
    assert not harmed.exists()
    torch.load(path, weights_only=False)  # the file is as hostile as it claims
    assert harmed.exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(name: str):
    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        content["model"].pop(name)
        torch.save(content, path)

    return change


def reshaped(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["model"]["transformer.wpe.weight"] = torch.zeros(17, 8)
    torch.save(content, path)


def other_arguments(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["model_args"].pop("n_head")
    torch.save(content, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, "cannot be read, it is cut short or no checkpoint"),
        (lambda path: path.write_bytes(b""), "cannot be read, it is cut short or no checkpoint"),
        (lambda path: path.write_text("hello"), "ckpt.pt (cannot be read|holds more than)"),
        (lambda path: path.unlink(), "does not exist"),
        (
            lambda path: torch.save({"state_dict": {}}, path),
            r"is no checkpoint of nanoGPT: it has \['state_dict'\]",
        ),
        (
            lambda path: torch.save(torch.zeros(2), path),
            r"is no checkpoint of nanoGPT: it has Tensor",
        ),
        (
            without("transformer.h.1.mlp.c_fc.weight"),
            r"1 are missing \(transformer.h.1.mlp.c_fc.weight\), 0 are unknown",
        ),
        (reshaped, r"transformer.wpe.weight has shape \(17, 8\); model_args make it \(16, 8\)"),
        (other_arguments, "model_args lack n_head"),
    ],
)
def test_wrong_nanogpt_files_give_one_line(harm, message, data, tmp_path):
    harm(write_nanogpt(tmp_path / "ckpt.pt", random_gpt(bias=True)))
    for factory in (
        nanogpt.checkpoint,
        lambda path, data: nanogpt.original(path, code=str(CODE), data=data),
    ):
        with pytest.raises(ValueError, match=message) as error:
            factory(str(tmp_path / "ckpt.pt"), data=data)
        assert "\n" not in str(error.value)


def test_nanogpt_code_that_is_none(data, tmp_path):
    path = write_nanogpt(tmp_path / "ckpt.pt", random_gpt(bias=True))
    with pytest.raises(ValueError, match=r"absent.py is no Python file; give nanoGPT's model.py"):
        nanogpt.original(str(path), code=str(tmp_path / "absent.py"), data=data)


def saved_checkpoint(folder: Path, model: ModelSettings, data: DataSettings) -> Path:
    task = make_task(model, data, seed=0)
    network = make_model(model, task, seed=0)
    record = {"model": vars(model), "data": vars(data)}
    return write_checkpoint(
        folder, network, step=0, record=record, save=save_with_tokenizer(data.source)
    )


TINY = ModelSettings(num_layers=1, num_heads=2, width=8)
BERT = ModelSettings(architecture="bert", num_layers=1, num_heads=2, width=8)


@pytest.fixture
def tiny(tmp_path) -> Path:
    return saved_checkpoint(tmp_path, TINY, DataSettings(num_tokens=32))


def test_our_checkpoint_to_measure(tiny):
    model, batches, loss = gpt2.checkpoint(str(tiny))
    assert loss is next_token
    assert [batch["input_ids"].shape for batch in batches] == [(4, 32)] * 4
    assert not model.training
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    torch.testing.assert_close(plain(**batches[0]).logits, model(**batches[0]).logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    held_out = embedded.token_ids("val", embedded.tokenizer())
    assert batches[0]["input_ids"][0].tolist() == held_out[:32].tolist()
    assert batches[-1]["input_ids"][-1].tolist() == held_out[-32:].tolist()
    again = gpt2.checkpoint(str(tiny))[1]
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True)
    )
    other = gpt2.checkpoint(str(tiny), split="train", **SMALL)[1]
    assert [batch["input_ids"].shape for batch in other] == [(3, 12)] * 2
    assert (
        AutoTokenizer.from_pretrained(tiny)("for x in")["input_ids"]
        == embedded.tokenizer()("for x in")["input_ids"]
    )


def test_our_bert_to_measure(tmp_path):
    path = saved_checkpoint(tmp_path, BERT, DataSettings(num_tokens=32))
    model, batches, loss = bert.checkpoint(str(path))
    assert loss is masked_token
    total, terms = loss(model, batches[0])
    assert terms == int((batches[0]["labels"] != -100).sum())
    torch.testing.assert_close(
        total / terms, torch.tensor(np.log(512)), rtol=0.02, atol=0, check_dtype=False
    )
    again, other = bert.checkpoint(str(path))[1], bert.checkpoint(str(path), seed=1)[1]
    assert torch.equal(again[0]["labels"], batches[0]["labels"])
    assert not torch.equal(other[0]["labels"], batches[0]["labels"])
    for factory in (gpt2.checkpoint, gpt2.pretrained):
        with pytest.raises(ValueError, match=r"is a bert, not a gpt2|is a masked language model"):
            factory(str(path))


def test_any_folder_of_hugging_face(tiny, tmp_path):
    model, batches, _ = gpt2.pretrained(str(tiny), **SMALL)
    assert model(**batches[0]).logits.shape == (3, 12, 512)
    path = saved_checkpoint(tmp_path / "bert", BERT, DataSettings(num_tokens=32))
    model, batches, loss = bert.pretrained(str(path), **SMALL)
    assert loss(model, batches[0])[1] >= 1
    with pytest.raises(ValueError, match="num_tokens is 33; this model takes 32 at most"):
        gpt2.pretrained(str(tiny), num_tokens=33)


def test_without_biases_there_are_none_to_train_or_measure(tmp_path):
    path = saved_checkpoint(
        tmp_path, ModelSettings(num_layers=1, num_heads=2, width=8, bias=False), DataSettings()
    )
    model = gpt2.checkpoint(str(path))[0]
    assert all(p.requires_grad != name.endswith("bias") for name, p in model.named_parameters())
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_untied_heads(tmp_path):
    path = saved_checkpoint(
        tmp_path, ModelSettings(num_layers=1, num_heads=2, width=8, tied=False), DataSettings()
    )
    model = gpt2.checkpoint(str(path))[0]
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def cut_weights(path: Path) -> None:
    truncated(path / "model.safetensors")


def drop_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights.pop("transformer.ln_f.weight")
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def other_size(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "n_embd": 16}))


def other_kind(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))


def own_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": auto_map})
    )
    (path / "evil.py").write_text(f"open({str(path / 'harmed')!r}, 'w')")


def hostile_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save(
        {"transformer.wte.weight": Evil(f"touch {path / 'harmed'}")}, path / "pytorch_model.bin"
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_weights, "incomplete metadata, file not fully covered|invalid header"),
        (drop_weight, r"lacks 1 tensors of its causal model, such as transformer.ln_f.weight"),
        (
            other_size,
            r"has 16 tensors of other shapes than its config.json says, such as .*: \(24,\), not "
            r"\(48,\)",
        ),
        (other_kind, "cannot load .*unheard_of"),
        (own_code, "cannot load .*custom code"),
        (hostile_weights, "cannot load .*[Ww]eights.only"),
        (lambda path: (path / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda path: (path / "config.json").write_text("{"), "not a valid JSON"),
        (
            lambda path: (path / "config.json").unlink(),
            "cannot load .*[Uu]nrecognized model|config.json",
        ),
    ],
)
def test_wrong_folders_give_one_line_and_run_nothing(harm, message, tiny):
    harm(tiny)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(str(tiny), "causal")
    assert "\n" not in str(error.value)
    assert not (tiny / "harmed").exists()


def test_a_folder_that_is_no_checkpoint(tiny):
    (tiny / "checkpoint.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint.json"):
        gpt2.checkpoint(str(tiny))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="width is 9; it must be a multiple of num_heads, 2"):
        build(ModelSettings(width=9, num_heads=2), vocabulary=8, window=8, end_token=None)
    with pytest.raises(ValueError, match="the model's vocabulary is 7, the data's is 8"):
        build(ModelSettings(vocabulary=7), vocabulary=8, window=8, end_token=None)


def test_the_initial_weights_are_those_of_gpt2():
    settings = ModelSettings(num_layers=8, num_heads=2, width=64)
    torch.manual_seed(0)
    model = build(settings, vocabulary=512, window=32, end_token=None)
    for name, std in {"mlp.c_fc": 0.02, "mlp.c_proj": 0.02 / 4, "attn.c_proj": 0.02 / 4}.items():
        weight = model.get_submodule(f"transformer.h.3.{name}").weight
        assert abs(weight.std().item() / std - 1) < 0.05
    assert (
        sum(p.numel() for p in model.parameters())
        == 512 * 64 + 32 * 64 + 8 * (12 * 64**2 + 13 * 64) + 2 * 64
    )


def test_gpt2_124m_has_the_size_of_the_paper_s():
    with torch.device("meta"):
        model = build(
            ModelSettings(num_layers=12, num_heads=12, width=768),
            vocabulary=50257,
            window=1024,
            end_token=None,
        )
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_the_spectra_of_gpt2_124m_are_those_of_the_paper_s_25_blocks():
    configs = Path(__file__).parents[1] / "language_models/configs"
    settings = yaml.safe_load((configs / "spectra/gpt2_124m.yaml").read_text())
    given = yaml.safe_load((configs / "gpt2_124m.yaml").read_text())["model"]
    with torch.device("meta"):
        model = build(ModelSettings(**given), vocabulary=50257, window=1024, end_token=None)
    assert settings["blocks"]["full"]
    blocks = partition(model, settings["blocks"]["by"], settings["blocks"]["include"])
    assert [block.kind for block in blocks] == [
        "embedding",
        *["query", "key", "value", "attention_output", "mlp_in", "mlp_out"] * 4,
    ]
    assert [block.layer for block in blocks] == [None, *[0] * 6, *[3] * 6, *[7] * 6, *[11] * 6]
    arguments = settings["model_args"]
    assert arguments["num_batches"] * arguments["batch_size"] * arguments["num_tokens"] == 491_520


def test_embedded_windows_need_a_model_that_has_their_tokens(tiny):
    with pytest.raises(ValueError, match="the vocabulary ends at 99"):
        open_tokens("embedded", "val", window=8, vocabulary=100)


def test_zip_of_torch_is_what_is_truncated(tmp_path):
    """The truncation tests above cut a zip archive in half: that it was one."""
    assert zipfile.is_zipfile(write_nanogpt(tmp_path / "ckpt.pt", random_gpt(bias=True)))
