"""How fast a machine is: the present one by a product and a copy that are timed, a GPU by its published peaks."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from numpy import ndarray

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.plan.meta import Sequence
from saerl_cli.run.launch import cores, gpus

PRODUCTS, TRAFFIC = 0.4, 0.6
"""Shares of a GPU's published peaks that are assumed where nothing was measured."""
REACHED = 0.5
"""Share of a machine's own large product that jobs reach in theirs (seen on small models on a CPU)."""
CALLS, CALL_S = 100, 8e-6
"""Kernels that a layer starts in a pass, and seconds that starting one from Python takes; assumed."""
DEVICES = {  # dense operations a second without sparsity in float32 and bfloat16, bytes a second, bytes
    "t4": (8.1e12, 65e12, 320e9, 16e9),
    "l4": (30.3e12, 121e12, 300e9, 24e9),
    "rtx-4090": (82.6e12, 165e12, 1008e9, 24e9),
    "a100-40gb": (19.5e12, 312e12, 1555e9, 40e9),
    "a100-80gb": (19.5e12, 312e12, 2039e9, 80e9),
    "h100": (67e12, 989e12, 3350e9, 80e9),
    "h200": (67e12, 989e12, 4800e9, 141e9),
}
"""GPUs as their makers describe them, by the name that --device takes."""


@dataclass(frozen=True)
class Machine:
    """What the times are those of: rates that jobs reach, and bytes of one device's memory."""

    name: str
    here: bool
    threads: int
    """CPU threads a process."""
    on_cpu: bool
    float32: float
    low: float
    """Operations a second in bfloat16 and float16."""
    bandwidth: float
    memory: float

    def seconds(self, work: ndarray, one: Sequence) -> float:
        """An estimate: the larger of products and of reading the weights, and what starting kernels costs."""
        flops, passes = map(float, work)
        rate = self.float32 if one.dtype == "float32" else self.low
        return max(flops / rate, passes * one.weights / self.bandwidth) + passes * one.layers * CALLS * CALL_S

    def record(self) -> dict[str, Any]:
        """As plain data."""
        rates = {"float32": self.float32, "low": self.low, "bandwidth": self.bandwidth}
        told = {"device": self.name, "measured": self.here, "threads": self.threads, "memory_bytes": self.memory}
        return told | {"rates": rates}


def published(name: str) -> Machine:
    """A GPU that is not here.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DEVICES:
        raise ValueError(f"there is no --device {name}; there are {', '.join(DEVICES)}, and here")
    float32, low, bandwidth, memory = DEVICES[name]
    return Machine(name, False, 1, False, PRODUCTS * float32, PRODUCTS * low, TRAFFIC * bandwidth, memory)


def present(launch: LaunchConfig) -> Machine:
    """The machine that this runs on, as the job would use it."""
    on_cpu = launch.cpu or not gpus()
    threads = launch.threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, cores() // launch.num_processes)
    device, side = torch.device("cpu" if on_cpu else "cuda"), 1024 if on_cpu else 8192
    torch.set_num_threads(threads)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates.append(REACHED * 2 * side**3 / shortest(lambda a=a, b=b: a @ b))
    block = torch.zeros(2**24, device=device)
    bandwidth = 2 * block.nbytes / shortest(block.clone)
    name, memory = cpu_name(), psutil.virtual_memory().total
    if not on_cpu:
        found = torch.cuda.get_device_properties(device)
        name, memory = found.name, found.total_memory
    return Machine(name, True, threads, on_cpu, rates[0], rates[1], bandwidth, memory)


def shortest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls: others on the machine only ever add."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
