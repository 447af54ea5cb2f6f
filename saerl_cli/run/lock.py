"""One writer a run directory: `.lock` names the processes that hold it, and is stale when none of them lives.

The command takes the lock before anything is written and hands it down: its first worker adds itself, so that a worker
that outlives a killed command still holds the directory. Age never decides.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from saerl_cli.run.files import write_json

LOCK = ".lock"
ORPHAN_S = 20.0
"""How long to wait for workers whose command was killed; they end themselves within a second."""


class InUse(ValueError):
    """Another process writes this run directory; the message names it."""


def acquire(folder: Path, command: str = "") -> None:
    """Take the lock of an existing folder for this process.

    Args:
        folder: the run directory.
        command: what is running, for the message that others get.

    Raises:
        InUse: a living process holds it.
    """
    with guarded(folder):
        refuse_if_held(folder)
        slurm = os.environ.get("SLURM_JOB_ID")
        lock = {"host": socket.gethostname(), "slurm_job": slurm, "command": command, "processes": [this_process()]}
        write_json(folder / LOCK, lock)


def join(folder: Path) -> None:
    """Add this process to a lock that its parent command holds; take it when nobody does.

    Raises:
        InUse: somebody else holds it.
    """
    with guarded(folder):
        lock = read_lock(folder)
        ours = {process.pid for process in psutil.Process().parents()} | {os.getpid()}
        if lock is None or not any(process["pid"] in ours and lives(process) for process in lock["processes"]):
            refuse_if_held(folder)
            lock = {"host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID"), "command": ""}
            lock["processes"] = []
        processes = [process for process in lock["processes"] if lives(process) and process["pid"] != os.getpid()]
        write_json(folder / LOCK, lock | {"processes": [*processes, this_process()]})


def release(folder: Path) -> None:
    """Give up this process's hold; the file goes with the last holder. Without a hold nothing happens."""
    with guarded(folder):
        lock = read_lock(folder)
        if lock is None or all(process["pid"] != os.getpid() for process in lock["processes"]):
            return
        rest = [process for process in lock["processes"] if process["pid"] != os.getpid() and lives(process)]
        if rest:
            write_json(folder / LOCK, lock | {"processes": rest})
        else:
            (folder / LOCK).unlink(missing_ok=True)


def refuse_if_held(folder: Path) -> None:
    """Raise when a living process other than this one holds the folder; wait a while for orphans to end.

    Raises:
        InUse: the message names the holder.
    """
    deadline = time.monotonic() + ORPHAN_S
    while (holder := find_holder(folder)) is not None:
        orphaned = holder.get("parent") is not None and not lives(holder["parent"])
        if not orphaned or time.monotonic() > deadline:
            gone = "" if holder["here"] else f" (if that machine is gone, delete {folder / LOCK})"
            raise InUse(
                f"{folder} is in use by process {holder['pid']} on {holder['host']}; wait for it, stop it, or take"
                f" another hydra.run.dir{gone}"
            )
        time.sleep(0.1)


def find_holder(folder: Path) -> dict[str, Any] | None:
    """A living process, other than this one, that holds the folder."""
    lock = read_lock(folder)
    if lock is None:
        return None
    here = lock["host"] == socket.gethostname()
    if not here and slurm_job_ended(lock.get("slurm_job")):
        return None
    others = [process for process in lock["processes"] if process["pid"] != os.getpid() or not here]
    held = [process for process in others if not here or lives(process)]
    return held[0] | {"host": lock["host"], "here": here} if held else None


def slurm_job_ended(job: str | None) -> bool:
    """Whether a Slurm job on another machine has ended: it is this very job, requeued, or squeue lists it no more."""
    if job is None:
        return False
    if job == os.environ.get("SLURM_JOB_ID"):
        return True
    if shutil.which("squeue") is None:
        return False
    listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return listed.returncode == 0 and not listed.stdout.strip() or "Invalid job id" in listed.stderr


def read_lock(folder: Path) -> dict[str, Any] | None:
    """The content of `.lock`, None when there is none."""
    try:
        return json.loads((folder / LOCK).read_text())
    except FileNotFoundError:
        return None


def this_process() -> dict[str, Any]:
    """Identity of this process: its id and start time, because ids are used again; and of the command above it."""
    parent = os.environ.get("SAERL_COMMAND_PROCESS")  # set by the command for its workers: "pid start"
    identity: dict[str, Any] = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    if parent is not None:
        pid, started = parent.split()
        identity["parent"] = {"pid": int(pid), "started": float(started)}
    return identity


def lives(process: dict[str, Any]) -> bool:
    """Whether a recorded process of this machine still runs, and is the same one."""
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["started"]) < 2 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Only one process of this machine at a time reads and then writes the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a directory
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
