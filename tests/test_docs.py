"""The documentation site is built without a warning, and holds what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockspec
from blockspec.integrations import HOMES
from blockspec.runs import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """As docs/build.sh does it, in a folder of its own."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    command += ["-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-5000:]
    return out / "html"


def text_of(page):
    return re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))


def test_every_public_name_is_described(site):
    page = (site / "reference/python.html").read_text(encoding="utf-8")
    for name in set(blockspec.__all__) - {"__version__", "losses"}:
        assert f'id="blockspec.{name}"' in page, name
    assert 'id="blockspec.losses.next_token"' in page
    for name in HOMES:  # of what is imported when it is asked for
        assert f'id="blockspec.integrations.{name}"' in page, name


def test_every_command_is_described_as_its_help_does(site):
    page = text_of(site / "reference/command_line.html")
    for name in cli.COMMANDS:
        assert f"usage: blockspec {name}" in page or f"blockspec [options] {name}" in page, name
    assert "--estimate.num_steps" in page


def test_examples_show_their_figures(site):
    for script in (ROOT / "docs/gallery").glob("*.py"):
        page = (site / f"examples/{script.stem}.html").read_text(encoding="utf-8")
        assert f"sphx_glr_{script.stem}_001.png" in page, script


def test_pages_for_language_models(site):
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# blockspec"
    pages = [found[1] for line in lines if (found := re.search(r"\]\(([^)]+)\)", line))]
    assert len(pages) > 30
    assert all((site / page).exists() for page in pages)
    assert not any("Go to the end" in line for line in lines)  # a note of sphinx-gallery


def test_a_colon_in_the_text_of_an_attribute_is_no_type(site):
    text = text_of(site / "reference/python.html")
    assert "What it is among others of its kind" in text
    assert not re.search(r"Type:\s*What", text)


def test_nothing_of_the_site_is_tracked():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"/build/", "/docs/examples/"} <= set(ignored)
