"""Snakemake runs the tasks; here they are handed over and watched.

What happens to a task is read from its folder and its log, so that it shows alike where it runs: here or on a cluster.
"""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saerl_cli.reproduce import devices
from saerl_cli.reproduce.expected import cost_of
from saerl_cli.reproduce.places import host_gb, refuse_too_few_gpus, refuse_too_small_cluster
from saerl_cli.run import launch, lock
from saerl_cli.run.directory import shown
from saerl_cli.run.files import read_json, write_json
from saerl_cli.run.pipeline import Task
from saerl_cli.run.progress import say

SNAKEFILE = Path(__file__).with_name("Snakefile")
PLAN = "plan.json"
POLL_S = 0.3
DAY_MIN = 1440
GRACE_S = 30.0
"""How long stages have to end when the command is stopped."""


def check_engine(on: str, tasks: list[Task]) -> float:
    """Refuse when Snakemake, or what reaches the cluster, is not installed, or tasks need more than there is.

    Returns:
        The longest time that a job may ask for, minutes.

    Raises:
        ValueError: one line saying what to install, or to write instead.
    """
    todo = [task for task in tasks if not task.done.is_file()]
    if find_spec("snakemake") is None:
        raise ValueError("saerl reproduce needs Snakemake: pip install 'saerl[reproduce]'; --dry-run works without")
    if on == "slurm" and find_spec("snakemake_executor_plugin_slurm") is None:
        raise ValueError("--on slurm needs Snakemake's Slurm plugin: pip install 'saerl[reproduce]'")
    if on == "slurm":
        return refuse_too_small_cluster(todo, {task.name: expected_limit(task) for task in todo})
    refuse_too_few_gpus(todo)
    return math.inf


# --- the plan on disk ------------------------------------------------------------------------------------------------


def plan_of(
    tasks: list[Task], out: Path, facts: dict[str, Any], on: str = "local", longest: float = math.inf
) -> dict[str, Any]:
    """What Snakemake reads: `facts` about the reproduction, and every task as a rule.

    Args:
        tasks: the runs.
        out: their folder.
        facts: kept beside the tasks.
        on: `local` or `slurm`, which gives its jobs GPUs itself.
        longest: time that a job may ask for, minutes.
    """
    by_name = {task.name: task for task in tasks}
    rules = [
        {
            "rule": "".join(c if c.isalnum() else "_" for c in task.name),
            "task": task.name,
            "words": task.words,
            "command": f"cd {shlex.quote(os.getcwd())} && {shlex.join(with_gpus(task, on))}",
            "needs": [str(by_name[need].done) for need in task.needs],
            "done": str(task.done),
            "log": str(log_of(task, out)),
            "threads": task.config.threads,
            "gpus": task.config.gpus,
            "mem_mb": round(host_gb(task) * 1000),
            "runtime": time_limit(task, longest),
        }
        for task in tasks
    ]
    return {**facts, "tasks": rules}


def with_gpus(task: Task, on: str) -> list[str]:
    """A task's command with GPUs of its own on this machine, none where it asks for none."""
    if on != "local":
        return task.command
    if not task.config.gpus:
        return ["env", "CUDA_VISIBLE_DEVICES=", *task.command]
    own = [sys.executable, "-m", devices.__name__, str(task.config.gpus), str(devices.folder())]
    return [*own, *task.command]


def time_limit(task: Task, longest: float = math.inf) -> int:
    """Minutes that a cluster is asked for: a day where unknown, or what it gives."""
    limit = expected_limit(task)
    return int(min(DAY_MIN, longest)) if limit is None else limit


def expected_limit(task: Task) -> int | None:
    """Four times the minutes that are expected, half an hour at least; None where they are unknown."""
    seconds = cost_of(task).seconds
    return None if seconds is None else max(30, round(4 * seconds / 60))


def log_of(task: Task, out: Path) -> Path:
    """What a task prints."""
    return out / "logs" / f"{task.name}.log"


