"""Where stages run, found out before any work: what this machine or a cluster has for them, and whether files exist."""

import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from saerl_cli.config.pipeline import PipelineConfig
from saerl_cli.reproduce.expected import cost_of
from saerl_cli.run import cluster, launch
from saerl_cli.run.directory import shown
from saerl_cli.run.pipeline import Task

SMALL_GB = 4.0
"""Memory of a stage of the small scale, GB."""
LEAST_GB = 8.0
"""Host memory of a stage with a GPU for which none is stated: libraries, and a small model's weights on their way."""


def brought_down(task: Task) -> Task:
    """A task of the small scale, which needs no GPU and little memory."""
    memory = min(SMALL_GB, cost_of(task).memory_gb)
    return replace(task, config=replace(task.config, gpus=0, host_gb=memory))


def host_gb(task: Task) -> float:
    """Memory of the machine that a task needs, GB: as stated, a number or by the value of one of its `each`.

    Where nothing is stated that of the card; with a GPU, whose memory that is, at least as much, since what is on the
    GPU was read through the machine's memory.

    Raises:
        ValueError: what is stated leaves out the task's value.
    """
    stated = task.config.host_gb
    if isinstance(stated, dict):
        key, sizes = next(iter(stated.items()))
        if task.values.get(key) not in sizes:
            raise ValueError(f"stage {task.name}: host_gb says nothing of {key}={task.values.get(key)}")
        stated = sizes[task.values[key]]
    if stated is not None:
        return float(stated)
    return max(LEAST_GB if task.config.gpus else 0.0, cost_of(task).memory_gb)


# --- refusing --------------------------------------------------------------------------------------------------------


def refuse_missing(pipeline: PipelineConfig, variables: Mapping[str, str], tasks: Sequence[Task]) -> None:
    """Refuse variables that are files or folders by their description, and do not exist though a task reads them.

    Raises:
        ValueError: the message names the variable and what it is.
    """
    for key, value in variables.items():
        meant = pipeline.variables[key]
        kind = next((kind for kind in ("folder", "file") if re.search(rf"\b{kind}\b", meant)), None)
        there = {"folder": os.path.isdir, "file": lambda path: os.path.isfile(path) or bool(glob.glob(path))}
        read = any(value in word for task in tasks for word in task.words)
        if kind is not None and read and not there[kind](value):
            raise ValueError(f"{key}={shown(Path(value))}: there is no such {kind}; {key} is {meant}")


def refuse_too_few_gpus(tasks: Sequence[Task]) -> None:
    """Refuse tasks that need more GPUs than this machine has.

    Raises:
        ValueError: the message names one.
    """
    here = launch.gpus()
    for task in tasks:
        if task.config.gpus > here:
            raise ValueError(
                f"stage {task.name} needs {plural(task.config.gpus, 'GPU')}, and this machine has {here or 'none'};"
                " take --on slurm, or --scale small, which shows that every stage runs without any"
            )


def refuse_too_small_cluster(tasks: Sequence[Task], minutes: Mapping[str, float | None]) -> float:
    """Refuse tasks for which the cluster has no node.

    Args:
        tasks: what will be submitted.
        minutes: the time that each will ask for, by its name; None where it will ask for what it may have.

    Returns:
        The longest time that a job may ask for, minutes.

    Raises:
        ValueError: no Slurm here, or no partition that gives what a task needs; the message names both.
    """
    known = cluster.nodes("--on slurm", "start the command on a machine of the cluster, or take --on local")
    chosen = "SNAKEMAKE_PROFILE" in os.environ  # which may name any partition
    usable = [node for node in known if node.default and not chosen] or list(known)
    where = f"partition {' or '.join(sorted({node.partition for node in usable}))}"
    for task in tasks:
        asked = {
            "cpus_per_task": ("CPU cores", task.config.threads),
            "gpus_per_node": ("GPUs", task.config.gpus),
            "mem_gb": ("GB of memory", host_gb(task)),
            "timeout_min": ("minutes", minutes[task.name] or 0),
        }
        for setting, (unit, amount) in asked.items():
            most = max(getattr(node, setting) for node in usable)
            if amount > most:
                raise ValueError(
                    f"stage {task.name} needs {amount:g} {unit}, but {where} gives a job at most {most:g}; name another"
                    " partition in a Snakemake profile (SNAKEMAKE_PROFILE=DIR), or take --scale small"
                )
        if not any(all(getattr(node, key) >= amount for key, (_, amount) in asked.items()) for node in usable):
            needs = ", ".join(f"{amount:g} {unit}" for unit, amount in asked.values() if amount)
            raise ValueError(f"stage {task.name} needs {needs}, but no node of {where} has all of that")
    return max((node.timeout_min for node in usable), default=math.inf)


def plural(count: int, what: str) -> str:
    """1 GPU, 2 GPUs."""
    return f"{count} {what}{'s' * (count != 1)}"
