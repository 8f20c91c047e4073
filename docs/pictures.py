"""Finds the figures of an example of the gallery: they are no figures of pyplot."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

SEEN = "figures that an earlier part of the example has shown"


def figures_of(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Saves the matplotlib figures among the example's variables that no earlier part had."""
    variables = block_vars["example_globals"]
    shown = variables.setdefault(f"__{SEEN}", set())
    paths = []
    for value in list(variables.values()):
        if isinstance(value, Figure) and id(value) not in shown:
            shown.add(id(value))
            path = next(block_vars["image_path_iterator"])
            value.savefig(path, dpi=150)
            paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])
