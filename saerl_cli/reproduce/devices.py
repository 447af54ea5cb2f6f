"""GPUs of its own for a stage on this machine: `python -m saerl_cli.reproduce.devices COUNT FOLDER COMMAND ...`.

Snakemake counts GPUs but does not say which are a stage's. A GPU is taken by a lock on FOLDER/gpu-NAME that the
process of the stage holds: the kernel gives it back however that ends, and no two stages can hold it.
"""

import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path

from saerl_cli.run.launch import gpu_names
from saerl_cli.run.progress import say

AGAIN_S = 0.5


def folder() -> Path:
    """Where the locks of this machine's GPUs are, for all that this person runs."""
    return Path(tempfile.gettempdir(), f"saerl-gpus-{os.getuid()}")


def take(count: int, place: Path) -> list[str]:
    """Names of so many GPUs that no other stage has; waits for them. They are held until this process ends."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    names = gpu_names()
    if count > len(names):
        raise ValueError(f"the stage needs {count} GPUs, but this machine has {len(names)}")
    waited = False
    while True:
        held = {}
        for name in names:
            descriptor = os.open(place / f"gpu-{name.replace('/', '_')}", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            held[name] = descriptor
            if len(held) == count:
                for descriptor in held.values():
                    os.set_inheritable(descriptor, True)  # through exec
                return list(held)
        for descriptor in held.values():
            os.close(descriptor)
        if not waited:
            say(f"waiting for {count} GPUs that other stages hold")
        waited = True
        time.sleep(AGAIN_S)


def main(count: int, place: Path, command: list[str]) -> None:
    """Become the command, with GPUs of its own."""
    try:
        visible = ",".join(take(count, place))
    except (ValueError, OSError) as error:
        say(f"saerl: {error}")
        raise SystemExit(1) from None
    os.execvpe(command[0], command, os.environ | {"CUDA_VISIBLE_DEVICES": visible})


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
