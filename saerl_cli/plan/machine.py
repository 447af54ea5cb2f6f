"""How fast a machine is: times of pieces measured on the present one and kept, or a GPU's published peaks.

What was measured lies under the cache folder, in a file for each combination of hardware, threads and torch version.
Where a piece was not timed, its time is estimated as the larger of products at the machine's rate and memory at its
bandwidth, plus what starting kernels costs.
"""

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saerl_cli.plan.work import Piece, Work
from saerl_cli.planted.cache import cache_folder
from saerl_cli.run.files import read_json, write_json
from saerl_cli.run.launch import cores

PRODUCTS, TRAFFIC = 0.4, 0.6
"""Shares of a GPU's published peaks that are assumed where nothing was measured."""
LAUNCH_S = 8e-6
"""Seconds that starting a kernel from Python takes on such a machine; assumed."""


@dataclass(frozen=True)
class Device:
    """A GPU as its maker describes it: dense operations a second without sparsity, bytes a second, bytes."""

    float32: float
    bfloat16: float
    bandwidth: float
    memory: float


DEVICES = {
    "t4": Device(8.1e12, 65e12, 320e9, 16e9),
    "l4": Device(30.3e12, 121e12, 300e9, 24e9),
    "rtx-4090": Device(82.6e12, 165e12, 1008e9, 24e9),
    "a100-40gb": Device(19.5e12, 312e12, 1555e9, 40e9),
    "a100-80gb": Device(19.5e12, 312e12, 2039e9, 80e9),
    "h100": Device(67e12, 989e12, 3350e9, 80e9),
    "h200": Device(67e12, 989e12, 4800e9, 141e9),
}
"""By the name that --device takes."""


@dataclass(frozen=True)
class Rates:
    """What the time of a piece that was not timed is estimated from."""

    float32: float
    """Operations a second in products."""
    low: float
    """The same in bfloat16 and float16."""
    bandwidth: float
    """Bytes a second."""
    call: float
    """Seconds a small operation."""

    def seconds(self, part: Piece) -> float:
        """An estimate."""
        rate = self.float32 if part.dtype == "float32" else self.low
        return max(part.flops / rate, part.bytes / self.bandwidth) + part.calls * self.call


@dataclass
class Machine:
    """A machine and what is known of its speed."""

    name: str
    measured: bool
    """Whether anything was measured on it."""
    threads: int
    """CPU threads a process; CPU seconds count all of them."""
    on_cpu: bool
    memory: float
    """Bytes, of one device."""
    rates: Rates
    known: dict[str, dict[str, float]]
    """Times of pieces, by their key: {seconds}; of starts also {resident_bytes}."""

    def seconds(self, part: Piece) -> float:
        """Of one piece of work, on one process."""
        found = self.known.get(part.key)
        return found["seconds"] if found else self.rates.seconds(part)

    def total(self, work: Work) -> float:
        """Of some work."""
        return sum(times * self.seconds(part) for times, part in work)

    def timed(self, work: Work) -> float:
        """Share of the time of some work that rests on pieces which were timed."""
        known = sum(times * self.seconds(part) for times, part in work if part.key in self.known)
        return known / max(self.total(work), 1e-30)


def published(name: str) -> Machine:
    """A GPU that is not here, by its maker's numbers.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DEVICES:
        raise ValueError(f"there is no --device {name}; there are {', '.join(DEVICES)}, and here")
    device = DEVICES[name]
    rates = Rates(device.float32 * PRODUCTS, device.bfloat16 * PRODUCTS, device.bandwidth * TRAFFIC, LAUNCH_S)
    return Machine(name, False, 1, False, device.memory, rates, {})


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def threads_of(asked: int | None, processes: int) -> int:
    """CPU threads of each process, as `saerl_cli.run.launch` sets them."""
    return asked or int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, cores() // processes)


def file_of(hardware: str, threads: int, torch: str) -> Path:
    """Where measurements of a machine are kept."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{hardware} {threads} threads torch {torch}").strip("-")
    return cache_folder() / "plan" / f"{name}.json"


def load(file: Path) -> dict[str, Any]:
    """What was measured before; empty when nothing was, or it cannot be read."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def keep(file: Path, record: dict[str, Any]) -> None:
    """Write what was measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def from_record(record: dict[str, Any], on_cpu: bool, memory: float) -> Machine:
    """A machine as it was measured."""
    return Machine(
        record["hardware"], True, record["threads"], on_cpu, memory, Rates(**record["rates"]), record["pieces"]
    )


def as_record(machine: Machine) -> dict[str, Any]:
    """What of a machine goes into the output."""
    return {
        "device": machine.name,
        "measured": machine.measured,
        "threads": machine.threads,
        "memory_bytes": machine.memory,
        "rates": asdict(machine.rates),
    }
