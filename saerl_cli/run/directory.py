"""A run directory: what it says of itself, its numbers and samples, what a restart finds in it.

run.json            job, command, status, times, versions, inputs, trainable parameters
metrics.jsonl       one object a logged step
samples.jsonl       prompts and completions
summary.json        the final numbers
checkpoints/        checkpoint-N, complete or absent
policies/           step-N.safetensors: what training had made of its parameters
.lock               the processes that write here now
"""

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from saerl_cli.config.renamed import translate
from saerl_cli.run import lock
from saerl_cli.run.files import append_jsonl, atomic_folder, read_json, read_jsonl, write_json, write_text

STATUSES = ("running", "completed", "failed", "interrupted")
PACKAGES = ("saerl", "torch", "trl", "transformers", "peft", "accelerate", "hydra-core", "datasets", "numpy")
LINES = ("metrics.jsonl", "samples.jsonl")


class Run:
    """A run directory, for its writers and its readers.

    Args:
        path: the directory.
        writes: whether this process writes; the others of a multi-process job construct it with False, and then every
            writer does nothing.
    """

    def __init__(self, path: Path | str, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.mirror: Callable[..., None] | None = None  # `mirror(metrics, step=…)`, where metrics go besides

    @classmethod
    def load(cls, path: Path | str) -> "Run":
        """An existing run, to be read.

        Raises:
            ValueError: there is no run.json.
        """
        run = cls(path, writes=False)
        if not (run.path / "run.json").is_file():
            raise ValueError(f"{path} is not a run directory: it has no run.json")
        return run

    @property
    def record(self) -> dict[str, Any]:
        """run.json as it stands; empty before the first start."""
        file = self.path / "run.json"
        return translate(read_json(file)) if file.is_file() else {}

    @property
    def settings(self) -> Any:
        """.hydra/config.yaml, in today's words; empty before Hydra has written it."""
        from omegaconf import OmegaConf

        file = self.path / ".hydra" / "config.yaml"
        return OmegaConf.create(translate(OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else {})

    @property
    def status(self) -> str | None:
        """running, completed, failed or interrupted; None before the first start."""
        return self.record.get("status")

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self, job: str, command: str = "", seed: int | None = None, device: str = "cpu") -> None:
        """Lock the directory and write run.json with status `running`; what an earlier start recorded is kept.

        Args:
            job: key of the job, for instance `train_sae`.
            command: what a person types to start and to resume this run.
            seed: the run's seed.
            device: name of the device in use.

        Raises:
            saerl_cli.run.lock.InUse: another process writes here.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(self.path)
        self.tidy()
        (self.path / "error.txt").unlink(missing_ok=True)  # of an earlier failure
        earlier = self.record
        facts = {
            "job": job,
            "command": command,
            "status": "running",
            "started": earlier.get("started", utc_now()),
            "resumed": [*earlier.get("resumed", []), utc_now()] if earlier else [],
            "ended": None,
            "error": None,
            "seed": seed,
            "device": device,
            "hostname": socket.gethostname(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            **git_state(),
            "versions": versions(),
        }
        write_json(self.path / "run.json", earlier | facts)

    def end(self, status: str, error: str | None = None) -> None:
        """Write how the run ended (completed, failed, interrupted) and give up the lock."""
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status}")
        if self.writes:
            self.tidy()
            self.update(status=status, ended=utc_now(), error=error)
            lock.release(self.path)

    def update(self, **keys: Any) -> None:
        """Set keys of run.json: `inputs`, `trainable`, `frozen_unchanged`, ..."""
        if self.writes:
            write_json(self.path / "run.json", self.record | keys)

    def tidy(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.path, self.checkpoint_folder, self.path / "policies"):
            for partial in folder.glob(".*.partial.*"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        for file in (self.path / name for name in LINES):
            if file.is_file() and not file.read_bytes().endswith(b"\n"):  # a torn line
                write_jsonl(file, read_jsonl(file))

    # --- numbers and samples -----------------------------------------------------------------------------------------

    def log(self, step: int, **metrics: Any) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            ValueError: a metric is NaN or infinite; the message names it and the step.
        """
        if not self.writes:
            return
        try:
            append_jsonl(self.path / "metrics.jsonl", {"step": step, **metrics})
        except ValueError as error:
            raise ValueError(f"step {step}: {error}") from None
        if self.mirror is not None:
            self.mirror(metrics, step=step)

    def sample(self, step: int, prompt: str, completion: str, reward: float, kl: float | None) -> None:
        """Append a line to samples.jsonl."""
        if self.writes:
            line = {"step": step, "prompt": prompt, "completion": completion, "reward": reward, "kl": kl}
            append_jsonl(self.path / "samples.jsonl", line)

    def truncate(self, step: int) -> None:
        """Drop what was logged after `step`, when a run resumes from there: its files become an unbroken run's."""
        for file in (self.path / name for name in LINES):
            if self.writes and file.is_file():
                write_jsonl(file, [line for line in read_jsonl(file) if line["step"] <= step])

    def summary(self, numbers: Mapping[str, Any]) -> None:
        """Write summary.json, the final numbers."""
        if self.writes:
            write_json(self.path / "summary.json", dict(numbers))

    def read_summary(self) -> dict[str, Any]:
        """summary.json of a finished run."""
        return translate(read_json(self.path / "summary.json"))

    def numbers(self) -> dict[str, Any]:
        """The numbers and words of summary.json; empty before there is one."""
        found = self.read_summary() if (self.path / "summary.json").is_file() else {}
        return {key: value for key, value in found.items() if isinstance(value, int | float | str)}

    def key_numbers(self, limit: int = 6) -> str:
        """The first of them, for a line of text."""
        numbers = list(self.numbers().items())[:limit]
        return ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every complete checkpoint, oldest first."""
        folders = self.checkpoint_folder.glob("checkpoint-*")
        return sorted((int(match[1]), path) for path in folders if (match := re.fullmatch(r".*-(\d+)", path.name)))

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        return max(self.checkpoints(), default=None)

    @contextlib.contextmanager
    def save_checkpoint(self, step: int, keep: int = 2) -> Iterator[Path]:
        """A folder to fill, which becomes checkpoints/checkpoint-STEP when the block ends; all but `keep` are deleted.

        Only the process that writes may enter.
        """
        self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(self.checkpoint_folder / f"checkpoint-{step}", replace=True) as partial:
            yield partial
        self.keep(keep)

    def keep(self, n: int) -> None:
        """Delete all checkpoints but the newest `n`."""
        for _, path in self.checkpoints()[: -n or None]:
            if self.writes:
                doomed = path.with_name(f".{path.name}.partial.{os.getpid()}")
                path.rename(doomed)  # a kill while deleting must leave nothing that looks complete
                shutil.rmtree(doomed)


def write_jsonl(file: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a jsonl file, atomically."""
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def shown(path: Path) -> Path:
    """A path as a person would type it here."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# --- facts -----------------------------------------------------------------------------------------------------------


def utc_now() -> str:
    """The time, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_state() -> dict[str, Any]:
    """Commit of the checkout this package runs from and whether files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def true_status(run: Run, record: dict[str, Any]) -> str:
    """The recorded status; `killed` for a run that says it is running while nobody holds its lock."""
    status = record.get("status", "?")
    return "killed" if status == "running" and lock.find_holder(run.path) is None else status
