"""`saerl reproduce NAME`: plan an experiment, run its stages, compare the outcome with what its card recorded.

OUT/STAGE/...       run directories of the stages
OUT/logs/           what each printed
OUT/plan.json       the stages as Snakemake reads them
OUT/snakemake.log   what Snakemake printed
OUT/verdict.json    the comparison
"""

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saerl_cli.config.pipeline import PipelineConfig, load_pipeline
from saerl_cli.reproduce import engine, verdict
from saerl_cli.reproduce.expected import Cost, costs_of, expected_seconds, memory_gb
from saerl_cli.reproduce.places import brought_down, refuse_missing
from saerl_cli.run import lock
from saerl_cli.run.directory import git_state, shown, versions
from saerl_cli.run.files import write_json
from saerl_cli.run.launch import cores
from saerl_cli.run.pipeline import Task, known_pipelines, tasks_of
from saerl_cli.run.progress import say

SCALES = ("full", "small")
PLACES = ("local", "slurm")


def reproduce(
    name: str,
    words: Sequence[str] = (),
    out: Path | None = None,
    jobs: int | None = None,
    scale: str = "full",
    on: str = "local",
    dry_run: bool = False,
    no_compare: bool = False,
) -> int:
    """Run an experiment and compare it with its record.

    Args:
        name: a shipped pipeline, or the path of a YAML file of one.
        words: `key=value` for the pipeline's variables.
        out: folder of the runs; runs/reproduce/NAME when None.
        jobs: CPU cores to use, or jobs on a cluster at a time; what this machine has when None.
        scale: `full`, or `small`: seconds a stage, whose numbers mean nothing and are not compared.
        on: `local` or `slurm`.
        dry_run: only show the stages, their commands and what they are expected to take.
        no_compare: run without comparing.

    Returns:
        Exit code: 0 when everything finished and agrees, else 1.

    Raises:
        ValueError: refused before any work, in one line.
    """
    small = scale == "small"
    pipeline = find_pipeline(name)
    variables = read_variables(pipeline, words)
    refuse_choice("--scale", scale, SCALES)
    refuse_choice("--on", on, PLACES)
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be >= 1, got {jobs}")
    jobs = jobs or cores()
    out = (out or Path("runs", "reproduce", pipeline.name + "-small" * small)).absolute()
    tasks = tasks_of(pipeline, out, variables, small)
    tasks = [brought_down(task) for task in tasks] if small else tasks
    refuse_missing(pipeline, variables, tasks)
    record = None if small or no_compare else verdict.load_record(pipeline)
    if dry_run:
        show_plan(pipeline, tasks, jobs, small)
        return 0
    longest = engine.check_engine(on, tasks)
    facts = {"pipeline": pipeline.name, "scale": scale, "variables": variables}
    plan = engine.plan_of(tasks, out, facts, on, longest)
    begin(out, tasks, plan)
    try:
        return carry_out(pipeline, tasks, out, jobs, on, record, small)
    except KeyboardInterrupt:
        say("saerl: interrupted; repeat this command to go on")
        return 1
    finally:
        lock.release(out)


