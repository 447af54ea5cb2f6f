"""Does the outcome agree with what the card recorded? Metric by metric, and on average.

A metric of a row: mean over its runs (seeds), here and there. It agrees where |difference| <= tolerance, with

    tolerance = max(intervals * half the 95 % interval of the recorded mean, floor)

and its drift, the mean over all rows of difference / tolerance, must not pass `drift`: many small differences to one
side are one large one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saerl_cli.analysis.frontier import t_interval
from saerl_cli.config.pipeline import ExpectConfig, PipelineConfig
from saerl_cli.run.configs import PACKAGE
from saerl_cli.run.directory import git_state, versions
from saerl_cli.run.files import read_json
from saerl_cli.run.pipeline import REFERENCE, Task

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "numpy")
"""Those that numbers depend on."""

Row = dict[str, Any]


@dataclass
class Check:
    """A metric of a row."""

    metric: str
    label: str
    recorded: float
    half: float | None
    """Half the 95 % interval of `recorded`."""
    got: float | None
    """None where it could not be had, for instance at a KL that was not reached."""
    tolerance: float

    @property
    def difference(self) -> float | None:
        """Got minus recorded."""
        return None if self.got is None else self.got - self.recorded

    @property
    def ok(self) -> bool:
        """Whether it agrees."""
        return self.difference is not None and abs(self.difference) <= self.tolerance

    def plain(self) -> Row:
        """As a line of verdict.json."""
        return {**vars(self), "difference": self.difference, "ok": self.ok}


# --- the record ------------------------------------------------------------------------------------------------------


def record_file(card: str) -> Path:
    """results.json of a card: in the package once installed, in `experiments/` of a checkout."""
    shipped = PACKAGE / "records" / f"{card}.json"
    return shipped if shipped.is_file() else PACKAGE.parent / "experiments" / card / "results.json"


def load_record(pipeline: PipelineConfig) -> Row | None:
    """What the card recorded; None for a pipeline without a card, or whose card has no numbers yet.

    Raises:
        ValueError: it lacks rows or metrics that the pipeline compares.
    """
    if pipeline.card is None or not pipeline.expect:
        return None
    file = record_file(pipeline.card)
    if not file.is_file():
        raise ValueError(f"{file} is missing: there are no recorded numbers to compare with; take --no-compare")
    record = read_json(file)
    for part in pipeline.expect:
        rows = rows_in(record, part.record, file)
        for metric in part.wanted():
            if not any(metric in row for row in rows):
                raise ValueError(
                    f"{file} was recorded by another version: {part.record} has no {metric}; take --no-compare, or the"
                    f" saerl of commit {commit_of(record)}"
                )
    return record


def rows_in(record: Any, path: str, file: Path) -> list[Row]:
    """The rows at a dotted path: a list, or a mapping whose keys become `name`.

    Raises:
        ValueError: there is no such part.
    """
    value = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{file} was written by another version: it has no {path}")
        value = value[key]
    if isinstance(value, dict):
        return [{"name": name, **row} for name, row in value.items()]
    return [dict(row) for row in value]


def commit_of(record: Mapping[str, Any]) -> str:
    """The commits of a record, short."""
    commits = record.get("commit") or []
    return ", ".join(commit[:7] for commit in ([commits] if isinstance(commits, str) else commits)) or "unknown"


def other_versions(record: Mapping[str, Any]) -> list[str]:
    """Lines saying with what the record was made, where that is not what is here."""
    then, now = record.get("versions", {}), versions()
    release = {
        name: (then[name].split("+")[0], now.get(name, "none").split("+")[0]) for name in PACKAGES if name in then
    }
    changed = [f"{name} {old} (here {new})" for name, (old, new) in release.items() if old != new]
    here = git_state()["git_commit"]
    notes = [f"recorded with {', '.join(changed)}: differences may come from there"] if changed else []
    if here is None or here[:7] not in commit_of(record):
        this = f"commit {here[:7]}" if here else f"an installed {now.get('saerl', 'version')}"
        notes.append(f"recorded with saerl of commit {commit_of(record)}, this is {this}")
    return notes


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(pipeline: PipelineConfig, tasks: list[Task], record: Row) -> list[Check]:
    """Every metric of every row that the pipeline expects.

    Raises:
        ValueError: a result without the metric, or a row that the record does not have.
    """
    return [check for part in pipeline.expect for check in compare_part(pipeline, part, tasks, record)]


def compare_part(pipeline: PipelineConfig, part: ExpectConfig, tasks: list[Task], record: Row) -> list[Check]:
    """One entry of `expect`."""
    recorded = rows_in(record, part.record, record_file(str(pipeline.card)))
    groups: dict[str, list[tuple[Row, list[Row]]]] = {}
    for row in got_rows(part, tasks):
        matching = matches(part, row, recorded)
        if matching:  # other rows, of a site or method that the card leaves out, are nobody's business
            groups.setdefault(filled(part.label, row), []).append((row, matching))
    if not groups:
        raise ValueError(f"stage {part.stage}: no row of its results is among {part.record} of card {pipeline.card}")
    checks = []
    for metric, wanted in part.wanted().items():
        for label, pairs in groups.items():
            theirs = unique([then for _, matching in pairs for then in matching])
            values = [then.get(metric) for then in theirs]
            if any(value is None for value in values):
                continue  # nothing was recorded, for instance at a KL that was not reached
            own = [row.get(wanted.key or metric) for row, _ in pairs]
            half = theirs[0].get(f"{metric}_half") if len(theirs) == 1 else half_interval(values)
            intervals = pipeline.intervals if wanted.intervals is None else wanted.intervals
            tolerance = max(intervals * (half or 0.0), wanted.floor)
            got = None if any(value is None for value in own) else mean(own)
            checks.append(Check(metric, label, mean(values), half, got, tolerance))
    return checks


def got_rows(part: ExpectConfig, tasks: list[Task]) -> list[Row]:
    """The rows of a stage's results, each with the values of its run."""
    rows = []
    for task in (task for task in tasks if task.stage == part.stage):
        summary = read_json(task.folder / "summary.json")
        found = rows_in(summary, part.rows, task.folder / "summary.json") if part.rows else [summary]
        rows += [{**row, **task.values} for row in found]
    return [row for row in rows if all(fnmatchcase(str(row.get(key)), glob) for key, glob in part.only.items())]


