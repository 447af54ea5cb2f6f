"""Data flows downwards: a file imports from its own folder and from those before it."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "saerl_cli"
ORDER = ("planted", "data", "models", "activations", "sae", "adapter", "rewards", "rl", "analysis", "report", "jobs")
ORDER += ("plan", "reproduce")
EVERYWHERE = ("config", "run")
FILES = sorted(PACKAGE.rglob("*.py"))


def stage(path: Path) -> str:
    """First part of a file's place in the package: `sae`, `models`, `run`, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def package_imports(path: Path) -> list[tuple[str, bool]]:
    """What a file imports of the package: first part of the name, and whether at module level."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "saerl_cli" else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        top = any(node in getattr(parent, "body", ()) for parent in [tree])
        found += [(name.split(".")[1], top) for name in names if name.startswith("saerl_cli.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path):
    here = stage(path)
    allowed = {here, *EVERYWHERE}
    if here in ORDER:
        allowed |= set(ORDER[: ORDER.index(here)])
    for imported, top in package_imports(path):
        if here == "cli":
            assert not top, "the command line imports when a command runs"
        elif here != "__init__":
            assert imported in allowed, f"{here} may not import {imported}"


def test_run_and_config_are_below_every_stage():
    for path in FILES:
        imported = {name for name, _ in package_imports(path)}
        if stage(path) == "run":
            assert imported <= {"run", "config"}
        if stage(path) == "config":
            assert imported <= {"config"}


def places(path: Path) -> tuple[str, ...]:
    """A file's place in the package: ("rl", "training", "phase"); of a package's __init__ that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_places(path: Path, known: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The places a file imports from, types among them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saerl_cli"):
            base = tuple(node.module.split(".")[1:])
            for alias in node.names:
                place = (*base, alias.name)
                while place and place not in known:
                    place = place[:-1]
                found.add(place)
    return found


def test_there_is_no_circle_in_any_folder():
    """Of a folder's files and folders none imports, over any way, itself."""
    known = {places(path) for path in FILES}
    imports = {places(path): imported_places(path, known) for path in FILES}
    for folder in sorted({place[:depth] for place in known for depth in range(len(place))}):
        depth = len(folder)
        within = [place for place in known if place[:depth] == folder and len(place) > depth]
        below: dict[str, set[str]] = {place[depth]: set() for place in within}
        for place in within:
            others = {o[depth] for o in imports[place] if o[:depth] == folder and len(o) > depth}
            below[place[depth]] |= others - {place[depth]}
        order = graphlib.TopologicalSorter(below)
        try:
            order.prepare()
        except graphlib.CycleError as error:
            raise AssertionError(f"{'/'.join(folder) or 'saerl_cli'}: {' -> '.join(error.args[1])}") from None


def test_every_stage_is_in_the_order():
    stages = {stage(path) for path in FILES} - {"__init__", "cli", "__main__"}
    assert stages <= {*ORDER, *EVERYWHERE}


@pytest.mark.parametrize("module", ["saerl_cli.cli", "saerl_cli.run.bridge", "saerl_cli.config.rlhf"])
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_files_are_short():
    long = {str(path): n for path in FILES if (n := len(path.read_text().splitlines())) > 520}
    assert not long
