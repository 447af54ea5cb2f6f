"""What Hydra calls, once a run directory: make the run's record, have the work done, say how it ended."""

import contextlib
import shlex
import traceback
from pathlib import Path
from typing import Any

from saerl_cli.config import typed
from saerl_cli.run import launch, lock
from saerl_cli.run.directory import Run, shown
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.progress import restore_terminal, say
from saerl_cli.run.words import as_override


def job(cfg: Any) -> float | None:
    """Do the work of one run directory; Hydra calls this, here or on another machine.

    Returns:
        The number that a sweeper optimises.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    name = str(hydra.job.config_name)
    run = Run(hydra.runtime.output_dir)
    if run.status == "completed":
        say(f"{shown(run.path)} is complete already: {run.key_numbers()}")
        return run.record.get("result")
    config = typed(cfg, resolve(JOBS[name].schema))
    command = command_line(name, hydra)
    try:
        run.start(name, command, getattr(config, "seed", None))
        result = work(name, config, run)
    except lock.InUse as error:  # since the checks; its record is another command's
        say(f"saerl: {error}")
        raise launch.WorkFailed(str(error)) from None
    except KeyboardInterrupt:
        status, message = "interrupted", "interrupted"
    except Exception as error:
        status, message = "failed", explain(error, run)
    else:
        run.end("completed")
        say(f"done: {shown(run.path)}")
        return result
    with contextlib.suppress(OSError):  # a full disk must not hide the message
        run.end(status, message)
    restore_terminal()
    single = hydra.mode == RunMode.RUN
    if status == "interrupted" and not single:
        raise KeyboardInterrupt  # ends the sweep, which says what is left
    say(f"saerl: {message}; continue with: {command}")
    if single:
        raise SystemExit(1)
    raise launch.WorkFailed(message)  # the other points of the sweep still run


def work(name: str, config: Any, run: Run) -> float | None:
    """The job's own work, in worker processes or, for the demo, here."""
    task = JOBS[name]
    if not task.launches:
        result = resolve(task.work)(config, run)
        run.update(result=result)
        return result
    launch.check_launch(config.launch)
    try:
        launch.run_ranks(task, config.launch, run.path)
    except launch.WorkFailed:
        launch.wait_for_slurm()
        raise
    return run.record.get("result")


def explain(error: Exception, run: Run) -> str:
    """An error during work, in one line; unless the line says it all, the traceback is in RUN/error.txt."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | launch.WorkFailed):
        return message
    with contextlib.suppress(OSError):
        (run.path / "error.txt").write_text("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {message} (traceback in {shown(run.path / 'error.txt')})"


def command_line(name: str, hydra: Any) -> str:
    """What a person types to start and to resume the run of a composed job."""
    added = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    words = ["saerl", name.replace("_", "-")]
    for path in added:
        words += ["--config-dir", path]
    words += [*hydra.overrides.task, as_override("hydra.run.dir", str(shown(Path(hydra.runtime.output_dir))))]
    return shlex.join(words)
