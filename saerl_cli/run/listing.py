"""The text of `saerl runs`: what is in the run directories of some folders, read from their own files."""

from collections.abc import Sequence
from pathlib import Path

from saerl_cli.run.directory import Run, shown, true_status


def listing(folders: Sequence[Path]) -> str:
    """Two lines a run: status, directory, key numbers; and its command where it can be resumed.

    Of a sweep's directory its table, which is written anew, and the runs that are not complete.
    """
    from saerl_cli.run.sweep_table import refreshed, table

    if len(folders) == 1 and (records := refreshed(folders[0])) is not None:
        runs = [Run(folders[0] / r["point"]) for r in records if r["status"] not in ("completed", "not started")]
        return "\n".join([table(records), *map(describe, runs)])
    runs = [Run.load(file.parent) for folder in folders for file in sorted(folder.rglob("run.json"))]
    if not runs:
        return f"no runs in {', '.join(map(str, folders))}"
    return "\n".join(describe(run) for run in sorted(runs, key=lambda run: run.record.get("started", "")))


def describe(run: Run) -> str:
    """The lines of one run."""
    record = run.record
    status = true_status(run, record)
    text = f"{status:<12} {record.get('job', '?'):<10} {record.get('started', '')[:16]:<17} {shown(run.path)}"
    if numbers := run.key_numbers():
        text += f"\n{'':13}{numbers}"
    if status not in ("completed", "running"):
        reason = f"{record['error']}; " if record.get("error") else ""
        text += f"\n{'':13}{reason}resume: {record.get('command', '')}"
    return text
