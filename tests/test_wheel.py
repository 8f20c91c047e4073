"""The package as it is installed: from a wheel, in an empty folder, without the checkout."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import blockspec

ROOT = Path(__file__).parent.parent
SOURCES = ("blockspec", "pyproject.toml", "README.md", "LICENSE")
FACTORY = """
import torch
import blockspec

def tiny():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    return model, [(torch.eye(3), torch.ones(3, 1))], blockspec.losses.regression
"""
RUN = ("run", "--model", "mine:tiny", "--out", "run", "--plots", "false")
RUN += ("--estimate.num_probes", "1", "--estimate.num_steps", "2")

pytestmark = pytest.mark.slow


@functools.cache
def build_wheel():
    """A wheel, built once from a copy, since building leaves files beside the sources."""
    copy = Path(tempfile.mkdtemp(prefix="blockspec-wheel-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name in SOURCES:
        kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        kind(ROOT / name, copy / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(copy))
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(copy), *options], check=True)
    (built,) = copy.glob("*.whl")
    return built


@pytest.fixture
def wheel():
    return build_wheel()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    dist = f"blockspec-{blockspec.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"blockspec", dist}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "blockspec").rglob("*.py")}
    wanted |= {f"blockspec/runs/page/page.{kind}" for kind in ("html", "css", "js")}
    assert wanted | {"blockspec/py.typed", "blockspec/__init__.pyi"} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(f"{dist}/METADATA").decode()
    for line in (
        f"Version: {blockspec.__version__}",
        "License-Expression: MIT",
        "Classifier: ",
        "Project-URL: ",
    ):
        assert line in metadata
    for line in ("Requires-Dist: matplotlib", "Requires-Dist: torch"):
        assert line in metadata
    for name in ("datasets", "tensorboard", "plotly", "seaborn"):  # of extras alone
        lines = [line for line in metadata.splitlines() if f"Requires-Dist: {name}" in line]
        assert lines
        assert all("extra ==" in line for line in lines)


def test_a_run_from_an_empty_folder(wheel, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    folder.mkdir()
    (folder / "mine.py").write_text(FACTORY)
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "PYTHONWARNINGS": "error::ImportWarning",
    }
    program = (
        "import blockspec; print(blockspec.__file__); from blockspec.runs.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *RUN],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    assert "run folder: run" in done.stdout
    assert {"run.json", "spectra.parquet"} <= {path.name for path in (folder / "run").iterdir()}


def test_the_version_stands_in_one_place():
    assert "version" not in [
        line.split("=")[0].strip() for line in (ROOT / "pyproject.toml").read_text().splitlines()
    ]
    texts = [path.read_text() for path in (ROOT / "blockspec").rglob("*.py")]
    assert sum(f'"{blockspec.__version__}"' in text for text in texts) == 1
