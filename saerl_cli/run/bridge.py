"""Hand a command's words to Hydra through its public entry point, `hydra.main`, called as a function.

words -> sugar -> preflight (exit 2, one line, nothing written) -> lock -> Hydra -> `task.job` -> ranks
A sweep (-m) goes through `sweep.py`, between Hydra and the points.
"""

import contextlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from saerl_cli.run import lock
from saerl_cli.run.configs import conf_dir, freeze_config_dirs, frozen, register_schema
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.words import as_override, expand_sites, split_words

RUNS = {"-m", "--multirun", "-r", "--run", "--config-dir", "-cd"}
"""Flags under which a job really runs; any other one only shows something."""


def refuse(message: object) -> NoReturn:
    """Exit code 2: nothing was started, nothing was written."""
    print(f"saerl: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(name: str, words: Sequence[str]) -> None:
    """Run a command: `name` is its root config, `words` are everything after the command word."""
    held = None
    try:
        flags, overrides = split_words(words)
        register_schema(name)
        conf = conf_dir()
        multirun = not {"-m", "--multirun"}.isdisjoint(flags)
        shows = not RUNS.issuperset(flag for flag in flags if flag.startswith("-"))  # --cfg, --info, --hydra-help, ...
        overrides = expand_sites(overrides, conf, multirun)
        if not shows:
            from saerl_cli.run.preflight import preflight

            held, decided = preflight(name, flags, overrides, multirun)
            overrides = [*overrides, *decided]
    except ValueError as error:
        refuse(error)
    if held is not None:
        overrides = [*overrides, as_override("hydra.run.dir", str(held))]
    elif not shows:
        run_sweep(name, flags, overrides)
        return
    try:
        with stoppable():
            call_hydra(name, str(conf), [*flags, *overrides], code=2 if shows else 1)
    finally:
        if held is not None:
            lock.release(held)


def run_sweep(name: str, flags: Sequence[str], overrides: Sequence[str]) -> None:
    """Run the points of a sweep that are not complete, and show them all; exit code 1 unless all are complete then."""
    from saerl_cli.run.sweep import Sweep, only_missing

    words = [*flags, *(word for word in overrides if not word.startswith("hydra.sweep.dir="))]
    sweep = Sweep(name, shlex.join(["saerl", name.replace("_", "-"), *words]))
    complete = False
    try:
        with stoppable(), only_missing(sweep):
            call_hydra(name, str(frozen(conf_dir())), [*freeze_config_dirs(flags), *overrides], code=1)
    finally:
        if sweep.folder is not None:
            complete = sweep.conclude()
    if not complete:
        raise SystemExit(1)


def call_hydra(name: str, conf: str, words: Sequence[str], code: int) -> None:
    """Let Hydra run, sweep, submit or show; its errors become one line and the exit code `code`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from saerl_cli.run.preflight import SweepRefused
    from saerl_cli.run.refusals import readable
    from saerl_cli.run.task import job

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed with a traceback
    try:
        with argv(["saerl", *words]):
            hydra.main(version_base="1.3", config_path=conf, config_name=name)(job)()
    except SweepRefused as error:
        refuse(error)
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        print(f"saerl: {' '.join(readable(error, name, resolve(JOBS[name].schema)).split())}", file=sys.stderr)
        raise SystemExit(code) from None
    except SystemExit as end:
        raise SystemExit(code if end.code else 0) from None


@contextlib.contextmanager
def argv(words: Sequence[str]) -> Iterator[None]:
    """Hydra reads `sys.argv`."""
    saved, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = saved


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end a run as ctrl-C does: ranks stopped, status written."""

    def stop(number: int, frame: Any) -> NoReturn:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # once is enough: what follows must not be cut short
        raise KeyboardInterrupt

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    saved = {name: signal.signal(name, stop) for name in names}
    try:
        yield
    finally:
        for name, handler in saved.items():
            signal.signal(name, handler)


def complete(name: str, words: Sequence[str], incomplete: str) -> list[str]:
    """Candidates for a half-typed word, from Hydra's own completion (`-sc query=bash` reads COMP_LINE)."""
    register_schema(name)
    out = io.StringIO()
    saved = os.environ.get("COMP_LINE")
    os.environ["COMP_LINE"] = " ".join(["saerl", *words, incomplete])
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
        ):
            call_hydra(name, str(conf_dir()), ["-sc", "query=bash"], code=0)
    finally:
        os.environ.pop("COMP_LINE")
        if saved is not None:
            os.environ["COMP_LINE"] = saved
    return out.getvalue().split()
