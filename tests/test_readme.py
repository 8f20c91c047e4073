"""The Python of README runs as it stands, on a tiny model in the place of the one from the hub."""

import re
from pathlib import Path

import torch
import transformers
from models import tiny_gpt2

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
TOKENS = 16
SMALLER = {"512": str(TOKENS), "5e-3": "5e-2"}  # tokens in a row, tolerance


def test_the_python_of_readme_runs(tmp_path, monkeypatch, capsys):
    def tokenizer(text, return_tensors):
        return {"input_ids": torch.arange(8 * TOKENS)[None] * 7 % 11}

    monkeypatch.chdir(tmp_path)
    model = tiny_gpt2(layers=1, dtype=torch.float32)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    Path("my.txt").write_text("text", encoding="utf-8")
    names = {}
    for code in BLOCKS[:-1]:
        for given, smaller in SMALLER.items():
            code = code.replace(given, smaller)
        exec(code, names)
    names["training_batches"] = list(names["objective"].batches())
    before = [parameter.clone() for parameter in names["model"].parameters()]
    exec(BLOCKS[-1], names)
    assert all(
        (new != old).any() for new, old in zip(names["model"].parameters(), before, strict=True)
    )
    assert names["pairs"].converged.all()
    assert (
        set(names["traces"]) == {block.name for block in names["blocks"]} == set(names["spectra"])
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "my.txt",
        "spectra.parquet",
        "coupling.png",
        "landscape.png",
    }
    assert "Estimate" in capsys.readouterr().out
