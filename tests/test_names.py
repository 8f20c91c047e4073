"""Names that mean something to rich or to matplotlib are printed and drawn as they are."""

import factories_for_runs as factories
from test_cli import invoke, run_arguments

from blockspec.figures.style import short_names


def test_folders_and_blocks_with_brackets(tmp_path, monkeypatch):
    factories.reset()
    out = tmp_path / "run[/x]"
    by = '{"all[/x]$": ["*"]}'
    arguments = [a for a in run_arguments(out) if not a.startswith('["*c_attn')]
    arguments.remove("--blocks.include")
    result = invoke(*arguments, "--blocks.by", by, "--blocks.full", "false")
    assert result.code == 0, result.err
    assert "run[/x]" in result.out.replace("\n", "")
    assert "weights " in result.out
    assert "commit" in result.out


def test_dollars_are_no_formulas():
    found = short_names(["a$b$", "c"])
    assert found["a$b$"].count(r"\$") == 2
    assert found["c"] == "c"
