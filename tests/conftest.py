"""Fixtures for all tests: an offline, single-threaded process, and the data and models that several tests share."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest

ROOT = Path(__file__).parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SAERL_CACHE"] = str(ROOT / ".cache" / "tests")
os.environ["OMP_NUM_THREADS"] = "1"

TINY_PLANTED = {
    "documents": 400,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "context_size": 64,
    "steps": 60,
    "batch_size": 16,
}
"""Settings of a model that trains in seconds; enough for mechanics, not for claims."""
TINY_WORDS = [f"model.planted.{key}={value}" for key, value in TINY_PLANTED.items()]
"""The same, as words for the command line."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests share two cores, and a fixed number of threads keeps sums in one order."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # else OMP_NUM_THREADS above decides when it is imported


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and texts, beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder.name} of real models and texts at ../shared/data")
    return folder


@pytest.fixture(scope="session")
def tiny_planted_model() -> Path:
    """Folder of a tiny planted model, trained once and kept in .cache/tests."""
    from saerl_cli.config.groups import PlantedConfig
    from saerl_cli.planted.cache import planted_model

    return planted_model(PlantedConfig(**TINY_PLANTED))


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working directory in which commands find the package; Hydra's log handlers are removed afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:], root.level = handlers, level  # they hold the test runner's closed streams


@pytest.fixture
def saerl(empty_place: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a process of its own, in an empty directory: `saerl("rlhf", "seed=1").returncode`."""

    def run(*words: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        return commands.start("-m", "saerl_cli.cli", *words, timeout=timeout, **env)

    return run


# --- what tests take -------------------------------------------------------------------------------------------------

SECONDS = {
    "test_reproduce_small.py": 300,
    "test_shards.py": 230,
    "test_rl_dist.py": 120,
    "test_sweep.py": 120,
    "test_readme.py": 110,
    "test_processes.py": 90,
    "test_run_launch.py": 70,
    "test_sae_job.py": 60,
    "test_plan.py": 60,
    "test_rl_algos.py": 60,
    "test_reproduce.py": 50,
    "test_benchmark.py": 40,
    "test_refusals.py": 35,
    "test_cli.py": 35,
    "test_evaluate.py": 35,
    "test_rl_algo_job.py": 30,
    "test_rl_trainer.py": 30,
}
"""What files that take long may take on an idle machine, their slow tests included; the longest begin first."""
OTHERS_S = 25
"""What any other file may take."""
_took: dict[str, float] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers end together when the longest files begin first; within a file the order stays."""
    items.sort(key=lambda item: -SECONDS.get(item.path.name, 0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what the tests of a file take."""
    file = report.nodeid.split("::")[0].rsplit("/", 1)[-1]
    _took[file] = _took.get(file, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the slowest files, and those that take more than twice what they may: a warning, as machines are busy."""
    slowest = sorted(_took, key=lambda file: -_took[file])[:10]
    if sum(_took.values()) < 60:
        return
    terminalreporter.section("slowest files")
    for file in slowest:
        most = SECONDS.get(file, OTHERS_S)
        late = f", more than twice the {most:.0f} s of its budget" if _took[file] > 2 * most else ""
        terminalreporter.write_line(f"{_took[file]:6.1f} s  {file}{late}", yellow=bool(late))
