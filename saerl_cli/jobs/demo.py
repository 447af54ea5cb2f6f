"""`saerl demo`: the main job on the planted model, stage by stage, each stage a command that anyone can type.

language model -> SAEs -> coefficient-only PPO next to unconstrained PPO -> both on fresh prompts -> report
"""

import shlex
import subprocess
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saerl_cli.config.demo import DemoConfig, Scale
from saerl_cli.config.pipeline import load_pipeline
from saerl_cli.jobs.report import report
from saerl_cli.run import launch
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl
from saerl_cli.run.pipeline import Task, known_pipelines, tasks_of
from saerl_cli.run.progress import say, task_bars

COLUMNS = (
    ("reward before", "reward_before", "{:.3f}"),
    ("after", "reward_after", "{:.3f}"),
    ("curse words before", "curse_share_before", "{:.2%}"),
    ("after", "curse_share_after", "{:.2%}"),
    ("removed", "curse_removed", "{:.0%}"),
    ("KL, nats", "kl", "{:.2f}"),
    ("held-out loss before", "nll_heldout_before", "{:.3f}"),
    ("after", "nll_heldout_after", "{:.3f}"),
    ("trainable", "trainable_parameters", "{:,}"),
    ("seconds", "seconds", "{:.0f}"),
)
PIPELINE = "001-demo"
"""The one description of the stages."""
FOLDERS = {
    "language_model": "train_lm",
    "saes": "train_sae",
    "runs": "{method}",
    "evaluation": "evaluate_{method}",
}
"""Stage of the pipeline -> folder of its runs here."""
OVERRIDABLE = ("train_lm", "train_sae", "sparse_coeffs", "full", "evaluate")
"""What `overrides` may name."""
MEASURED = (
    *("reward_before", "reward_after", "reward_se", "kl", "kl_se", "nll_heldout_before", "nll_heldout_after"),
    *("curse_share_before", "curse_share_after", "curse_removed"),
)
"""Numbers taken from the fresh evaluation."""


def stages(config: DemoConfig, out: Path) -> list[Task]:
    """List the runs of the demo, each after those that it needs: the stages of its pipeline, for one seed."""
    pipeline = load_pipeline(known_pipelines()[PIPELINE])
    del pipeline.stages["report"]
    pipeline.small.each = {}
    for stage in pipeline.stages.values():
        if isinstance(stage.each, dict):
            stage.each["seed"] = [config.seed]
    small = config.scale is Scale.small
    tasks = tasks_of(pipeline, out, {}, small, lambda stage, values: FOLDERS[stage].format(**values))
    for task in tasks:
        kind = "evaluate" if task.stage == "evaluation" else task.name
        task.words.extend(config.overrides.get(kind, []))
    return tasks


def check(config: DemoConfig) -> None:
    """Refuse overrides of a stage that does not exist."""
    unknown = sorted(set(config.overrides) - set(OVERRIDABLE))
    if unknown:
        raise ValueError(f"overrides.{unknown[0]}: no such stage; stages are {', '.join(OVERRIDABLE)}")


def work(config: DemoConfig, run: Run) -> float:
    """Run every stage, write summary.json and report.html, print the table.

    Returns:
        Share of curse words that coefficient-only PPO removed, in [.., 1].

    Raises:
        saerl_cli.run.launch.WorkFailed: a stage failed; its own message is above, its run directory is kept.
    """
    began = time.monotonic()
    todo = stages(config, run.path.absolute())
    for _, group in groupby(todo, key=lambda task: task.stage):
        run_stages(list(group))  # policies side by side, a core each
    folders = {task.name: task.folder for task in todo}
    policies = [task.name for task in todo if task.stage == "runs"]
    results = {name: result(folders[name], folders[f"evaluate_{name}"]) for name in policies}
    say("report")
    page = report([run.path], run.path / "report.html", describe=True)
    seconds = time.monotonic() - began
    show(results, page, seconds)
    run.summary({"policies": results, "seconds": round(seconds, 1), "report": page.name})
    return results["sparse_coeffs"]["curse_removed"] or 0.0


def result(trained: Path, evaluated: Path) -> dict[str, Any]:
    """Numbers of a policy: cost from its training run, behaviour from the fresh evaluation."""
    training, fresh = read_json(trained / "summary.json"), read_json(evaluated / "summary.json")
    cost = {key: training[key] for key in ("adapter", "trainable_parameters", "seconds", "frozen_unchanged")}
    return cost | {key: fresh.get(key) for key in MEASURED}


def show(results: dict[str, dict[str, Any]], report: Path, seconds: float) -> None:
    """The closing table, on standard output."""
    table = Table(title="RLHF against cursing, on fresh prompts", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right")
    for label, key, form in COLUMNS:
        table.add_row(label, *(shown(numbers[key], form) for numbers in results.values()))
    console = Console()
    console.print(table)
    console.print(f"{seconds:.0f} s in all. Curves, features and samples: {report}", soft_wrap=True)


def shown(value: float | None, form: str) -> str:
    """A number of the table; a dash where a model wrote no curse word that could be removed."""
    return "–" if value is None else form.format(value)


# --- running stages --------------------------------------------------------------------------------------------------


def run_stages(group: list[Task]) -> None:
    """Run stages side by side; show each command first, and the progress of its metrics while it runs."""
    for stage in group:
        say(f"$ {shlex.join(['saerl', *stage.words])}")
    children = [start(stage, quiet=len(group) > 1) for stage in group]
    try:
        if len(group) > 1:
            watch(group, children)
        codes = [child.wait() for child in children]
    finally:
        launch.stop(*children)  # an interrupted demo waits until its stages have said that they are
    for stage, code in zip(group, codes, strict=True):
        finish(stage, code)


def start(stage: Task, quiet: bool) -> subprocess.Popen:
    """Start a stage; `quiet` puts its messages into DEMO/STAGE.log, as two progress bars cannot share a terminal."""
    if not quiet:
        return subprocess.Popen(stage.command)
    with stage.folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(stage.command, stdout=log, stderr=log)


def watch(group: list[Task], children: list[subprocess.Popen]) -> None:
    """Progress of stages from the last line of their metrics, until all have ended."""
    with task_bars([stage.name for stage in group]) as update:
        while any(child.poll() is None for child in children):
            for stage in group:
                update(stage.name, *progress_of(stage))
            time.sleep(0.5)


def progress_of(stage: Task) -> tuple[float, str]:
    """Share done and the latest numbers of a stage, from its files."""
    lines = read_jsonl(stage.folder / "metrics.jsonl")
    if not lines:
        return 0.0, ""
    last, config = lines[-1], Run(stage.folder).settings
    return last["phase"] / config.algo.phases, f"reward {last['reward']:.2f}  KL {last['kl']:.2f}"


def finish(stage: Task, code: int) -> None:
    """Raise when a stage failed."""
    if code == 0:
        return
    log = stage.folder.with_suffix(".log")
    last = log.read_text().strip().splitlines()[-1:] if log.is_file() else []
    raise launch.WorkFailed(" ".join([f"stage {stage.name} failed (exit {code}).", *last]))
