"""Start the processes that do a job's work, one a rank, and see them through.

Always child processes, also for one rank: Accelerate keeps its state in the process, so a second point of a sweep would
inherit the first one's. Ranks get the variables that torchrun sets, read the run directory's frozen config, and are
stopped together: the command is their parent, and knows which of them failed first.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.run.files import read_json
from saerl_cli.run.jobs import Job

GRACE_S = 10.0
"""How long ranks have to end on SIGTERM before they are killed."""
POLL_S = 0.05
AFTERMATH_S = 0.5
"""How long to wait, once a rank has failed, for others that failed before it to say so."""
SLURM_KILL_WAIT_S = 40.0
"""Longer than Slurm's KillWait: on a requeue the ranks die first, and Slurm should end this process too before the
launcher plugin stores their failure as the job's result."""

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Variables that keep libraries from talking over a job's own messages."""


class WorkFailed(RuntimeError):
    """A rank failed; the message names it and says why."""


# --- what this machine can do ----------------------------------------------------------------------------------------


def check_launch(launch: LaunchConfig, here: bool = True) -> None:
    """Refuse processes that cannot be started, and trackers that are not installed.

    Args:
        launch: the settings.
        here: whether the job will run on this machine, so that its GPUs and cores count.

    Raises:
        ValueError: one line saying what to write instead.
    """
    for tracker in launch.trackers:
        if find_spec(tracker.value) is None:
            raise ValueError(f"launch.trackers=[{tracker.value}] needs a package: pip install {tracker.value}")
    if "LOCAL_RANK" in os.environ:
        raise ValueError("start this command directly, not under torchrun: it starts its own processes (launch=cpu_2)")
    if not here or launch.num_processes == 1:
        return
    asked = f"launch.num_processes={launch.num_processes}"
    if launch.cpu and launch.num_processes > max(2, cores()):
        raise ValueError(f"{asked}, but this machine has {cores()} cores; write launch.num_processes={cores()}")
    if not launch.cpu and launch.num_processes > gpus():
        raise ValueError(f"{asked}, but this machine has {gpus()} GPUs; write launch=cpu_2, or launch=one")


def cores() -> int:
    """CPU cores this process may use; of those that a Slurm job has been given, where Slurm only counts them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get("SLURM_CPUS_PER_TASK", here)))


def gpus() -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def wait_for_slurm() -> None:
    """Inside a Slurm job, outlive a possible requeue before a failure is reported."""
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(SLURM_KILL_WAIT_S)


# --- ranks -----------------------------------------------------------------------------------------------------------


def run_ranks(job: Job, launch: LaunchConfig, folder: Path) -> None:
    """Run a job's work in `launch.num_processes` processes until all have ended well.

    Raises:
        WorkFailed: a rank failed; the others have been stopped.
        KeyboardInterrupt: this process was told to stop; so were the ranks, and they have ended.
    """
    for file in folder.glob(".error.*.json"):
        file.unlink()
    command = [sys.executable, "-m", "saerl_cli.run.worker", str(folder), job.schema, job.work]
    ranks: list[subprocess.Popen] = []
    try:
        for environment in environments(launch):
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
        codes = wait_for_all(ranks)
        if any(codes):
            time.sleep(AFTERMATH_S)
            raise WorkFailed(first_failure(folder, codes))
    finally:
        stop(ranks)


def wait_for_all(ranks: list[subprocess.Popen]) -> list[int | None]:
    """Exit codes, as soon as all ranks have ended or one has failed."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(codes) or None not in codes:
            return codes
        time.sleep(POLL_S)


def environments(launch: LaunchConfig) -> Iterator[dict[str, str]]:
    """The variables of each rank."""
    threads = str(launch.threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores() // launch.num_processes))
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}  # busy-waiting threads make torch 20 times slower where others compute too
    shared = patient | os.environ | QUIET | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if launch.cpu:
        shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if launch.num_processes == 1:
        yield shared
        return
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(launch.num_processes):
        count = str(launch.num_processes)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        yield shared | place


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stop(ranks: list[subprocess.Popen]) -> None:
    """End what still runs: SIGTERM, then, after a while, SIGKILL."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def first_failure(folder: Path, codes: list[int | None]) -> str:
    """Which rank failed first and why: the signal that killed it, or what it wrote before it ended."""
    files = list(folder.glob(".error.*.json"))
    reports = sorted((read_json(file) for file in files), key=lambda report: report["time"])
    for file in files:
        file.unlink()
    killed = [(rank, -code) for rank, code in enumerate(codes) if code is not None and code < 0]
    if killed:  # ranks that lose a neighbour fail after it
        rank, number = killed[0]
        reason = " (out of memory, if nobody did it)" if number == signal.SIGKILL else ""
        return f"{worker_name(rank, codes)} was killed by {signal.Signals(number).name}{reason}"
    if reports and len(codes) == 1:
        return reports[0]["message"]
    if reports:
        return f"rank {reports[0]['rank']}: {reports[0]['message']}"
    rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
    return f"{worker_name(rank, codes)} ended with exit code {code}"


def worker_name(rank: int, codes: list[int | None]) -> str:
    """How a message calls a rank."""
    return f"rank {rank}" if len(codes) > 1 else "the worker"
