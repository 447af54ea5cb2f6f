"""What a person sees while a job works: bars on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

EVERY_S = 30.0
"""Seconds between two plain lines."""


def say(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar; `total` where the iterable has no length."""
    total = total if total is not None else len(items) if isinstance(items, Sequence) else None
    with task_bars([description]) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(description, done / total if total else 0.0, f"{done}/{total}" if total else str(done))


@contextlib.contextmanager
def task_bars(names: Sequence[str]) -> Iterator[Callable[[str, float, str], None]]:
    """Bars side by side. Yields `update(name, share done in [0, 1], text beside the bar)`."""
    if sys.stderr.isatty():
        with rich_bars(names) as update:
            yield update
    else:
        yield plain_lines(names)


@contextlib.contextmanager
def rich_bars(names: Sequence[str]) -> Iterator[Callable[[str, float, str], None]]:
    """Live bars on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {name: bars.add_task(name, total=1.0, note="") for name in names}
        yield lambda name, share, note: bars.update(tasks[name], completed=share, note=note)


def plain_lines(names: Sequence[str]) -> Callable[[str, float, str], None]:
    """Lines at the start, every EVERY_S seconds, and at the end of each task."""
    last = dict.fromkeys(names, time.monotonic())
    done = dict.fromkeys(names, False)

    def update(name: str, share: float, note: str) -> None:
        ends = share >= 1 and not done[name]
        if ends or time.monotonic() - last[name] >= EVERY_S:
            last[name], done[name] = time.monotonic(), share >= 1
            say(f"{name}: {share:.0%} {note}")

    return update
