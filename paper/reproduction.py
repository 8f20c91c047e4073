"""The document of what agrees: ``python -m paper.reproduction`` writes it from the results.

REPRODUCTION.md is short. A page in docs/paper/ holds every claim, figure and table of an exhibit.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from PIL import Image

from blockspec.runs.json_files import read_json
from paper import EXHIBITS
from paper.exhibit import Exhibit, Finding, as_json, find, read_findings, read_tables
from training.command import run_command

WIDTH = 1200  # pixels of an image
PREDICTION = "figure_7"  # the exhibit that asks whether heterogeneity predicts the gap
HEAD = """# The papers, reproduced

{summary}

`python -m paper.reproduction` writes this page from the tables of `python -m paper.all{scale}`.
`python -m paper.figure_8` makes one exhibit, and `--scale paper` takes the paper's own models and
data. Each section links a page with every claim, what was measured with its error, the rule that
decided, and the tables. The rules were chosen by us. A disagreement is a result.
"""


def write_document(
    *, out: str = "runs/paper", scale: Literal["small", "paper"] = "small", to: str = "."
) -> Path:
    """Writes REPRODUCTION.md, and its images below docs/paper.

    Args:
        out: Folder of all exhibits.
        scale: small or paper.
        to: Folder of the document.
    """
    folder = Path(out) / scale
    there = [name for name in EXHIBITS if (folder / name / "findings.json").exists()]
    if not there:
        raise ValueError(f"no exhibit in {folder}: python -m paper.all makes them")
    path = write(folder, there, Path(to))
    print(path)
    return path


def write(folder: Path, names: Sequence[str], to: Path) -> Path:
    """Writes the document of these exhibits, which are below ``folder``, into the folder ``to``,
    and a page for each.
    """
    findings = {name: read_findings(folder / name) for name in names}
    sections = []
    for name, found in findings.items():
        exhibit = find(name)
        images = list(_images(exhibit, folder / name, to))
        page = to / "docs" / "paper" / f"{name}.md"
        _write(page, exhibit_page(exhibit, folder / name, found, images))
        sections.append(section(exhibit, folder.name, found, images[:1]))
    return _write(to / "REPRODUCTION.md", document(folder.name, findings, sections))


def _write(path: Path, text: str) -> Path:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def document(scale: str, findings: Mapping[str, Sequence[Finding]], sections: Sequence[str]) -> str:
    """The short document: three lines of summary, and a section for each exhibit."""
    option = "" if scale == "small" else f" --scale {scale}"
    text = HEAD.format(scale=option, summary="\n".join(summary(scale, findings)))
    if missing := [f"`{name}`" for name in EXHIBITS if name not in findings]:
        text += f"\nNot measured yet: {', '.join(missing)}.\n"
    return text + "".join(f"\n{part}" for part in sections)


def summary(scale: str, findings: Mapping[str, Sequence[Finding]]) -> Iterator[str]:
    """Three lines: how many claims agree, whether heterogeneity predicts the gap, how large the
    models were.
    """
    counts = Counter(finding.verdict for found in findings.values() for finding in found)
    total = counts["agrees"] + counts["disagrees"]
    yield (
        f"- {counts['agrees']} of {total} claims agree with what we measured, and "
        f"{counts['disagrees']} do not; "
        f"{counts['not comparable']} more cannot be compared."
    )
    if prediction := findings.get(PREDICTION):
        agree = sum(finding.verdict == "agrees" for finding in prediction)
        yield (
            f"- Heterogeneity at initialisation {'predicted' if agree else 'did not predict'} the "
            "gap between Adam and SGD, in "
            f"{agree or 'any'} of {len(prediction)} combinations of a distance and a loss: "
            f"{prediction[0].measured}."
        )
    size = "small models, in minutes on two cores" if scale == "small" else "the paper's own models"
    yield f"- All of it was measured on {size}."


def section(
    exhibit: Exhibit, scale: str, findings: Sequence[Finding], images: Sequence[str]
) -> str:
    """One paragraph and one figure."""
    page = f"docs/paper/{exhibit.name}.md"
    parts = [
        f'## <a id="{exhibit.name.replace("_", "-")}"></a>{exhibit.title}',
        f"{verdict(findings)} {_setup(exhibit, scale)} [Claims, errors and tables]({page}).",
        *(f"![{exhibit.title}](docs/paper/{image})" for image in images),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(findings: Sequence[Finding]) -> str:
    """A sentence: how many claims agree, and which."""
    of_claims: dict[str, Counter[str]] = {}
    for finding in findings:
        of_claims.setdefault(finding.claim, Counter())[finding.verdict] += 1
    counts = Counter(finding.verdict for finding in findings)
    compared = counts["agrees"] + counts["disagrees"]
    if not compared:
        return "**No claim can be compared.**"
    told = [f"“{claim}” {_outcome(found)}" for claim, found in of_claims.items()]
    return f"**{counts['agrees']} of {compared} claims agree:** {'; '.join(told)}."


def _outcome(counts: Counter[str]) -> str:
    """``agrees``, or of several definitions how many agree."""
    if counts.total() == 1:
        return {"not comparable": "cannot be compared"}.get(found := next(iter(counts)), found)
    if set(counts) == {"not comparable"}:
        return "cannot be compared"
    compared = counts["agrees"] + counts["disagrees"]
    return f"agrees in {counts['agrees']} of {compared} ways to measure it"


def _setup(exhibit: Exhibit, scale: str) -> str:
    return f"{exhibit.source}. {exhibit.scales[scale].setup.rstrip('.')}."


def exhibit_page(
    exhibit: Exhibit, folder: Path, findings: Sequence[Finding], images: Sequence[str]
) -> str:
    """Every figure, claim and table of an exhibit."""
    record, tables, scale = (
        read_json(folder / "record.json"),
        read_tables(folder),
        folder.parent.name,
    )
    names = ", ".join(f"`{name}`" for name in tables)
    made = f"{record['seconds']:.0f} s, commit {record['git_commit']}"
    parts = [
        f"# {exhibit.title}",
        _setup(exhibit, scale),
        *(f"![{exhibit.title}]({image})" for image in images),
        markdown(pd.DataFrame([vars(finding) for finding in findings])),
        *(markdown(tables[name]) for name in exhibit.shown),
        f"`python -m paper.{exhibit.name}{_options(exhibit, scale, record)}`: {made}; tables: "
        f"{names}.",
    ]
    return "\n\n".join(parts) + "\n"


def _options(exhibit: Exhibit, scale: str, record: dict[str, Any]) -> str:
    """What the command line had that is not the default."""
    usual = {"seed": 0, **as_json(exhibit.scales[scale].settings)}
    changed = {
        name: value for name, value in record["settings"].items() if usual.get(name) != value
    }
    names = {name: "seed" if name == "seed" else f"settings.{name}" for name in changed}
    options = [
        f"--{names[name]}={shlex.quote(json.dumps(value))}" for name, value in changed.items()
    ]
    return "".join(
        f" {option}" for option in ([] if scale == "small" else [f"--scale={scale}"]) + options
    )


def _images(exhibit: Exhibit, folder: Path, to: Path) -> Iterator[str]:
    """Copies each figure at a modest size; gives the names of the copies."""
    images = to / "docs" / "paper"
    images.mkdir(parents=True, exist_ok=True)
    for source in sorted((folder / "figures").glob("*.png")):
        name = (
            source.stem if source.stem.startswith(exhibit.name) else f"{exhibit.name}_{source.stem}"
        )
        with Image.open(source) as image:
            height = round(image.height * min(1, WIDTH / image.width))
            small = image.convert("RGB").resize(
                (min(image.width, WIDTH), height), Image.Resampling.LANCZOS
            )
            small.quantize(256).save(images / f"{name}.png", optimize=True)
        yield f"{name}.png"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown: numbers with four digits."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    run_command(write_document)
