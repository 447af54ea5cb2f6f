"""From a pipeline to the runs it stands for: every stage for every value, its words, what it waits for."""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config.pipeline import PipelineConfig, StageConfig
from saerl_cli.run.configs import conf_dir
from saerl_cli.run.jobs import JOBS

DONE = ".done"
"""Left in a run's directory when its command has ended well."""
REFERENCE = re.compile(r"\$\{([^}:]+)(?::([^}]*))?\}")
SAFE = re.compile(r"[\w/.+@%-]+")
"""Paths that Hydra's grammar takes without quotes."""

SMALL: dict[str, list[str]] = {
    "train-lm": [],
    "train-sae": ["sae.tokens=20_000", "activations.buffer_tokens=8192", "eval_tokens=2_000"],
    "eval-sae": ["eval_tokens=2_000", "probe_tokens=2_000", "control_tokens=4_096"],
    "rlhf": [
        *("algo.phases=2", "algo.rollouts=16", "checkpoint_every=1"),
        *("evaluation.samples=16", "evaluation.tracked=8", "evaluation.heldout_tokens=2_000"),
    ],
    "evaluate": ["evaluation.samples=16", "evaluation.heldout_tokens=2_000"],
    "audit": ["evaluation.samples=16", "evaluation.heldout_tokens=2_000", "top=2", "pairs=1", "draws=2", "alphas=2"],
}
"""Words that bring a command down to seconds."""
SMALL_PLANTED = [
    *("model.planted.documents=600", "model.planted.hidden_size=32", "model.planted.layers=4", "model.planted.heads=2"),
    "model.planted.steps=60",
]
"""The planted model of a small experiment: with the layers that the experiments name."""
HAVE_MODELS = ("train-lm", "train-sae", "train-reward", "rlhf")
"""Commands with settings of the planted language model."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One run of a stage."""

    stage: str
    name: str
    """`STAGE`, or `STAGE/VALUE-VALUE`: also its place in the output folder."""
    folder: Path
    words: list[str]
    """Everything after `saerl`."""
    needs: list[str]
    """Names of the tasks that must be finished first."""
    values: Values
    config: StageConfig

    @property
    def command(self) -> list[str]:
        """As a command of this very installation."""
        return [sys.executable, "-m", "saerl_cli.cli", *self.words]

    @property
    def done(self) -> Path:
        """The file that says that it is finished."""
        return self.folder / DONE


# --- pipelines -------------------------------------------------------------------------------------------------------


def known_pipelines() -> dict[str, Path]:
    """The shipped pipelines, by name."""
    return {file.stem: file for file in sorted((conf_dir() / "pipeline").glob("*.yaml"))}


def tasks_of(
    pipeline: PipelineConfig,
    out: Path,
    variables: Mapping[str, str],
    small: bool = False,
    place: Callable[[str, Values], str] | None = None,
) -> list[Task]:
    """List every run of an experiment, each after those that it needs.

    Args:
        pipeline: the experiment.
        out: folder of all runs, absolute.
        variables: what the pipeline's `variables` are.
        small: the size for tests.
        place: stage and values -> name of a run and of its folder; `task_name` when None.

    Raises:
        ValueError: a reference to what does not exist, or stages in a circle.
    """
    points = {name: values_of(pipeline, name, small) for name in pipeline.stages}
    tasks = {}
    for name in pipeline.stages:
        for values in points[name]:
            task = task_of(pipeline, name, values, points, out, variables, small, place or task_name)
            tasks[task.name] = task
    return in_order(tasks)


def values_of(pipeline: PipelineConfig, name: str, small: bool) -> list[Values]:
    """The combinations of a stage's values."""
    each = pipeline.stages[name].each
    if isinstance(each, str):
        return values_of(pipeline, each, small)
    axes = {key: list(values) for key, values in each.items()}
    if small:
        axes = {key: left(values, pipeline.small.each.get(key)) for key, values in axes.items()}
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def left(values: list[Any], chosen: list[Any] | None) -> list[Any]:
    """The values of a small experiment."""
    return values if chosen is None else [value for value in values if value in chosen]


