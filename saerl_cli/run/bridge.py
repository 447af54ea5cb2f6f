"""Hand a command's words to Hydra through its public entry point, `hydra.main`, called as a function.

words -> sugar -> preflight (exit 2, one line, nothing written) -> lock -> Hydra -> `task.job` -> ranks
A sweep (-m) goes through `sweep.py`, between Hydra and the points.
"""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from saerl_cli.run import lock
from saerl_cli.run.configs import conf_dir, freeze_config_dirs, frozen, register_schema
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.stopping import stoppable
from saerl_cli.run.words import as_override, expand_sites, split_words

RUNS = {"-m", "--multirun", "-r", "--run", "--config-dir", "-cd"}
"""Flags under which a job really runs; any other one only shows something."""


def refuse(message: object) -> NoReturn:
    """Exit code 2: nothing was started, nothing was written."""
    print(f"saerl: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def run(name: str, words: Sequence[str]) -> None:
    """Run a command: `name` is its root config, `words` are everything after the command word."""
    try:
        with stoppable():
            run_words(name, words)
    except KeyboardInterrupt:  # outside of a run's work, which says more
        print("saerl: interrupted", file=sys.stderr)
        raise SystemExit(1) from None


def run_words(name: str, words: Sequence[str]) -> None:
    """Check the words, then have Hydra show something, do a run, or sweep."""
    folder = None
    try:
        flags, overrides = split_words(words)
        register_schema(name)
        conf = conf_dir()
        multirun = not {"-m", "--multirun"}.isdisjoint(flags)
        shows = not RUNS.issuperset(flag for flag in flags if flag.startswith("-"))  # --cfg, --info, --hydra-help, ...
        overrides = expand_sites(overrides, conf, multirun)
        if not shows:
            from saerl_cli.run.preflight import preflight

            folder, decided = preflight(name, flags, overrides, multirun)
            overrides = [*overrides, *decided]
    except ValueError as error:
        refuse(error)
    if shows:
        call_hydra(name, str(conf), [*flags, *overrides], code=2)
    elif folder is None:
        run_sweep(name, flags, overrides)
    else:
        run_single(name, str(conf), flags, overrides, folder)


def run_single(name: str, conf: str, flags: Sequence[str], overrides: Sequence[str], folder: Path) -> None:
    """Hold the run directory and do the run."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(folder))
        except ValueError as error:
            refuse(error)
        except OSError as error:
            refuse(f"{error.filename}: {error.strerror}" if error.filename else error)
        call_hydra(name, conf, [*flags, *overrides, as_override("hydra.run.dir", str(folder))], code=1)


def run_sweep(name: str, flags: Sequence[str], overrides: Sequence[str]) -> None:
    """Run the points of a sweep that are not complete, and show them all; exit code 1 unless all are complete then."""
    from saerl_cli.run.sweep import Sweep, only_missing

    words = [*flags, *(word for word in overrides if not word.startswith("hydra.sweep.dir="))]
    sweep = Sweep(name, shlex.join(["saerl", name.replace("_", "-"), *words]))
    complete = False
    try:
        with only_missing(sweep):
            call_hydra(name, str(frozen(conf_dir())), [*freeze_config_dirs(flags), *overrides], code=1)
    except KeyboardInterrupt:
        sweep.interrupt()
        if sweep.folder is None:  # nothing was begun
            raise
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
