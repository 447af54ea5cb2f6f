"""A run directory: who writes it, what it says of itself, what a restart finds in it.

run.json            command, status, times, versions, inputs, trainable parameters
metrics.jsonl       one object a logged step
samples.jsonl       prompts and completions
summary.json        the final numbers
checkpoints/        checkpoint-N, complete or absent
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from saerl_cli.run.files import append_jsonl, atomic_folder, read_json, read_jsonl, write_json, write_text

PACKAGES = ("saerl", "torch", "trl", "transformers", "peft", "accelerate", "hydra-core", "datasets")


class RunInUse(ValueError):
    """Another process writes this run directory."""


class Run:
    """A run directory.

    Args:
        path: the directory; it exists (Hydra makes it).
        writes: whether this process writes; the others of a multi-process job construct it with False, and then every
            writer does nothing.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = Path(path), writes

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self, job: str, command: str, seed: int | None = None, device: str = "cpu") -> None:
        """Lock the directory and write run.json with status `running`; times and inputs of an earlier start are kept.

        Args:
            job: key of the job, for instance `train_sae`.
            command: what a person types to start and to resume this run.
            seed: the run's seed.
            device: name of the device in use.

        Raises:
            RunInUse: another live process holds the lock.
        """
        if not self.writes:
            return
        take_lock(self.path)
        earlier = self.record if (self.path / "run.json").is_file() else {}
        commit, dirty = git_state()
        now = utc_now()
        record = {
            **earlier,
            "job": job,
            "command": command,
            "status": "running",
            "started": earlier.get("started", now),
            "resumed": [*earlier.get("resumed", []), now] if earlier else [],
            "ended": None,
            "seed": seed,
            "versions": versions(),
            "git_commit": commit,
            "git_dirty": dirty,
            "device": device,
            "hostname": socket.gethostname(),
            "python": platform.python_version(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        record.pop("error", None)
        write_json(self.path / "run.json", record)

    def end(self, status: str, error: str | None = None) -> None:
        """Write the final status (completed, failed, interrupted) and release the lock."""
        if not self.writes:
            return
        self.update(status=status, ended=utc_now(), **({"error": error} if error else {}))
        (self.path / ".lock").unlink(missing_ok=True)

    @property
    def record(self) -> dict[str, Any]:
        """run.json as it stands."""
        return read_json(self.path / "run.json")

    @property
    def status(self) -> str | None:
        """running, completed, failed or interrupted; None before the first start."""
        return self.record["status"] if (self.path / "run.json").is_file() else None

    def update(self, **keys: Any) -> None:
        """Set keys of run.json."""
        if self.writes:
            write_json(self.path / "run.json", {**self.record, **keys})

    # --- numbers ----------------------------------------------------------------------------------------------------

    def log(self, step: int, **metrics: Any) -> None:
        """Append a line to metrics.jsonl; `ValueError` naming the first number that is not finite."""
        if self.writes:
            append_jsonl(self.path / "metrics.jsonl", {"step": step, **metrics})

    def sample(self, step: int, prompt: str, completion: str, reward: float, kl: float) -> None:
        """Append a line to samples.jsonl."""
        if self.writes:
            line = {"step": step, "prompt": prompt, "completion": completion, "reward": reward, "kl": kl}
            append_jsonl(self.path / "samples.jsonl", line)

    def truncate(self, step: int) -> None:
        """Drop what was logged after `step`, when a run resumes from there: its files become an unbroken run's."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            if path.is_file():
                kept = [line for line in read_jsonl(path) if line["step"] <= step]
                write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def summary(self, numbers: dict[str, Any]) -> None:
        """Write summary.json."""
        if self.writes:
            write_json(self.path / "summary.json", numbers)

    def read_summary(self) -> dict[str, Any]:
        """summary.json of a finished run."""
        return read_json(self.path / "summary.json")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Complete checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("checkpoint-*")
        return sorted((int(path.name.rsplit("-", 1)[1]), path) for path in found)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The newest complete checkpoint."""
        return (self.checkpoints() or [None])[-1]

    @contextlib.contextmanager
    def save_checkpoint(self, step: int, keep: int = 2) -> Iterator[Path]:
        """A folder to fill, which becomes checkpoints/checkpoint-STEP when the block ends; older ones are deleted.

        Only the writing process may enter.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        with atomic_folder(folder / f"checkpoint-{step}", replace=True) as partial:
            yield partial
        self.keep(keep)

    def keep(self, n: int) -> None:
        """Delete all but the newest `n` checkpoints, and what a kill left half-written."""
        if not self.writes:
            return
        for _, path in self.checkpoints()[:-n]:
            doomed = path.with_name(f".{path.name}.partial.deleted")  # never a checkpoint that lacks files
            os.replace(path, doomed)
        for path in (self.path / "checkpoints").glob(".checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


# --- lock ------------------------------------------------------------------------------------------------------------


def take_lock(path: Path) -> None:
    """Create PATH/.lock naming this process.

    Raises:
        RunInUse: it names another process that is alive.
    """
    lock = path / ".lock"
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": born(os.getpid()), "since": utc_now()})
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            refuse_in_use(path)
            lock.unlink(missing_ok=True)  # its holder is gone
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(mine)
        return
    raise RunInUse(f"{path} is in use by another process")


def refuse_in_use(path: Path) -> None:
    """`RunInUse` when a live process other than this one holds PATH/.lock.

    A holder on another host counts as alive: nobody here can tell.
    """
    try:
        holder = json.loads((path / ".lock").read_text())
    except FileNotFoundError:
        return
    except ValueError:  # killed between creating and writing it
        return
    if holder["host"] == socket.gethostname() and (
        holder["pid"] == os.getpid() or born(holder["pid"]) != holder["born"]
    ):
        return
    raise RunInUse(
        f"{path} is in use by process {holder['pid']} on {holder['host']} since {holder['since']};"
        " wait for it, or take another hydra.run.dir"
    )


def born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks, which tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return "alive"  # no /proc: a reused number cannot be told apart


# --- facts -----------------------------------------------------------------------------------------------------------


def utc_now() -> str:
    """The time, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def elapsed(since: float) -> float:
    """Seconds since a `time.monotonic()`, to a tenth."""
    return round(time.monotonic() - since, 1)


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package runs from and whether files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