def task_of(
    pipeline: PipelineConfig,
    name: str,
    values: Values,
    points: Mapping[str, list[Values]],
    out: Path,
    variables: Mapping[str, str],
    small: bool,
    place: Callable[[str, Values], str],
) -> Task:
    """One run of a stage."""
    stage = pipeline.stages[name]
    hydra = stage.command.replace("-", "_") in JOBS
    raw = [*stage.words, *words_of_values(stage, values)]
    if small:
        raw += SMALL.get(stage.command, [])
        raw += SMALL_PLANTED if stage.command in HAVE_MODELS and "model" not in pipeline.variables else []
        raw += pipeline.small.words.get(name, [])
    raw = last_of_each(raw) if hydra else raw
    needs = {place(other, point) for other in stage.needs for point in agreeing(points[other], values)}

    def meant(reference: re.Match[str]) -> list[str]:
        """What a reference stands for: one or more texts."""
        key, chosen = reference[1], reference[2]
        if chosen is None and key in values:
            return [str(values[key])]
        number, plus, more = key.partition("+")
        if plus and number in values:
            return [str(int(values[number]) + int(more))]
        if chosen is None and key in variables:
            return [quoted(variables[key]) if hydra else variables[key]]
        if key not in points:
            raise ValueError(f"stage {name}: ${{{key}}} is no value, variable or stage")
        fixed = dict(part.split("=", 1) for part in (chosen or "").split(",") if part)
        found = [place(key, point) for point in agreeing(points[key], values | fixed)]
        if not found:
            raise ValueError(f"stage {name}: {reference[0]} stands for no run of stage {key}")
        needs.update(found)
        folders = [str(out / other) for other in found]
        return [quoted(folder) for folder in folders] if hydra else folders

    words = [word for template in raw for word in filled(template, meant, hydra)]
    folder = out / place(name, values)
    if hydra:
        sets_threads = stage.command in LAUNCHED and not any(word.startswith("launch.threads=") for word in words)
        words += [f"launch.threads={stage.threads}"] if sets_threads else []
        words += [f"hydra.run.dir={quoted(str(folder))}"]
    else:
        words += ["--out", str(folder / "report.html")]
    return Task(name, place(name, values), folder, [stage.command, *words], sorted(needs), values, stage)


def last_of_each(words: list[str]) -> list[str]:
    """Words without those whose key comes again later: Hydra would merge mappings that should be replaced."""
    later = {word.partition("=")[0]: i for i, word in enumerate(words)}
    return [word for i, word in enumerate(words) if later[word.partition("=")[0]] == i]


LAUNCHED = tuple(name.replace("_", "-") for name, job in JOBS.items() if job.launches)
"""Commands that start workers."""


def words_of_values(stage: StageConfig, values: Values) -> list[str]:
    """The words that stand beside the values of `each`."""
    if isinstance(stage.each, str):
        return []
    added = [stage.each[key][value] for key, value in values.items() if isinstance(stage.each[key], dict)]
    return [word for words in added for word in words]


def task_name(stage: str, values: Values) -> str:
    """`runs/full-0`."""
    return "/".join([stage, *filter(None, ["-".join(str(value) for value in values.values())])])


def agreeing(points: Iterable[Values], values: Mapping[str, Any]) -> list[Values]:
    """The points of another stage that have the same values where both have one."""
    return [p for p in points if all(str(values[key]) == str(own) for key, own in p.items() if key in values)]


def filled(template: str, meant: Any, hydra: bool) -> list[str]:
    """A word with its references replaced; a word that is nothing but one may become several where Hydra is not."""
    whole = REFERENCE.fullmatch(template)
    if whole and not hydra:
        return meant(whole)

    def text(reference: re.Match[str]) -> str:
        found = meant(reference)
        inside = template[reference.start() - 1 : reference.start()] in ("[", ",")  # of a list that is written out
        return ",".join(found) if inside or len(found) == 1 else f"[{','.join(found)}]"

    return [REFERENCE.sub(text, template)]


def quoted(value: str) -> str:
    """A value for Hydra's grammar."""
    return value if SAFE.fullmatch(value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def in_order(tasks: Mapping[str, Task]) -> list[Task]:
    """Tasks after those that they need.

    Raises:
        ValueError: they need each other.
    """
    placed: dict[str, Task] = {}
    while len(placed) < len(tasks):
        waiting = [task for name, task in tasks.items() if name not in placed]
        ready = next((task for task in waiting if all(need in placed for need in task.needs)), None)
        if ready is None:
            raise ValueError(f"stages need each other: {', '.join(task.name for task in waiting)}")
        placed[ready.name] = ready
    return list(placed.values())
