"""Start the processes that do a job's work, and see them through.

Always child processes, also for one rank: Accelerate keeps its state in the process, so a second point of a sweep would
inherit the first one's. One rank is a child of the command. Several, and sharded models, are started by `accelerate
launch` (`run.agent`) from RUN/accelerate.yaml; this process stays its parent and says which rank failed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from saerl_cli.config.groups import LaunchConfig, Sharding
from saerl_cli.run.files import read_json, write_text
from saerl_cli.run.jobs import Job

CONFIG = "accelerate.yaml"
CODES = ".codes.json"
"""{rank: exit code} of the ranks that did not end well, the first of them first; negative is a signal."""
AFTERMATH_S = 0.5
"""How long a failed rank stays, so that others that fail by themselves can say so before they are stopped."""
GRACE_S = 10.0
"""How long ranks have to end on SIGTERM before they are killed."""
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
FOREIGN = ("ACCELERATE_", "FSDP_")
"""Variables of the user's shell that would change what Accelerate does."""


class WorkFailed(RuntimeError):
    """Ranks failed; the message names them and says why."""


# --- what this machine can do ----------------------------------------------------------------------------------------


def counted(launch: Any, choice: str, visible: int | None) -> int:
    """The number of processes that `launch.num_processes=-1` stands for.

    Args:
        launch: the settings, as Hydra composed them.
        choice: what was chosen as `launch=`, for messages.
        visible: GPUs of the machine that will do the work; None where that is unknown.

    Raises:
        ValueError: one line saying what to write instead.
    """
    if visible is None:
        raise ValueError(
            f"launch={choice} counts this machine's GPUs; for a cluster write launch.num_processes=N, or"
            " hydra.launcher.gpus_per_node=N"
        )
    if visible == 0:
        raise ValueError(f"launch={choice} wants a process for each GPU, but there is none; write launch=cpu_2 or one")
    return visible


def check_launch(launch: LaunchConfig, here: bool = True) -> None:
    """Refuse processes that cannot be started, and packages that are not installed.

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
    if here and engaged(launch):
        check_machine(launch)


def check_machine(launch: LaunchConfig) -> None:
    """Refuse more processes than this machine has GPUs or cores for."""
    asked = f"launch.num_processes={launch.num_processes}"
    if launch.cpu and launch.num_processes > max(2, cores()):
        raise ValueError(f"{asked}, but this machine has {cores()} cores; write launch.num_processes={cores()}")
    if not launch.cpu and launch.num_processes > gpus():
        raise ValueError(f"{asked}, but this machine has {gpus()} GPUs; write launch=cpu_2, or launch=one")


def engaged(launch: LaunchConfig) -> bool:
    """Whether `accelerate launch` starts the ranks; a single one needs no introduction to others."""
    return launch.num_processes > 1 or launch.sharding is not Sharding.none


def cores() -> int:
    """CPU cores this process may use; of those that a Slurm job has been given, where Slurm only counts them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, int(os.environ.get("SLURM_CPUS_PER_TASK", here)))


def gpus() -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    return len(gpu_names())


def gpu_names() -> list[str]:
    """The same GPUs, as CUDA_VISIBLE_DEVICES calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def wait_for_slurm() -> None:
    """Inside a Slurm job, outlive a possible requeue before a failure is reported."""
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(SLURM_KILL_WAIT_S)


# --- accelerate.yaml -------------------------------------------------------------------------------------------------


def accelerate_config(launch: LaunchConfig) -> dict[str, Any]:
    """What RUN/accelerate.yaml says. It says everything, or Accelerate would ask the user's default_config.yaml.

    MULTI_GPU is also what makes two processes on a CPU find each other, given ACCELERATE_USE_CPU; MULTI_CPU makes one.
    A split model is transformers' own (`saerl_cli.models.load_model`): Accelerate's FSDP would split adapters too, and
    is not to be had on a CPU.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_machines": 1,
        "num_processes": launch.num_processes,
        "machine_rank": 0,
        "main_process_port": 0,  # any free one, so that runs share a machine
        "main_training_function": "main",
        "mixed_precision": launch.mixed_precision.value,
        "use_cpu": launch.cpu,
        "debug": False,
        "enable_cpu_affinity": False,
    }


