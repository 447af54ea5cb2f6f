"""A sweep: which of its points are still to do, who does them side by side, and what came of them.

SWEEP/N/            the run directory of a point
SWEEP/sweep.json    command, and a record a point: overrides, status, objective, numbers, folder, error
SWEEP/sweep.csv     the same as a table

Hydra's sweepers and launchers do the work. Between them stands `OnlyMissing`: it hands a launcher the points that are
not complete and answers for the others from their run directories. A sampler with a seed therefore takes up a search
where it was broken off: asked again, it proposes the same points.
"""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from saerl_cli.run import cluster, launch, lock
from saerl_cli.run.directory import Run, shown
from saerl_cli.run.files import read_json
from saerl_cli.run.preflight import SweepRefused, refuse_other_settings, refuse_other_sweep, run_dir
from saerl_cli.run.progress import say
from saerl_cli.run.sweep_table import RECORD, table, write_record
from saerl_cli.run.words import as_override


class Sweep:
    """One command with -m.

    Args:
        name: root config of the command.
        command: what a person types to start the sweep, without its directory.
    """

    def __init__(self, name: str, command: str):
        self.name, self.command = name, command
        self.folder: Path | None = None
        """The sweep's directory, once points are about to run in it."""
        self.place: Path | None = None
        """The same from the start."""
        self.interrupted = False
        self.points: dict[Path, list[str]] = {}
        """Folder -> overrides, of the points that this command asked for."""

    def plan(self, folder: Path, points: dict[Path, list[str]]) -> None:
        """Note points that are about to run, in the sweep's own files too."""
        self.folder = folder
        self.points |= points
        self.write()

    def write(self) -> list[dict[str, Any]]:
        """Write sweep.json and sweep.csv as the points stand now; returns the records of all points."""
        assert self.folder is not None
        word = as_override("hydra.sweep.dir", str(shown(self.folder)))
        return write_record(self.folder, self.name, f"{self.command} {word}", self.points)

    def interrupt(self) -> None:
        """End what does points here, and write into their directories that they were interrupted."""
        self.interrupted = True
        end_children()
        if self.folder is None and self.place is not None:
            discard(self.place)
        for folder in self.points:
            run = Run(folder)
            if run.status != "running" and lock.read_lock(folder) is None:
                continue
            with contextlib.suppress(lock.InUse, OSError):  # a job on a cluster goes on
                lock.acquire(folder)
                if run.status == "running":
                    run.end("interrupted", "interrupted")
                lock.release(folder)  # also one that its killed holder left

    def conclude(self) -> bool:
        """Print the table; one line more when points are not complete. Returns whether all are."""
        if self.folder is None:  # stopped before the first point
            return False
        records = self.write()
        print(table(records), flush=True)
        mine = {str(shown(folder)) for folder in self.points}
        left = [record for record in records if record["folder"] in mine and record["status"] != "completed"]
        if left:
            listed = ", ".join(f"{record['point']} ({why(record)})" for record in left)
            again = read_json(self.folder / RECORD)["command"]
            how = "interrupted: " * self.interrupted
            say(f"saerl: {how}{len(left)} of {len(mine)} points are not complete: {listed}; continue with: {again}")
        return not left


def discard(place: Path) -> None:
    """Remove a sweep's directory in which nothing has begun: Hydra's own file is all that is in it."""
    with contextlib.suppress(OSError):
        if {path.name for path in place.iterdir()} == {"multirun.yaml"}:
            (place / "multirun.yaml").unlink()
        os.removedirs(place)


def end_children() -> None:
    """Kill the processes that a launcher started here and what those started; their results are written atomically."""
    killed = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "resource_tracker" not in " ".join(process.cmdline()):  # joblib's, which cleans up after the others
                killed.append(lock.identity(process))
                process.kill()
    deadline = time.monotonic() + launch.GRACE_S
    while any(map(lock.lives, killed)) and time.monotonic() < deadline:
        time.sleep(0.02)


def why(record: dict[str, Any]) -> str:
    """Why a point is not complete."""
    return f"failed: {record['error']}" if record["status"] == "failed" else record["status"]


# --- between sweeper and launcher ------------------------------------------------------------------------------------


class OnlyMissing:
    """A launcher that leaves complete points alone; what runs the others is Hydra's own.

    Args:
        inner: the launcher that the user chose.
        sweep: what to keep the record in.
        parts: `hydra_context`, `task_function` and `config`, as a launcher is set up with.
    """

    def __init__(self, inner: Any, sweep: Sweep, parts: dict[str, Any]):
        self.inner, self.sweep = inner, sweep
        self.loader, self.config = parts["hydra_context"].config_loader, parts["config"]
        sweep.place = Path(self.config.hydra.sweep.dir).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Run the points that are not complete.

        Returns:
            A result a point, in their order; None is the value of one that failed.

        Raises:
            SweepRefused: a point's folder holds a run with other settings, or its job is still queued.
        """
        composed = [self.compose(overrides, initial_job_idx + number) for number, overrides in enumerate(job_overrides)]
        for folder, cfg in composed:
            refuse_other_settings(folder, self.sweep.name, cfg, in_sweep=True)
        place = Path(self.config.hydra.sweep.dir).absolute()
        refuse_other_sweep(place, self.sweep.name, dict(composed), lambda words: self.compose(words, 0)[1])
        folders = [folder for folder, _ in composed]
        missing = [
            [*overrides, as_override("hydra.sweep.subdir", os.path.relpath(folder, self.config.hydra.sweep.dir))]
            for folder, overrides in zip(folders, job_overrides, strict=True)
            if Run(folder).status != "completed"
        ]
        if missing:
            refuse_waiting(self.config.hydra)
        self.sweep.plan(
            place,
            {folder: task_words(words) for folder, words in zip(folders, job_overrides, strict=True)},
        )
        if done := len(folders) - len(missing):
            what = f"{done} of {len(folders)} points are" if len(folders) > 1 else f"{shown(folders[0])} is"
            say(f"{what} complete already")
        processes = max((cfg.get("launch", {}).get("num_processes", 1) for _, cfg in composed), default=1)
        if missing:
            self.run(missing, initial_job_idx, side_by_side(self.inner, len(folders)), processes)
        self.sweep.write()
        return [outcome(folder) for folder in folders]

    def compose(self, overrides: Sequence[str], number: int) -> tuple[Path, Any]:
        """Folder and settings of a point."""
        from omegaconf import open_dict

        cfg = self.loader.load_sweep_config(self.config, list(overrides))
        folder = run_dir(cfg, number)
        with open_dict(cfg):
            del cfg["hydra"]
        return folder, cfg

    def run(self, points: list[list[str]], first: int, at_once: int, processes: int) -> None:
        """Launch points; a launcher's own failure is one line, and the points say what is left."""
        try:
            with sharing_cores(at_once, processes), waiting_for_all(self.inner):
                results = self.inner.launch(points, first)
            for error in filter(None, map(unsaid, results)):
                say(f"saerl: {one_line(error)}")
        except Exception as error:
            if not str(error).startswith("sbatch:"):  # which has said so itself
                say(f"saerl: {one_line(error)}")


