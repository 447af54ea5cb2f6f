"""What is built and shipped: configs in the wheel, honest metadata, exact constraints."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_ships_every_config_and_nothing_from_outside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("saerl_cli/conf/") for name in names if name.startswith("saerl_cli/conf/")}
    assert shipped == {
        path.relative_to(ROOT / "conf").as_posix()
        for path in (ROOT / "conf").rglob("*.yaml")
        if "local" not in path.relative_to(ROOT / "conf").parts
    }
    assert {name.split("/")[0] for name in names} == {"saerl_cli", wheel.name.split("-py3")[0] + ".dist-info"}
    assert {"saerl_cli/py.typed", "saerl_cli/cli.py"} <= set(names)
    assert {"saerl_cli/reproduce/Snakefile", "saerl_cli/run/examples.md"} <= set(names)
    records = {name.removeprefix("saerl_cli/records/") for name in names if name.startswith("saerl_cli/records/")}
    assert "001-demo.json" in records and records <= {
        f"{path.stem}.json" for path in (ROOT / "conf/pipeline").iterdir()
    }
    web = {path.name for path in (ROOT / "saerl_cli" / "report" / "web").iterdir()}
    assert web and web == {Path(name).name for name in names if name.startswith("saerl_cli/report/web/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_finds_its_configs(wheel, empty_place):
    """Unpacked, it is what pip installs: the configs are inside the package."""
    zipfile.ZipFile(wheel).extractall(empty_place / "site")
    command = [sys.executable, "-P", "-c", "from saerl_cli.cli import main; main()", "train-sae", "--cfg", "job"]
    shown = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(empty_place / "site")})
    assert shown.returncode == 0, shown.stderr
    assert "architecture: topk" in shown.stdout
    found = subprocess.run(
        [*command[:3], "from saerl_cli.run.configs import conf_dir; print(conf_dir())"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(empty_place / "site")},
    )
    assert found.stdout.strip() == str(empty_place / "site" / "saerl_cli" / "conf")


def test_every_import_is_a_declared_dependency():
    declared = {re.split(r"[<>=\[~! ]", line)[0].lower() for line in PROJECT["dependencies"]}
    of_module = metadata.packages_distributions()
    standard = sys.stdlib_module_names | {"saerl_cli"}
    for path in (ROOT / "saerl_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for module in {name.split(".")[0] for name in names} - standard:
                providers = {name.lower() for name in of_module.get(module, [])}
                assert providers & declared, f"{path.name} imports {module}, which pyproject.toml does not declare"


def test_constraints_are_exact_and_installed():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert all("+" not in version for version in pinned.values()), "a local tag would match one build of torch only"
    for package in ("torch", "trl", "transformers", "peft", "accelerate", "hydra-core", "typer", "datasets"):
        assert metadata.version(package).split("+")[0] == pinned[package]


def test_the_changelog_and_citation_name_this_version():
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_make_help_describes_every_target():
    text = (ROOT / "Makefile").read_text()
    shown = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True).stdout
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    for target in " ".join(phony).split():
        assert re.search(rf"^\s*{target}\s+\S", shown, re.M), f"make help does not describe {target}"
