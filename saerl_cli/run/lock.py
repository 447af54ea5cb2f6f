"""One writer a run directory: `.lock` names the command that writes and its worker, by process id and start time.

It is stale when neither lives; age never decides. The worker is named too because it may outlive a killed command for a
moment, and must not meet a second writer then.
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
"""How long to wait for the worker of a killed command; it ends itself within a second."""


class InUse(ValueError):
    """Another process writes this run directory; the message names it."""


def acquire(folder: Path) -> None:
    """Take the lock of an existing folder for this process, which may hold it already.

    Raises:
        InUse: a living process holds it.
    """
    refuse_if_held(folder)
    with guarded(folder):
        if find_holder(folder) is not None:  # somebody was faster
            refuse_if_held(folder, wait=0)
        host, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
        write_json(folder / LOCK, {"host": host, "slurm_job": job, "command": this_process(), "worker": None})


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run directory, made where it is missing; what was made here is removed again unless a run has begun in it.

    Raises:
        InUse: a living process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        acquire(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            release(folder)
        if made and folder.is_dir() and {path.name for path in folder.iterdir()} <= {".hydra"}:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made:  # the deepest first
            with contextlib.suppress(OSError):  # others have begun something beside it
                path.rmdir()


def join(folder: Path) -> None:
    """Name this process as the worker of the command that holds the lock and started it, itself or by its launcher."""
    above = [process.pid for process in psutil.Process().parents()[:2]]
    with guarded(folder):
        lock = read_lock(folder)
        if lock is None or lock["command"]["pid"] not in above:
            raise InUse(f"{folder} is not locked by the command that started this worker")
        write_json(folder / LOCK, lock | {"worker": this_process()})


def name_worker(folder: Path, pid: int) -> None:
    """Name a child of this process, which holds the lock, as its worker: it may outlive this process."""
    with guarded(folder):
        lock = read_lock(folder)
        if lock is None or lock["command"] != this_process():
            raise InUse(f"{folder} is not locked by this process")
        write_json(folder / LOCK, lock | {"worker": identity(psutil.Process(pid))})


def release(folder: Path) -> None:
    """Remove the lock if this process's command holds it."""
    with guarded(folder):
        lock = read_lock(folder)
        if lock is not None and lock["command"] == this_process():
            (folder / LOCK).unlink()


def refuse_if_held(folder: Path, wait: float = ORPHAN_S) -> None:
    """Raise when another living process holds the folder; a worker whose command is dead gets a while to end.

    Raises:
        InUse: the message names the holder.
    """
    deadline = time.monotonic() + wait
    while (holder := find_holder(folder)) is not None:
        if not holder["orphaned"] or time.monotonic() >= deadline:
            gone = f" (if that machine is gone, delete {folder / LOCK})" if not holder["here"] else ""
            raise InUse(
                f"{folder} is in use by process {holder['pid']} on {holder['host']}; wait for it, stop it, or take"
                f" another hydra.run.dir{gone}"
            )
        time.sleep(0.1)


def find_holder(folder: Path) -> dict[str, Any] | None:
    """The living process, other than this one, that holds the folder: pid, host, here, orphaned."""
    lock = read_lock(folder)
    if lock is None:
        return None
    command, worker = lock["command"], lock["worker"]
    if lock["host"] != socket.gethostname():
        ended = slurm_job_ended(lock["slurm_job"])
        return None if ended else command | {"host": lock["host"], "here": False, "orphaned": False}
    if command == this_process():
        return None
    here = {"host": lock["host"], "here": True}
    if lives(command):
        return command | here | {"orphaned": False}
    if worker is not None and lives(worker):
        return worker | here | {"orphaned": True}
    return None


def slurm_job_ended(job: str | None) -> bool:
    """Whether a Slurm job on another machine has ended: it is this very job, requeued, or squeue lists it no more."""
    if job is None:
        return False
    if job == os.environ.get("SLURM_JOB_ID"):
        return True
    if shutil.which("squeue") is None:
        return False
    listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return "Invalid job id" in listed.stderr or (listed.returncode == 0 and not listed.stdout.strip())


def read_lock(folder: Path) -> dict[str, Any] | None:
    """The content of `.lock`, None when there is none."""
    try:
        return json.loads((folder / LOCK).read_text())
    except FileNotFoundError:
        return None


def this_process() -> dict[str, Any]:
    """Identity of this process: its id, and its start time, because ids are used again."""
    return identity(psutil.Process())


def identity(process: psutil.Process) -> dict[str, Any]:
    """A process by its id and its start time."""
    return {"pid": process.pid, "started": process.create_time()}


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
