"""``blockspec blocks``: what it lists is what a run would measure."""

import csv
import io
import json

import pandas as pd
import problems
import pytest
import torch
from test_cli import TINY, invoke

from blockspec import Block, losses, partition
from blockspec.model.pieces import Blocks
from blockspec.runs.listing import unnamed

HOSTILE = "a[/x]<b>"


def unknown():
    """A model with a part that neither a name nor a forward pass tells the role of."""
    model = torch.nn.Module()
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    model.forward = lambda x: x * model.scale
    return model, [(torch.eye(3), torch.ones(3, 3))], losses.regression


def test_json_lists_the_partition_and_counts_its_kinds():
    found = json.loads(invoke("blocks", TINY, "--format", "json").out)
    expected = partition(problems.nanogpt().model, by="matrix")
    rows = [(b["name"], b["kind"], b["layer"], b["numel"]) for b in found["blocks"]]
    assert rows == [(b.name, b.kind, b.layer, b.numel) for b in expected]
    assert found["parameters"] == sum(p.numel() for p in problems.nanogpt().model.parameters())
    assert sum(found["kinds"].values()) == len(rows)
    assert found["kinds"]["query"] == 1


def test_csv_is_read_by_a_program_and_the_counts_go_elsewhere():
    result = invoke("blocks", TINY, "--by", "head", "--include", "*/query/*", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.out)))
    assert [row["block"].split("/")[-1] for row in rows] == ["head_0", "head_1"] * 2
    assert {row["kind"] for row in rows} == {"query", "bias"}


def test_the_table_names_every_block():
    out = "".join(invoke("blocks", TINY, "--by", "layer").out.split())
    assert "20blocks" not in out
    for block in partition(problems.nanogpt().model, by="layer"):
        assert f"{block.numel:,}" in out
    assert "kinds:1embedding,1position,1layer,2norm" in out


def test_blocks_of_kind_other_are_warned_of():
    result = invoke("blocks", "test_listing:unknown")
    assert result.code == 0
    assert "1 of 1 blocks are of kind other: scale." in result.err
    assert unnamed(partition(problems.nanogpt().model)) == ""
    many = [Block(f"p{i}", "other", None, 1) for i in range(9)]
    assert "p4 and 4 more" in unnamed(many)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere:tiny",), "no module 'nowhere'"),
        ((TINY, "--by", "rows"), "is not one of tensor, matrix"),
        ((TINY, "--include", "*atn*"), "matches no block"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    result = invoke("blocks", *arguments)
    assert result.code == 1
    assert message in result.err


def test_a_notebook_shows_blocks_as_a_table_with_names_escaped():
    blocks = Blocks([Block(HOSTILE, "query", 3, 1200), Block("b", "<i>", None, 5, note="say")])
    html = blocks._repr_html_()
    assert "2 blocks, 1,205 parameters" in html
    assert "a[/x]&lt;b&gt;" in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert isinstance(partition(unknown()[0]), Blocks)
    assert list(blocks.to_frame()["note"]) == ["", "say"]


class Widening(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.widen, self.narrow = torch.nn.Linear(3, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.narrow(self.widen(x).tanh())


def widening():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Widening()
    return model, [(torch.eye(3), torch.ones(3, 3))], losses.regression


def test_names_are_taught_on_the_command_line(tmp_path):
    """And they stand, whatever a forward pass looks like."""
    names = '{"spread": "widen", "mlp_out": ["narrow"]}'
    told = json.loads(
        invoke("blocks", "test_listing:widening", "--names", names, "--format", "json").out
    )
    assert [block["kind"] for block in told["blocks"]] == ["spread", "bias", "mlp_out", "bias"]
    settings = ("--blocks.names", names, "--blocks.full", "false", "--plots", "false")
    few = ("--estimate.num_probes", "1", "--estimate.num_steps", "2", "--plan", "false")
    model = ("--model", "test_listing:widening", "--out", str(tmp_path / "run"))
    assert invoke("run", *model, *settings, *few).code == 0
    kinds = pd.read_parquet(tmp_path / "run/spectra.parquet")["kind"].unique().tolist()
    assert kinds == ["spread", "bias", "mlp_out"]
    other = invoke("run", *model, *few, "--blocks.full", "false")
    assert "blocks.names" in other.err
