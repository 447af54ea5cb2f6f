"""What the runs of an experiment are expected to take: as measured for its card, else as `saerl plan` says."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saerl_cli.run.pipeline import Task

USUAL_GB = 1.0
"""Peak memory of a run where nothing is stated."""
LEFT_OUT = ("hydra.run.dir=", "seed=")
"""Words that change nothing about a plan."""


@dataclass(frozen=True)
class Cost:
    """What a task is expected to take."""

    seconds: float | None
    memory_gb: float
    planned_for: str = ""
    """The device of a plan; empty where time and memory were measured for the card."""


def costs_of(tasks: Sequence[Task], small: bool = False) -> dict[str, Cost]:
    """Time and memory by name of a task; plans are made where the pipeline states no time, each once."""
    by_name = {task.name: task for task in tasks}
    plans: dict[tuple[str, ...], Cost] = {}
    found = {}
    for task in tasks:
        cost = cost_of(task, small)
        if cost.seconds is None and not small:
            key = (*planning_words(task), "", *words_of_saes(task, by_name))
            if key not in plans:
                plans[key] = planned(task, by_name)
            cost = plans[key]
        found[task.name] = cost
    return found


def planned(task: Task, tasks: Mapping[str, Task]) -> Cost:
    """What `saerl plan` says without timing anything; what the pipeline states where it cannot say."""
    from saerl_cli.plan.command import ELSEWHERE, PLANNED, plan
    from saerl_cli.run.launch import gpus

    command, stated = task.words[0], cost_of(task)
    if command not in PLANNED:
        return stated
    device = ELSEWHERE if task.config.gpus and not gpus() else ""
    try:
        found = plan(command, planning_words(task)[1:], device, False, words_of_saes(task, tasks))
    except ValueError:  # it reads what earlier stages have not made yet, or its words are wrong, which it will say
        return stated
    memory = found["peak_bytes"] / 1e9 if task.config.memory_gb is None else task.config.memory_gb
    return Cost(found["seconds"], memory, found["machine"]["device"])


def planning_words(task: Task) -> list[str]:
    """The words of a task that its plan depends on; the flag that is a word of its own as that word."""
    words = [word for word in task.words if not word.startswith(LEFT_OUT)]
    return ["adapter=sparse_coeffs" if word == "--sparse-coeffs" else word for word in words]


def words_of_saes(task: Task, tasks: Mapping[str, Task]) -> list[str]:
    """Those of the `saerl train-sae` that a task needs, where its SAEs are not there yet."""
    makers = [tasks[name] for name in task.needs if name in tasks and tasks[name].words[0] == "train-sae"]
    unmade = [maker for maker in makers if not Path(maker.folder).is_dir()]
    return planning_words(unmade[0])[1:] if unmade else []


def cost_of(task: Task, small: bool = False) -> Cost:
    """Time and memory of a task as its pipeline states them, from the card."""
    return Cost(None if small else task.config.seconds, task.config.memory_gb or USUAL_GB)


def expected_seconds(tasks: list[Task], jobs: int, expected: Mapping[str, Cost] | None = None) -> float | None:
    """Expected wall time, s; None when a task's is not known.

    Args:
        tasks: each after those that it needs.
        jobs: cores.
        expected: cost by name of a task; what pipelines state when None.
    """
    costs = {task.name: (expected[task.name] if expected else cost_of(task)).seconds for task in tasks}
    if any(seconds is None for seconds in costs.values()):
        return None
    ends: dict[str, float] = {}
    slots = [0.0] * jobs
    for task in tasks:  # in order, so that what a task needs has its end already
        taken = [heapq.heappop(slots) for _ in range(min(task.config.threads, jobs))]
        begin = max([*taken, *(ends[need] for need in task.needs if need in ends)])
        ends[task.name] = begin + (costs[task.name] or 0.0)
        for _ in taken:
            heapq.heappush(slots, ends[task.name])
    return max(ends.values(), default=0.0)


def memory_gb(costs: Iterable[Cost], jobs: int) -> float:
    """Peak memory if the largest tasks meet, GB."""
    return sum(sorted((cost.memory_gb for cost in costs), reverse=True)[:jobs])