def refuse_waiting(hydra: Any) -> None:
    """Refuse to submit points whose jobs wait in Slurm's queue from an earlier start of the sweep.

    Raises:
        SweepRefused: there are such jobs.
    """
    if cluster.is_slurm(hydra.launcher) and (jobs := cluster.waiting_jobs(Path(hydra.sweep.dir, ".submitit"))):
        raise SweepRefused(
            f"jobs {', '.join(jobs)} of this sweep are still queued or running; wait for them (saerl runs"
            f" {shown(Path(hydra.sweep.dir))}), or scancel them"
        )


def unsaid(result: Any) -> Exception | None:
    """The error of a point that ended before its run directory could say why."""
    from hydra.core.utils import JobStatus

    if result is None or result.status != JobStatus.FAILED or isinstance(result._return_value, launch.WorkFailed):
        return None
    return result._return_value


@contextlib.contextmanager
def only_missing(sweep: Sweep) -> Iterator[None]:
    """Have every launcher that Hydra makes run only what is missing."""
    from hydra.core.plugins import Plugins

    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's, which lists its plugins
    plugins: Any = Plugins.instance()
    plugins.instantiate_launcher = lambda **parts: OnlyMissing(
        type(plugins).instantiate_launcher(plugins, **parts), sweep, parts
    )
    try:
        yield
    finally:
        del plugins.instantiate_launcher  # the method of its class is back


def task_words(overrides: Sequence[str]) -> list[str]:
    """A point's own words, without Hydra's."""
    return [word for word in overrides if not word.lstrip("+~").startswith("hydra")]


def outcome(folder: Path) -> Any:
    """What a sweeper is told of a point: the number in its run.json, None unless it is complete."""
    from hydra.core.utils import JobReturn, JobStatus

    run = Run(folder)
    found = JobReturn(status=JobStatus.COMPLETED)  # of a failed point too: sweepers end at the first failure
    found.return_value = run.record.get("result") if run.status == "completed" else None
    return found


def side_by_side(launcher: Any, points: int) -> int:
    """How many points a launcher runs at once on this machine.

    joblib is told not to make room for more points than there are, so that those there are get all cores.
    """
    kind = type(launcher).__name__
    if kind == "JoblibLauncher":
        asked = launcher.joblib.get("n_jobs", -1)
        cores = asked if asked > 0 else launch.cores() + 1 + asked  # joblib's own rule: -1 is all cores, -2 all but one
        launcher.joblib["n_jobs"] = max(1, min(points, cores))
        return launcher.joblib["n_jobs"]
    return points if kind == "LocalLauncher" else 1


@contextlib.contextmanager
def sharing_cores(points: int, processes: int) -> Iterator[None]:
    """Give the processes of points side by side their share of the cores as threads; OMP_NUM_THREADS comes first."""
    if points == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, launch.cores() // (points * processes)))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextlib.contextmanager
def waiting_for_all(launcher: Any) -> Iterator[None]:
    """Of submitit: a job that died says so in one line, and the others are waited for."""
    if not type(launcher).__module__.startswith("hydra_plugins.hydra_submitit"):
        yield
        return
    jobs = importlib.import_module("submitit.core.core").Job  # an extra: it is here when its launcher is
    raising = jobs.results

    def results(job: Any) -> list[Any]:
        try:
            return raising(job)
        except Exception as error:
            say(f"saerl: job {job.job_id} failed: {one_line(error)} (log: {shown(job.paths.stderr)})")
            return [None]

    jobs.results = results
    try:
        yield
    finally:
        jobs.results = raising


def one_line(error: Exception) -> str:
    """The line of an error that says most: the end of a traceback from elsewhere, else the beginning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    if not isinstance(error, ValueError | RuntimeError | OSError) or not lines:
        lines = [f"{type(error).__name__}: {' '.join(lines)}"]
    if not any(line.startswith("Traceback") for line in lines):
        return " ".join(lines[:2])
    if missing := [line for line in lines if line.startswith("ModuleNotFoundError")]:
        return f"{missing[-1]}; install saerl there too, or export PYTHONPATH in hydra.launcher.setup"
    return next((line for line in reversed(lines) if "Error" in line.split(":")[0]), lines[-1])