def begin(out: Path, tasks: list[Task], plan: dict[str, Any]) -> None:
    """Lock the folder and write the plan into it.

    Raises:
        ValueError: it cannot be written, is in use, or was begun with other settings.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(None, "Permission denied", str(out))
        lock.acquire(out)
    except lock.InUse as error:
        raise ValueError(str(error).replace("hydra.run.dir", "--out")) from None
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror}; take another --out") from None
    try:
        engine.refuse_other_plan(out, plan)
        engine.refuse_running(tasks)
        engine.save_plan(out, plan)
    except ValueError:
        lock.release(out)
        raise


def carry_out(
    pipeline: PipelineConfig, tasks: list[Task], out: Path, jobs: int, on: str, record: Any, small: bool
) -> int:
    """Run the tasks, then compare; returns the exit code."""
    say(
        f"{pipeline.name}: {len(tasks)} stages in {shown(out)}, {jobs} {'cores' if on == 'local' else 'jobs at a time'}"
    )
    outcome = engine.run_tasks(tasks, out, jobs, on)
    if len(outcome.finished) < len(tasks):
        for task in outcome.failed:
            log = engine.log_of(task, out)
            say(f"saerl: stage {task.name} failed: {engine.last_line(log)} (all it printed: {shown(log)})")
        say(
            f"saerl: {len(outcome.finished)} of {len(tasks)} stages are finished, {len(outcome.failed)} failed,"
            f" {len(outcome.waiting)} did not begin; repeat this command to do what is missing"
        )
        return 1
    if record is None:
        why = "the small scale shows only that every stage runs" if small else "nothing to compare with was asked for"
        say(f"all {len(tasks)} stages are finished; not compared with the card: {why}")
        return 0
    return judge(pipeline, tasks, out, record)


# --- the verdict -----------------------------------------------------------------------------------------------------


def judge(pipeline: PipelineConfig, tasks: list[Task], out: Path, record: Any) -> int:
    """Compare, print, write verdict.json; returns the exit code."""
    try:
        checks = verdict.compare(pipeline, tasks, record)
    except ValueError as error:
        say(f"saerl: {error}")
        return 1
    found = verdict.drifts(checks)
    drifted = {metric: drift for metric, drift in found.items() if abs(drift) > pipeline.drift}
    bad = [check for check in checks if not check.ok]
    agrees = not bad and not drifted
    notes = verdict.other_versions(record)
    write_json(
        out / "verdict.json",
        {
            "pipeline": pipeline.name,
            "card": pipeline.card,
            "verdict": "reproduced" if agrees else "not reproduced",
            "notes": notes,
            "recorded": {key: record.get(key) for key in ("commit", "versions", "hardware")},
            "here": {"commit": git_state()["git_commit"], "versions": versions()},
            "tolerance": {"intervals": pipeline.intervals, "drift": pipeline.drift, "why": pipeline.why},
            "metrics": [check.plain() for check in checks],
            "drift": [{"metric": m, "drift": d, "ok": m not in drifted} for m, d in found.items()],
        },
    )
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table_of(checks, pipeline))
    for metric, drift in found.items():
        word = "ok" if metric not in drifted else "FAIL"
        console.print(f"mean drift of {metric}: {drift:+.2f} tolerances (limit {pipeline.drift:g}) {word}")
    for note in notes:
        console.print(f"Note: {note}.", soft_wrap=True)
    count = f"{len(checks) - len(bad)} of {len(checks)} numbers within tolerance"
    console.print(
        f"{pipeline.name}: {'REPRODUCED' if agrees else 'NOT REPRODUCED'}, {count}"
        + (f", {len(drifted)} of {len(found)} metrics drift" if drifted else "")
        + f"; details in {shown(out / 'verdict.json')}",
        soft_wrap=True,
    )
    return 0 if agrees else 1


def table_of(checks: list[verdict.Check], pipeline: PipelineConfig) -> Table:
    """The comparison, a line a number."""
    title = f"{pipeline.name} against card {pipeline.card}"
    table = Table(title=title, title_justify="left")
    for column in ("metric", "of", "recorded", "got", "difference", "tolerance", "verdict"):
        table.add_column(column, justify="left" if column in ("metric", "of", "verdict") else "right")
    for check in checks:
        recorded = f"{check.recorded:.4g}" + (f" ± {check.half:.2g}" if check.half is not None else "")
        got = "not reached" if check.got is None else f"{check.got:.4g}"
        difference = "–" if check.difference is None else f"{check.difference:+.2g}"
        table.add_row(
            *(check.metric, check.label, recorded, got, difference, f"{check.tolerance:.2g}"),
            "ok" if check.ok else "FAIL",
        )
    return table


# --- before any work -------------------------------------------------------------------------------------------------


def find_pipeline(name: str) -> PipelineConfig:
    """A pipeline by name, or by the path of its file.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name.endswith((".yaml", ".yml")):
        return load_pipeline(Path(name))
    known = known_pipelines()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no experiment {name}{hint} There are {', '.join(known)}")
    return load_pipeline(known[name])


def read_variables(pipeline: PipelineConfig, words: Sequence[str]) -> dict[str, str]:
    """`key=value` words; paths that exist become absolute, since stages may run elsewhere.

    Raises:
        ValueError: a variable is missing or unknown.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in pipeline.variables:
            there = ", ".join(f"{name}=…" for name in pipeline.variables) or "none"
            raise ValueError(f"{word} is no variable of {pipeline.name}; there are: {there}")
        given[key] = str(Path(value).absolute()) if Path(value).exists() else value
    missing = [name for name in pipeline.variables if name not in given]
    if missing:
        asked = " ".join(f"{name}={name.upper()}" for name in pipeline.variables)
        meant = "; ".join(f"{name.upper()} is {pipeline.variables[name]}" for name in missing)
        raise ValueError(f"{pipeline.name} needs {asked}: {meant}")
    return given


def refuse_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that an option does not have."""
    if value not in choices:
        raise ValueError(f"{option} must be {' or '.join(choices)}, got {value}")


def show_plan(pipeline: PipelineConfig, tasks: list[Task], jobs: int, small: bool) -> None:
    """Print stages, commands, expected time and memory."""
    print(f"{pipeline.name}: {pipeline.question}")
    costs = costs_of(tasks, small)
    for task in tasks:
        print(f"\n# {task.name}: {line_of(task, costs[task.name], small)}\n{short(task)}")
    todo = [task for task in tasks if not task.done.is_file()]
    total = expected_seconds(todo, jobs, costs)
    plans = any(costs[task.name].planned_for for task in todo)
    where = ", partly as `saerl plan` says" if plans else " on two CPU cores"
    time = "minutes" if small else "an unknown time" if total is None else f"about {duration(total)}{where}"
    memory = memory_gb((costs[task.name] for task in todo), jobs)
    print(f"\n{len(todo)} of {len(tasks)} stages to run, {jobs} cores: {time}, up to {memory:.1f} GB")


def line_of(task: Task, cost: Cost, small: bool) -> str:
    """What a task waits for and costs."""
    if task.done.is_file():
        return "finished"
    time = "seconds" if small else "unknown time" if cost.seconds is None else f"{cost.seconds:.0f} s"
    plan = f" (planned for {cost.planned_for})" if cost.planned_for else ""
    after = f", after {', '.join(task.needs)}" if task.needs else ""
    return f"{time}{plan}, {counted(task.config.threads, 'thread')}, {cost.memory_gb:.3g} GB{after}"


def counted(count: int, what: str) -> str:
    """1 thread, 2 threads."""
    return f"{count} {what}{'s' * (count != 1)}"


def short(task: Task) -> str:
    """The command, with paths as a person would type them here."""
    here = f"{Path.cwd()}{os.sep}"
    return shlex.join(["saerl", *(word.replace(here, "") for word in task.words)])


def duration(seconds: float) -> str:
    """90 s, 12 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
