"""The documentation site: ``bash docs/build.sh``.

Pages are Markdown. What can be read off the code is made while the site is built: the reference of
the public names, the command line's help, the list of pages for language models.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
os.environ |= {"COLUMNS": "96", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

from sphinx.application import Sphinx  # noqa: E402
from sphinx.pycode import ModuleAnalyzer  # noqa: E402

import blockspec  # noqa: E402
from blockspec import losses  # noqa: E402

project = "blockspec"
author = "the authors of blockspec"
version = release = blockspec.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery", "**/sg_execution_times.rst"]
html_theme = "furo"
html_title = f"blockspec {version}"
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
myst_heading_anchors = 3
autoclass_content = "both"  # what a class is made from may be told at __init__
napoleon_use_ivar = True  # fields of named tuples are described once
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "examples",
    "filename_pattern": r".*\.py$",
    "image_scrapers": ("pictures.figures_of",),
    "reset_modules": (),
    "min_reported_time": 1e9,  # no times: they are another machine's
    "write_computation_times": False,
    "show_memory": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
    "show_signature": False,
}

MODULES = {  # what has no public name of its own, by the page's heading
    "Losses": ["blockspec.losses"],
    "Optimizer": ["blockspec.optim"],
    "Directions and sharpness": ["blockspec.toolbox.directions", "blockspec.toolbox.sharpness"],
    "Spectra, further": ["blockspec.spectra.tails", "blockspec.spectra.heterogeneity"],
    "Operators": ["blockspec.products.operators"],
    "Figures": ["blockspec.figures.plots", "blockspec.figures.toolbox"],
    "Training loops": ["blockspec.integrations"],
}


def public_names() -> str:
    """A directive of autodoc for each name that ``blockspec/__init__.pyi`` lists."""
    names = [name for name in blockspec.__all__ if name not in ("losses", "__version__")]
    return described("blockspec", names)


def modules() -> str:
    public = {getattr(blockspec, name) for name in blockspec.__all__}
    parts = []
    for heading, paths in MODULES.items():
        parts.append(f"## {heading}")
        for path in paths:
            module = import_module(path)
            names = {
                **vars(module),
                **{n: getattr(module, n) for n in getattr(module, "HOMES", ())},
            }
            found = {n: v for n, v in names.items() if is_ours(n, v) and v not in public}
            public |= set(found.values())
            parts += [f"`{path}`: {(module.__doc__ or '').strip()}", described(path, found)]
    return "\n\n".join(parts)


def is_ours(name: str, value: Any) -> bool:
    """A class or function of the package: no constant, and nothing from elsewhere."""
    known = isinstance(value, type) or inspect.isroutine(value)
    return known and not name.startswith("_") and value.__module__.startswith("blockspec")


def ready_losses() -> str:
    """The losses are objects: what they are is written below them in their modules."""
    lines = []
    for node in ast.parse(Path(losses.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            texts = ModuleAnalyzer.for_module(str(node.module)).find_attr_docs()
            for alias in node.names:
                if text := texts.get(("", alias.name)):
                    lines.append(f".. py:data:: blockspec.losses.{alias.name}\n")
                    lines += [f"   {line}" for line in text]
    return fenced("eval-rst", lines)


def described(module: str, names: Iterable[str]) -> str:
    lines = []
    for name in names:
        is_class = isinstance(getattr(import_module(module), name), type)
        kind = "autoclass" if is_class else "autofunction"
        lines += [f".. {kind}:: {module}.{name}", *["   :members:"] * is_class, ""]
    return fenced("eval-rst", lines)


def commands() -> str:
    """The help of each command, as it prints it."""
    from blockspec.runs import cli

    return "\n\n".join(f"## {name}\n\n{fenced('text', [help_of(name)])}" for name in cli.COMMANDS)


def help_of(command: str) -> str:
    from blockspec.runs import cli

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return out.getvalue()


def fenced(language: str, lines: list[str]) -> str:
    return "\n".join(
        [f"```{{{language}}}" if language == "eval-rst" else f"```{language}", *lines, "```"]
    )


def other_pages() -> str:
    """Pages that no list of the index names: a new page is found without a change here."""
    named = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = sorted(path.stem for path in DOCS.glob("*.md"))
    return "\n".join(page for page in pages if page not in named.split() and page != "index")


MADE = {
    "PUBLIC_NAMES": public_names,
    "MODULES": modules,
    "READY_LOSSES": ready_losses,
    "COMMANDS": commands,
    "OTHER_PAGES": other_pages,
}
"""A line of a page -> what stands there in the site."""

SITE = {
    "README": "/first_spectrum",
    "REPRODUCTION": "/exhibits",
    "CONTRIBUTING": "/contributing",
    "CHANGELOG": "/changelog",
}
"""Pages at the root of the checkout -> where the site has them."""


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    for name, site in SITE.items():
        source[0] = source[0].replace(f"](../{name}.md", f"]({site}.md")
    for word, made in MADE.items():
        if re.search(rf"^{word}$", source[0], re.MULTILINE):
            source[0] = re.sub(
                rf"^{word}$", lambda _, made=made: made(), source[0], flags=re.MULTILINE
            )


def escape_bars(app: Sphinx, kind: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Bars of an absolute value are no substitutions of reStructuredText."""
    for i, line in enumerate(lines):
        parts = line.split("``")  # every second one is code
        lines[i] = "``".join(p if n % 2 else p.replace("|", r"\|") for n, p in enumerate(parts))


def keep_colons(app: Sphinx, kind: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon of an attribute's first line for its type."""
    if kind in ("attribute", "data", "property") and lines and ": " in lines[0]:
        before, after = lines[0].split(": ", 1)
        lines[:1] = [f"{before}:", after]


def write_llms(app: Sphinx, error: Exception | None) -> None:
    """``llms.txt``: every page with its first sentence (https://llmstxt.org)."""
    if error or app.builder.name != "html":
        return
    lines = [f"# {project}", "", f"> {blockspec.__doc__.splitlines()[0]}", ""]
    for page in sorted(app.env.found_docs):
        title = app.env.titles[page].astext()
        lines.append(f"- [{title}]({page}.html): {first_sentence(app, page)}".rstrip(": "))
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_sentence(app: Sphinx, page: str) -> str:
    from docutils import nodes

    for paragraph in app.env.get_doctree(page).findall(nodes.paragraph):
        if not isinstance(paragraph.parent, nodes.section):
            continue  # of a note, or a cell of a table
        return re.split(r"(?<=[.?:])\s", " ".join(paragraph.astext().split()))[0]
    return ""


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True}
