"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere, nothing from further ranks."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

PLAIN_EVERY_S = 30.0


def say(message: str) -> None:
    """Print one line; only the first process of a job speaks."""
    if first_process():
        print(" ".join(message.split()), file=sys.stderr, flush=True)


def restore_terminal() -> None:
    """Begin a new line and show the cursor, which a bar that was cut short has hidden."""
    if sys.stderr.isatty():
        print("\n\x1b[?25h", end="", file=sys.stderr, flush=True)


def first_process() -> bool:
    """Whether this is the only process of a job, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def progress(items: Iterable[Any] | int, description: str, total: int | None = None, start: int = 0) -> Iterator[Any]:
    """Iterate with progress.

    Args:
        items: what to iterate over; an int counts from `start` up to it.
        description: what is being done, in a few words.
        total: number of items in all, those done earlier included; found out where it can be.
        start: items done earlier (a resumed run); a range that begins above 0 says so itself.
    """
    counted = range(start, items) if isinstance(items, int) else items
    if isinstance(counted, range):
        start, total = counted.start, counted.stop if total is None else total
    elif total is None and isinstance(counted, Sized):
        total = start + len(counted)
    with bar(total, description, start) as advance:
        for item in counted:
            yield item
            advance(1)


@contextmanager
def bar(total: int | None, description: str, start: int = 0) -> Iterator[Callable[..., None]]:
    """A bar to be moved by hand: `advance(n, note="")`.

    Args:
        total: items in all, None when unknown.
        description: what is being done.
        start: items done earlier.
    """
    if not first_process():
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        with terminal() as display:
            task = display.add_task(description, total=total, completed=start, note="")
            yield lambda n=1, note="": display.update(task, advance=n, note=note)
    else:
        line = PlainLine(description, total, start)
        yield line.advance
        line.finish()


@contextmanager
def task_bars(names: Iterable[str]) -> Iterator[Callable[[str, float, str], None]]:
    """A bar for each of several tasks that run side by side: `update(name, share, note)` with a share in [0, 1]."""
    if sys.stderr.isatty() and first_process():
        with terminal() as display:
            tasks = {name: display.add_task(name, total=1.0, note="") for name in names}
            yield lambda name, share, note: display.update(tasks[name], completed=share, note=note)
        return
    last: dict[str, float] = {}
    ended: set[str] = set()

    def update(name: str, share: float, note: str) -> None:
        now = time.monotonic()
        if name in ended or (share < 1 and now - last.setdefault(name, now) < PLAIN_EVERY_S):
            return
        last[name] = now
        ended.update([name] if share >= 1 else [])
        say(f"{name}: {share:.0%} {note}")

    yield update


def terminal():
    """A rich display for standard error: description, bar, share, times, note."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True))


class PlainLine:
    """Progress where there is no terminal: a line at the start, every half minute, and at the end."""

    def __init__(self, description: str, total: int | None, start: int):
        self.description, self.total, self.start, self.done = description, total, start, start
        self.began = self.last = time.monotonic()
        say(f"{description}: {self.count()}")

    def count(self) -> str:
        """Done, and of how many where that is known."""
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done)

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more items."""
        self.done += n
        now = time.monotonic()
        if now - self.last < PLAIN_EVERY_S:
            return
        self.last = now
        pace = (now - self.began) / max(1, self.done - self.start)
        left = f", about {pace * (self.total - self.done):.0f} s left" if self.total is not None else ""
        say(f"{self.description}: {self.count()}{left} {note}")

    def finish(self) -> None:
        """Say how long it took."""
        say(f"{self.description}: {self.count()} in {time.monotonic() - self.began:.0f} s")
