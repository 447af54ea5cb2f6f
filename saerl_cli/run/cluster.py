"""What a Slurm cluster can be asked for, found out before anything is submitted."""

import functools
import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import LaunchConfig

TIMEOUT_S = 30.0
"""How long `sinfo` may take to answer."""


def is_slurm(launcher: Any) -> bool:
    """Whether Hydra's settings of a launcher are those of jobs on Slurm."""
    return launcher._target_.endswith(".SlurmLauncher")


def check_slurm(launcher: Any, launch: LaunchConfig) -> None:
    """Refuse jobs that this cluster, or no cluster, can run.

    Args:
        launcher: settings of the launcher.
        launch: the processes that each job starts.

    Raises:
        ValueError: no Slurm here, no such partition, or processes that the job has no place for.
    """
    tasks = launcher.nodes * launcher.tasks_per_node
    if tasks != 1:
        raise ValueError(
            f"hydra.launcher would start {tasks} copies of every run; write nodes=1 tasks_per_node=1, a run starts its"
            " own processes (launch.num_processes)"
        )
    granted = launcher.gpus_per_node
    if not launch.cpu and launch.num_processes > 1 and granted is not None and launch.num_processes > granted:
        raise ValueError(
            f"launch.num_processes={launch.num_processes}, but a job asks Slurm for {granted} GPUs; write"
            f" hydra.launcher.gpus_per_node={launch.num_processes}"
        )
    known = nodes()
    asked = launcher.partition.split(",") if launcher.partition else sorted({n.partition for n in known if n.default})
    for name in asked:
        if name not in {node.partition for node in known}:
            there_are = ", ".join(sorted({node.partition for node in known}))
            raise ValueError(f"hydra.launcher.partition: this cluster has no partition {name}; there are {there_are}")
    usable = [node for node in known if node.partition in asked] or known
    for setting in ("cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min"):
        most = max(getattr(node, setting) for node in usable)
        if (launcher.get(setting) or 0) > most:  # Slurm would let the job wait for ever
            where = f"partition {' or '.join(asked)}" if asked else "this cluster"
            raise ValueError(
                f"hydra.launcher.{setting}={launcher[setting]}, but {where} gives a job at most {most:g}; write less,"
                " or another hydra.launcher.partition"
            )


@dataclass(frozen=True)
class Node:
    """What a node of a partition has for a job, by the names of the launcher's settings."""

    partition: str
    default: bool
    cpus_per_task: int
    mem_gb: float
    gpus_per_node: int
    timeout_min: float


def as_node(line: str) -> Node:
    """A line of `sinfo -o "%P|%c|%m|%G|%l"`: debug*|64|512000|gpu:a100:4(S:0-1)|7-00:00:00."""
    name, cpus, memory, resources, limit = line.strip().split("|")
    gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources))
    return Node(name.rstrip("*"), name.endswith("*"), int(cpus), int(memory) / 1024, gpus, minutes(limit))


def minutes(limit: str) -> float:
    """Slurm's [days-]hours:minutes:seconds; infinite where there is no limit."""
    if limit in ("infinite", "n/a"):
        return math.inf
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = ([0, 0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


@functools.cache
def nodes(
    asked: str = "hydra/launcher=slurm",
    elsewhere: str = "submit from a machine of the cluster, or take hydra/launcher=joblib",
) -> tuple[Node, ...]:
    """The cluster's nodes, once a partition that each is in.

    Args:
        asked: the words that ask for Slurm, for messages.
        elsewhere: what to do instead, for messages.

    Raises:
        ValueError: there is no Slurm, or it does not answer.
    """
    for command in ("sbatch", "sinfo"):
        if shutil.which(command) is None:
            raise ValueError(f"{asked}: there is no {command} on this machine; {elsewhere}")
    question = ["sinfo", "--noheader", "--Node", "-o", "%P|%c|%m|%G|%l"]
    try:
        found = subprocess.run(question, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"Slurm did not answer sinfo within {TIMEOUT_S:.0f} s; {elsewhere}") from None
    if found.returncode or not found.stdout.strip():
        reason = (found.stderr.strip().splitlines() or ["sinfo lists no nodes"])[-1]
        raise ValueError(f"Slurm does not answer ({reason}); {elsewhere}")
    return tuple(map(as_node, found.stdout.splitlines()))


def waiting_jobs(folder: Path) -> list[str]:
    """Jobs of a sweep that an earlier command submitted and that have not ended, as ARRAY_INDEX."""
    submitted = [path.name for path in folder.glob("*") if re.fullmatch(r"\d+(_\d+)?", path.name)]
    if not submitted or shutil.which("squeue") is None:
        return []
    listed = subprocess.run(
        ["squeue", "--noheader", "--array", "--format", "%i", "--jobs", ",".join(submitted)],
        capture_output=True,
        text=True,
    )  # fails where it has forgotten all of them
    return sorted(set(listed.stdout.split()) & set(submitted))
