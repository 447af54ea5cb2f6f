"""Data flows downwards: a file imports from its own folder and from those before it."""

import ast
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