# --- ranks -----------------------------------------------------------------------------------------------------------


def run_ranks(job: Job, launch: LaunchConfig, folder: Path) -> None:
    """Run a job's work in `launch.num_processes` processes until all have ended well.

    Raises:
        WorkFailed: ranks failed; the others have been stopped.
        KeyboardInterrupt: this process was told to stop; so were the ranks, and they have ended.
    """
    for file in reports_in(folder):
        file.unlink()
    module = "saerl_cli.run.agent" if engaged(launch) else "saerl_cli.run.worker"
    if engaged(launch):
        write_config(folder / CONFIG, launch)
    command = [sys.executable, "-m", module, str(folder), job.schema, job.work]
    child = subprocess.Popen(command, env=environment(launch), start_new_session=True)
    try:
        if code := child.wait():
            raise WorkFailed(failure(folder, launch, code))
    finally:
        stop(child)


def write_config(file: Path, launch: LaunchConfig) -> None:
    """Write what `accelerate launch` reads."""
    from omegaconf import OmegaConf

    write_text(file, OmegaConf.to_yaml(OmegaConf.create(accelerate_config(launch))))


def environment(launch: LaunchConfig) -> dict[str, str]:
    """The variables of all ranks."""
    threads = str(launch.threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores() // launch.num_processes))
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}  # busy-waiting threads make torch 20 times slower where others compute too
    own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    shared = patient | own | QUIET | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return shared | ({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if launch.cpu else {})


def stop(*children: subprocess.Popen) -> None:
    """End what still runs, the children's own children too: SIGTERM, then, after a while, SIGKILL."""
    below: list[psutil.Process] = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            below += psutil.Process(child.pid).children(recursive=True)
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE_S
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for child in children:
        child.kill()
        child.wait()


# --- what went wrong -------------------------------------------------------------------------------------------------


def failure(folder: Path, launch: LaunchConfig, code: int) -> str:
    """Which ranks failed and why, in one line: the signal that killed them, or what they wrote before they ended.

    What ranks say that only lost a neighbour is left out. Tracebacks go to RUN/error.txt.
    """
    codes = {0: code}
    if engaged(launch):
        codes = {}
        with contextlib.suppress(FileNotFoundError):
            codes = {int(rank): code for rank, code in read_json(folder / CODES).items()}
    reports = sorted((read_json(file) for file in folder.glob(".error.*.json")), key=lambda report: report["time"])
    for file in reports_in(folder):
        file.unlink()
    first = next(iter(codes.values()), code)
    if first < 0:  # ranks that lose a neighbour fail after it
        ranks = [rank for rank, code in codes.items() if code == first]
        reason = " (out of memory, if nobody did it)" if first == -signal.SIGKILL else ""
        plural = "were" if len(ranks) > 1 else "was"
        return f"{named(ranks, launch)} {plural} killed by {signal.Signals(-first).name}{reason}"
    if reports:
        return gathered([r for r in reports if r["time"] <= reports[0]["time"] + AFTERMATH_S], folder, launch)
    return f"{named(list(codes)[:1], launch)} ended with exit code {first}"


def gathered(reports: list[dict[str, Any]], folder: Path, launch: LaunchConfig) -> str:
    """What ranks say, each different message once."""
    said: dict[str, list[int]] = {}
    for report in reports:
        said.setdefault(report["message"], []).append(report["rank"])
    tracebacks = {report["traceback"]: None for report in reports if report.get("traceback")}
    if tracebacks:
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            write_text(folder / "error.txt", "\n".join(tracebacks))
    if len(said) == 1 and not engaged(launch):
        return next(iter(said))
    return "; ".join(
        message if None in ranks else f"{named(ranks, launch)}: {message}" for message, ranks in said.items()
    )


def named(ranks: list[int], launch: LaunchConfig) -> str:
    """How a message calls ranks."""
    if not engaged(launch):
        return "the worker"
    if not ranks:
        return "accelerate launch"
    *some, last = map(str, sorted(ranks))
    return f"ranks {', '.join(some)} and {last}" if some else f"rank {last}"


def reports_in(folder: Path) -> Iterable[Path]:
    """The files in which ranks and their launcher say how they failed."""
    return [file for pattern in (".error.*.json", CODES) for file in folder.glob(pattern)]
