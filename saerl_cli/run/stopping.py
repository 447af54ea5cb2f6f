"""Ctrl-C, SIGTERM and a closed terminal all stop a command alike: by one `KeyboardInterrupt`."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn signals that stop a command into `KeyboardInterrupt`; inside another such block nothing is changed.

    A command under nohup goes on when its terminal is closed.
    """
    if signal.getsignal(signal.SIGTERM) is stop:
        yield
        return
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in STOPPING if not (under_nohup and number is signal.SIGHUP)]
    saved = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def stop(number: int, frame: Any) -> NoReturn:
    """Handler of these signals. Once is enough: what follows must not be cut short."""
    for name in STOPPING:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt
