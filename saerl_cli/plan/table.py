"""A plan as text."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

HEAD = ("", "times", "operations", "seconds", "in all", "peak memory")


def text_of(found: dict[str, Any]) -> str:
    """Tables of parameters, memory and time, and what was assumed."""
    machine, processes = found["machine"], found["processes"]
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)} a process" if machine["measured"] else ""
    many, unknown = f"{processes} x " if processes > 1 else "", "" if found["timed"] else " (not measured)"
    peak = f"{size(found['peak_bytes'])} a process, in {found['peak_phase']}"
    cpu = f", {found['cpu_seconds']:,.0f} CPU seconds" if found["cpu_seconds"] else ""
    age = f"; from short runs {ago(found['timed'])} (--again runs them once more)" if found["timed"] else unknown
    disk = ", ".join(f"{name} {size(n)}" for name, n in found["disk_bytes"].items())
    return "\n".join(
        [
            f"saerl {found['command']} on {many}{machine['device']}{threads}{unknown}",
            "",
            "Parameters",
            *columns((name, f"{n:,}") for name, n in found["parameters"].items()),
            "",
            f"Memory of {'a' if processes > 1 else 'the'} process, held throughout",
            *columns((name, size(n)) for name, n in found["stays_bytes"].items()),
            "",
            "Phases",
            *columns([HEAD, *map(phase_row, found["phases"])]),
            "",
            f"Peak memory  {peak}: {'fits' if found['fits'] else 'does NOT fit'} into {size(machine['memory_bytes'])}",
            f"Time         {duration(found['seconds'])}{cpu}{age}",
            *([f"Disk         {disk}"] if disk else []),
            *(f"note: {note}" for note in found["notes"]),
        ]
    )


def phase_row(phase: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table of phases."""
    return (
        phase["name"],
        f"{phase['count']:,}",
        f"{phase['flops']:.2g}" if phase["flops"] else "-",
        f"{phase['seconds']:.3g}",
        duration(phase["count"] * phase["seconds"]),
        size(phase["peak_bytes"]),
    )


def columns(table: Iterable[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    lines = list(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in lines
    ]


def size(value: float) -> str:
    """Bytes in mebi- or gibibytes."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def ago(moment: str) -> str:
    """How long ago something was."""
    return f"{duration((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())} ago"