def matches(part: ExpectConfig, row: Row, recorded: list[Row]) -> list[Row]:
    """The recorded rows that belong to a row of the results."""
    wanted = {key: filled(str(template), row) for key, template in part.match.items()}
    return [then for then in recorded if all(same(then.get(key), value) for key, value in wanted.items())]


def unique(rows: list[Row]) -> list[Row]:
    """Rows without the same one again: several results may belong to the same recorded rows."""
    return list({id(row): row for row in rows}.values())


def filled(template: str, row: Row) -> str:
    """A text with `${key}` replaced by what a row has there.

    Raises:
        ValueError: it has no such key.
    """

    def text(reference: re.Match[str]) -> str:
        if reference[1] not in row:
            raise ValueError(f"{template}: a result has no {reference[1]}; it has {', '.join(row)}")
        return str(row[reference[1]])

    return REFERENCE.sub(text, template)


def same(value: Any, text: str) -> bool:
    """Whether a recorded value is what a text says; 0.20 is 0.2."""
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text


def mean(values: list[Any]) -> float:
    """The mean of numbers."""
    return math.fsum(values) / len(values)


def half_interval(values: list[Any]) -> float | None:
    """Half the 95 % t-interval of a mean; None of a single value."""
    return t_interval([float(value) for value in values]).half if len(values) > 1 else None


def drifts(checks: list[Check]) -> dict[str, float]:
    """Mean of difference / tolerance over the rows of each metric; a metric of one row has none of its own."""
    found: dict[str, list[float]] = {}
    for check in checks:
        if check.difference is not None and check.tolerance > 0:
            found.setdefault(check.metric, []).append(check.difference / check.tolerance)
    return {metric: mean(values) for metric, values in found.items() if len(values) > 1}
