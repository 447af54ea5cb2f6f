"""The record of a sweep, sweep.json, and the table made of it, sweep.csv: both follow from the points' directories."""

import contextlib
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_cli.run.directory import Run, shown, true_status
from saerl_cli.run.files import read_json, write_json, write_text

TABLE, RECORD = "sweep.csv", "sweep.json"
COLUMNS = 6
"""At most so many numbers a point are printed; sweep.csv has all."""


def write_record(folder: Path, name: str, command: str, points: dict[Path, list[str]]) -> list[dict[str, Any]]:
    """Write SWEEP/sweep.json and sweep.csv; points of earlier starts are kept, and their command if it had more."""
    file = folder / RECORD
    before = recorded(folder)
    known = before | points
    if points.keys() < before.keys():  # a part of the sweep is done again
        command = read_json(file)["command"]
    records = [record_of(folder, point, overrides) for point, overrides in known.items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"job": name, "command": command, "points": records})
    write_text(folder / TABLE, as_csv(records))
    return records


def recorded(folder: Path) -> dict[Path, list[str]]:
    """Folder -> overrides of the points that a sweep's directory has noted, begun or not; empty where it is none."""
    file = folder / RECORD
    points = read_json(file)["points"] if file.is_file() else []
    return {(folder / record["point"]).absolute(): record["overrides"] for record in points}


def refreshed(folder: Path) -> list[dict[str, Any]] | None:
    """Records of a sweep as its points stand now, written down where that is possible; None: this is no sweep."""
    folder = folder.absolute()
    file = folder / RECORD
    if not file.is_file():
        return None
    found, points = read_json(file), recorded(folder)
    with contextlib.suppress(OSError):  # somebody else's
        return write_record(folder, found["job"], found["command"], points)
    return [record_of(folder, point, overrides) for point, overrides in points.items()]


def record_of(sweep: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A point as plain data, from its run directory."""
    run = Run(folder)
    record = run.record
    return {
        "point": os.path.relpath(folder, sweep),
        "overrides": list(overrides),
        "status": true_status(run, record) if record else "not started",
        "objective": record.get("result"),
        "numbers": run.numbers(),
        "folder": str(shown(folder)),
        "error": record.get("error"),
    }


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """All of it: a line a point, a column a setting that varies and a number."""
    settings, numbers = varying(records), list(dict.fromkeys(key for r in records for key in r["numbers"]))
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["point", *settings, "status", "objective", *numbers, "folder", "error"])
    for r in records:
        own = as_pairs(r["overrides"])
        values = [own.get(key) for key in settings], [r["numbers"].get(key) for key in numbers]
        lines.writerow([r["point"], *values[0], r["status"], r["objective"], *values[1], r["folder"], r["error"]])
    return out.getvalue()


def table(records: Sequence[dict[str, Any]]) -> str:
    """The same for people: settings and numbers that differ between points, the first few of the numbers."""
    settings = varying(records)
    found = ((key, value) for r in records for key, value in r["numbers"].items())
    keys = dict.fromkeys(key for key, value in found if not (isinstance(value, str) or key.endswith("_se")))
    differ = [key for key in keys if len({r["numbers"][key] for r in records if key in r["numbers"]}) > 1]
    numbers = differ[:COLUMNS] or list(keys)[:COLUMNS]
    rows = [["point", *settings, "status", "objective", *numbers, "folder"]]
    for r in records:
        own = as_pairs(r["overrides"])
        values = [r["objective"], *(r["numbers"].get(key) for key in numbers)]
        chosen = [brief(own.get(key, "")) for key in settings]
        rows.append([r["point"], *chosen, r["status"], *map(cell, values), r["folder"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def brief(word: str) -> str:
    """A setting in a table for people: a long number rounded."""
    try:
        return word if len(word) < 10 else f"{float(word):.4g}"
    except ValueError:
        return word


def cell(value: float | None) -> str:
    """A number in a table for people."""
    return "" if value is None else f"{value:.4g}"


def varying(records: Sequence[dict[str, Any]]) -> list[str]:
    """Settings that are not the same in every point; all of them where there is one point."""
    points = [as_pairs(record["overrides"]) for record in records]
    keys = dict.fromkeys(key for point in points for key in point)
    return [key for key in keys if len(points) == 1 or len({point.get(key) for point in points}) > 1]


def as_pairs(overrides: Sequence[str]) -> dict[str, str]:
    """Words as {key: value}."""
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in overrides)}
