"""One rank of a job: `python -m saerl_cli.run.worker RUN SCHEMA WORK`, started by `launch.run_ranks` or its agent."""

import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from saerl_cli.config import flat, typed
from saerl_cli.run import lock
from saerl_cli.run.directory import Run, shown
from saerl_cli.run.files import write_json
from saerl_cli.run.jobs import resolve
from saerl_cli.run.launch import AFTERMATH_S

ORPHAN_CHECK_S = 0.2


def main(folder: Path, schema: str, work: str) -> None:
    """Do the work; on failure leave a report for the command and exit 1."""
    rank = int(os.environ.get("RANK", "0"))
    end_with(os.getppid())
    try:
        if rank == 0:
            lock.join(folder)
        result = do(folder, schema, work, rank)
    except Exception as error:
        try:
            report(folder, rank, error)
        except OSError:  # a full disk: then on the terminal
            print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        if "WORLD_SIZE" in os.environ:
            time.sleep(AFTERMATH_S)
        os._exit(1)  # at once: a rank that waits for others in a collective would never end
    if rank == 0:
        Run(folder).update(result=result)
    leave()


def leave() -> None:
    """Exit at once with code 0.

    Everything is written; what is left of torch's process group can abort the interpreter's own way out ("terminate
    called without an active exception", seen in about one of five runs of two gloo processes on torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def do(folder: Path, schema: str, work: str, rank: int) -> float | None:
    """Build the config and the accelerator, and call the job's work."""
    quiet()
    config = typed(Run(folder).settings, resolve(schema))
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=config.launch.cpu,
        mixed_precision=config.launch.mixed_precision.value,
        log_with=[tracker.value for tracker in config.launch.trackers] or None,
        project_dir=folder,
    )
    check_world_size(accelerator.num_processes, config.launch.num_processes)
    run = Run(folder, writes=rank == 0)
    if config.launch.trackers:
        track(accelerator, run)
    run.update(device=device_name(accelerator.device), num_processes=accelerator.num_processes)
    result = resolve(work)(config, run, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.device.type == "cuda":
        run.update(peak_gpu_bytes=peak_gpu_bytes())
    return None if result is None else float(result)


def track(accelerator: Any, run: Run) -> None:
    """Send what the run logs to the trackers too."""
    settings = flat(run.settings)
    name = {"name": run.path.name, "dir": str(run.path)}
    accelerator.init_trackers("saerl", {key: str(value) for key, value in settings.items()}, {"wandb": name})
    run.mirror = accelerator.log


def check_world_size(got: int, asked: int) -> None:
    """Accelerate falls back to one process without a word in several cases; none may pass."""
    if got != asked:
        raise RuntimeError(f"launch.num_processes={asked}, but {got} process(es) found each other; write launch=one")


def device_name(device: Any) -> str:
    """The device as a person knows it."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_gpu_bytes() -> int:
    """The most memory that tensors of this process have held on its GPU."""
    import torch

    return torch.cuda.max_memory_allocated()


def report(folder: Path, rank: int, error: Exception) -> None:
    """Leave the reason for the command and, unless the message says it all, the traceback for RUN/error.txt."""
    said = {"rank": rank, "time": time.time(), "message": " ".join(str(error).split()), "traceback": None}
    text = traceback.format_exc()
    if os.environ.get("SAERL_TRACEBACK") == "1":
        print(text, file=sys.stderr, flush=True)
    if not isinstance(error, ValueError | OSError):
        said["traceback"] = text
        said["message"] = f"{type(error).__name__}: {said['message']} (traceback in {shown(folder / 'error.txt')})"
    write_json(folder / f".error.{rank}.json", said)


def end_with(parent: int) -> None:
    """End this process soon after the one that started it is gone: a killed command leaves no workers behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet() -> None:
    """Ignore warnings whose cause is known and harmless; the others are worth reading."""
    # torch's own scheduler and quantisation modules use what torch 2.13 deprecates
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch(\.|$)")
    # FSDP2 on values [batch, seq], a view of the critic's [batch, seq, 1]; nothing changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
