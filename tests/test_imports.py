"""What is imported when: a command that only reads does not wait for what computes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blockspec

PACKAGE = Path(blockspec.__file__).parent
HEAVY = ("transformers", "datasets", "accelerate", "sklearn", "matplotlib", "seaborn", "sympy")
HEAVY += ("scipy.stats", "scipy.interpolate", "torch._dynamo", "torch.distributed.tensor")
PROGRAM = """
import contextlib, io, json, sys

def loaded():
    return sorted({name.split(".")[0] for name in sys.modules} | set(sys.modules))

import blockspec
after = {"import": loaded()}
from blockspec.runs import cli
for name, arguments in (("help", ["--help"]), ("show", ["show", sys.argv[1]])):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main(arguments)
    after[name] = loaded()
    after[name + "_printed"] = out.getvalue()
for name in blockspec.__all__:
    getattr(blockspec, name)
after["names"] = loaded()
print(json.dumps(after))
"""


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """Modules after each of: the import, help, a run's summary, all public names; and what was
    printed.
    """
    run = tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(2, 1)
    batches = [(torch.eye(2), torch.ones(2, 1))]
    objective = blockspec.Objective(model, batches, loss=blockspec.losses.regression)
    blocks = blockspec.partition(model, by="tensor")
    blockspec.estimate_spectra(objective, blocks, num_probes=1, num_steps=2).save(
        run / "spectra.parquet"
    )
    (run / "run.json").write_text(json.dumps({"stages": []}))
    command = [sys.executable, "-c", PROGRAM, str(run)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_import_alone_needs_none_of_the_dependencies(after):
    assert not {"torch", "numpy", "pandas", "scipy", *HEAVY} & set(after["import"])


@pytest.mark.parametrize("command", ["help", "show"])
def test_a_command_that_reads_needs_no_torch(after, command):
    assert not {"torch", *HEAVY} & set(after[command])
    assert {"help": "usage: blockspec", "show": "step 0"}[command] in after[command + "_printed"]


def test_all_public_names_need_torch_and_pandas_and_nothing_heavier(after):
    assert {"torch", "pandas"} <= set(after["names"])
    assert not set(HEAVY) & set(after["names"])


def test_every_public_name_is_found_and_is_what_its_module_defines():
    for name in blockspec.__all__:
        assert getattr(blockspec, name) is not None
        assert name in dir(blockspec)
    with pytest.raises(AttributeError, match="no attribute 'estimate_spectrum'"):
        blockspec.estimate_spectrum  # noqa: B018


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    hidden = set(blockspec.__all__) & modules
    assert hidden == {"losses"}
    assert blockspec.losses.__name__ == "blockspec.losses"
    for wing in PACKAGE.glob("*/__init__.py"):
        nodes = [n for n in ast.walk(ast.parse(wing.read_text())) if isinstance(n, ast.ImportFrom)]
        names = {alias.asname or alias.name for node in nodes for alias in node.names}
        assert not names & {path.stem for path in wing.parent.glob("*.py")}, wing