def refuse_other_plan(out: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder in which other commands were begun.

    Raises:
        ValueError: the message names a task that differs.
    """
    if not (out / PLAN).is_file():
        return
    before = {task["task"]: task["words"] for task in read_json(out / PLAN)["tasks"]}
    now = {task["task"]: task["words"] for task in plan["tasks"]}
    differs = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if differs:
        raise ValueError(
            f"{out} was begun with other stages or settings ({differs[0]}); repeat its command, or take another --out"
        )


def refuse_running(tasks: list[Task]) -> None:
    """Refuse while stages of a killed reproduction still run.

    Raises:
        ValueError: the message names stage and process.
    """
    for task in tasks:
        holder = lock.find_holder(task.folder) if task.folder.is_dir() else None
        if holder is not None:
            raise ValueError(f"stage {task.name} is still running (process {holder['pid']}); wait for it, or stop it")


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How the tasks ended."""

    finished: list[Task] = field(default_factory=list)
    failed: list[Task] = field(default_factory=list)
    waiting: list[Task] = field(default_factory=list)
    """Not begun, since they need what failed."""


def run_tasks(tasks: list[Task], out: Path, jobs: int, on: str) -> Outcome:
    """Run what is not finished yet, independent tasks side by side; says when each begins and ends."""
    todo = [task for task in tasks if not task.done.is_file()]
    if len(todo) < len(tasks):
        say(f"{len(tasks) - len(todo)} of {len(tasks)} stages are finished already")
    if not todo:
        return Outcome(finished=list(tasks))
    for task in todo:
        failed_mark(task, out).unlink(missing_ok=True)
        log_of(task, out).unlink(missing_ok=True)
    with snakemake(out, jobs, on) as engine:
        watch(todo, out, engine, before=len(tasks) - len(todo), total=len(tasks))
    outcome = Outcome()
    for task in tasks:
        finished, failed = task.done.is_file(), failed_mark(task, out).is_file()
        (outcome.finished if finished else outcome.failed if failed else outcome.waiting).append(task)
    if engine.returncode and not outcome.failed:
        say(f"saerl: Snakemake ended with exit code {engine.returncode}: see {shown(out / 'snakemake.log')}")
    return outcome


def failed_mark(task: Task, out: Path) -> Path:
    """The file that says that a task has failed in this attempt."""
    log = log_of(task, out)
    return log.with_name(f"{log.name}.failed")


@contextlib.contextmanager
def snakemake(out: Path, jobs: int, on: str) -> Iterator[subprocess.Popen]:
    """Snakemake at work on OUT/plan.json; when the block is left early it and its stages are stopped."""
    words = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE), "--configfile", str(out / PLAN)),
        *("--directory", str(out), "--keep-going", "--rerun-triggers", "mtime", "--workflow-profile", "none"),
        "--nolock",  # the folder has a lock of ours, which tells a dead holder from a living one
        *(["--cores", str(jobs)] if on == "local" else ["--executor", on, "--jobs", str(jobs)]),
        *(["--resources", f"gpu={launch.gpus()}"] if on == "local" else []),
    ]
    with (out / "snakemake.log").open("w") as log:
        engine = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    lock.name_worker(out, engine.pid)
    try:
        yield engine
        engine.wait()
    finally:
        stop(engine)


def stop(engine: subprocess.Popen) -> None:
    """End Snakemake and its stages: interrupted, then, after a while, killed."""
    if engine.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        engine.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()


def watch(todo: list[Task], out: Path, engine: subprocess.Popen, before: int, total: int) -> None:
    """Say which tasks begin and end, until Snakemake ends."""
    began: dict[str, float] = {}
    ended: set[str] = set()
    alive = True
    while alive:
        alive = engine.poll() is None  # then one more look
        for task in todo:
            if task.name not in began and log_of(task, out).is_file():
                began[task.name] = time.monotonic()
                say(f"started {task.name}")
            if task.name in ended or task.name not in began:
                continue
            word = "finished" if task.done.is_file() else "FAILED" if failed_mark(task, out).is_file() else ""
            if word:
                ended.add(task.name)
                seconds = time.monotonic() - began[task.name]
                say(f"{word} {task.name} after {seconds:.0f} s ({before + len(ended)} of {total})")
        if alive:
            time.sleep(POLL_S)


def last_line(log: Path) -> str:
    """The line of a failed task's log that says why."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    own = [line for line in lines if line.startswith("saerl: ")]
    return (own or lines or ["nothing was printed"])[-1].removeprefix("saerl: ")


def save_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write OUT/plan.json; an equal one stays as it is."""
    if not (out / PLAN).is_file() or read_json(out / PLAN) != plan:
        write_json(out / PLAN, plan)
