"""Data flows one way: a wing of the package imports only from the wings below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "blockspec"
FLOORS = (
    {"numerics", "model"},
    {"products", "spectra"},
    {"engine", "toolbox", "optim"},
    {"figures"},
    {"runs"},
    {"integrations"},
)
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file names in its imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {alias.name for alias in node.names}
            if names != {"__version__"}:  # which the package itself defines
                found.add(str(node.module))
    return {name for name in found if name.split(".")[0] == "blockspec"}


MODULES = sorted(path for wing in FLOOR for path in (PACKAGE / wing).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_wing_imports_only_from_wings_below_it(path):
    own = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) > 1, (
            f"{path}: import from the module that defines a name, not from the package"
        )
        wing = parts[1]
        below = FLOOR[wing] < FLOOR[own] or (own == "model" and wing == "numerics")
        assert wing == own or below, f"{path.relative_to(PACKAGE)} imports {name}"


def test_every_wing_is_known_and_the_picture_holds_no_other():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FLOOR)
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "losses.py",
    }
