"""A plan as text."""

from typing import Any


def text_of(found: dict[str, Any]) -> str:
    """Tables of parameters, memory and time, and what was assumed."""
    machine, processes = found["machine"], found["processes"]
    each = "process" if processes > 1 else "the process"
    lines = [f"saerl {found['command']} on {where(machine, processes)}", ""]
    lines += ["Parameters", *rows((name, number(n)) for name, n in found["parameters"].items() if n)]
    lines += ["", f"Memory of {each}, held throughout"]
    lines += rows((name, size(n)) for name, n in found["stays_bytes"].items())
    lines += ["", "Phases", *columns([HEAD, *(phase_row(phase) for phase in found["phases"])])]
    verdict = "fits" if found["fits"] else "does NOT fit"
    measured = "" if machine["measured"] else ", not measured"
    lines += [
        "",
        f"Peak memory  {size(found['peak_bytes'])} a process, in {found['peak_phase']}: {verdict} into"
        f" {size(machine['memory_bytes'])}",
        f"Time         {duration(found['seconds'])} at full speed{measured};"
        f" {found['flops']:.3g} floating-point operations in products",
    ]
    if found["disk_bytes"]:
        disk = ", ".join(f"{name} {size(n)}" for name, n in found["disk_bytes"].items())
        lines.append(f"Disk         {disk}")
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


HEAD = ("", "times", "memory beside", "peak", "operations", "seconds", "in all")


def phase_row(phase: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table of phases."""
    return (
        phase["name"],
        number(phase["count"]),
        size(sum(phase["holds_bytes"].values())),
        size(phase["peak_bytes"]),
        f"{phase['flops']:.2g}" if phase["flops"] else "-",
        f"{phase['seconds']:.3g}",
        duration(phase["count"] * phase["seconds"]),
    )


def where(machine: dict[str, Any], processes: int) -> str:
    """The machine in words."""
    many = f"{processes} x " if processes > 1 else ""
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)} a process" if machine["measured"] else ""
    return f"{many}{machine['device']}{threads}{'' if machine['measured'] else ' (not measured)'}"


def columns(table: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def rows(pairs: Any) -> list[str]:
    """Names and numbers in two columns."""
    return columns(list(pairs) or [("nothing", "")])


def number(value: float) -> str:
    """With commas."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in mebi- or gibibytes."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
