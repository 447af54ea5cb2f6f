"""Timing of pieces of work on the present machine (`saerl_cli.plan.runs`).

Seconds are CPU seconds of this process where it computes on the CPU, so that others who share the machine do not count,
and elapsed seconds on a GPU. What would take long is timed smaller and scaled: few layers, few rows, small batches.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from saerl_cli.plan import machine as machines
from saerl_cli.plan.machine import Machine
from saerl_cli.plan.runs import RUNS, started
from saerl_cli.plan.work import Piece, Work
from saerl_cli.run.progress import say

AT_ONCE = 2e10
"""Operations in a piece that is timed as it is; a larger one is timed smaller."""
LARGEST = 2e9
"""Bytes that a timed piece may hold, about."""
REPEATS, ENOUGH_S = 9, 0.8
"""A piece is repeated so often, or for so long; the median counts: a job gets the machine as it is, not at its best."""


@dataclass
class Clock:
    """Times calls on a device."""

    device: torch.device

    def now(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def spent(self) -> float:
        """Seconds of this process and of those that it has started."""
        return time.perf_counter() if self.device.type == "cuda" else sum(os.times()[:4])

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median of some calls after one that warms up."""
        call()
        found: list[float] = []
        while len(found) < REPEATS and (not found or sum(found) < ENOUGH_S):
            begin = self.now()
            call()
            found.append(self.now() - begin)
        return statistics.median(found)


def probe(pieces: Iterable[Piece], threads: int, cpu: bool, budget: float, fresh: bool = False) -> Machine:
    """The present machine, with the times of these pieces; what was timed before is taken from its file.

    Args:
        pieces: those that matter most first.
        threads: CPU threads of a process.
        cpu: leave a GPU alone.
        budget: seconds after which no further piece is begun; CPU seconds where it computes on the CPU.
        fresh: time everything again.
    """
    device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
    torch.set_num_threads(threads)
    on_cpu = device.type == "cpu"
    hardware = machines.cpu_name() if on_cpu else torch.cuda.get_device_name(device)
    memory = psutil.virtual_memory().total if on_cpu else torch.cuda.get_device_properties(device).total_memory
    file = machines.file_of(hardware, threads, torch.__version__)
    record = {} if fresh else machines.load(file)
    clock = Clock(device)
    deadline = clock.spent() + budget
    if not record:
        record = {"hardware": hardware, "threads": threads, "torch": torch.__version__}
        record |= {"rates": measured_rates(clock), "pieces": {}}
    known, told = record["pieces"], False
    for part in pieces:
        if part.key in known or part.kind not in RUNS:
            continue
        if clock.spent() >= deadline:
            break
        if not told:
            say(f"timing pieces of this job on {hardware} ({threads} threads), {budget:g} s at most")
            told = True
        known[part.key] = timed(part, clock) | {"flops": part.flops}
    machines.keep(file, record)
    return machines.from_record(record, on_cpu, memory)


def measured_rates(clock: Clock) -> dict[str, float]:
    """Rates of a machine at sizes that suit it, for pieces that are not timed."""
    side = 1024 if clock.device.type == "cpu" else 8192
    rate = {}
    for name, dtype in (("float32", torch.float32), ("low", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        rate[name] = 2 * side**3 / clock.seconds(lambda a=a, b=b: a @ b)
    block = torch.zeros(2**24, device=clock.device)
    copy = torch.zeros_like(block)
    bandwidth = 8 * len(block) / clock.seconds(lambda: copy.copy_(block))
    few = torch.zeros(16, device=clock.device)

    def small() -> None:
        for _ in range(1000):
            few.add_(1)

    return rate | {"bandwidth": bandwidth, "call": clock.seconds(small) / 1000}


# --- smaller than asked ---------------------------------------------------------------------------------------------


def timed(part: Piece, clock: Clock) -> dict[str, float]:
    """Seconds of a piece, and what else was found."""
    if part.kind == "start":
        return started(**dict(part.sizes))
    runs = [(times, RUNS[small.kind](clock.device, **dict(small.sizes))) for times, small in smaller(part)]
    return {"seconds": max(0.0, sum(times * clock.seconds(run) for times, run in runs))}


def smaller(part: Piece) -> Work:
    """Pieces that are quickly timed, and how often each to count so that they make up this one."""
    sizes = dict(part.sizes)
    if part.flops <= AT_ONCE and part.bytes <= LARGEST:
        return [(1, part)]
    if sizes.get("layers", 1) > 1:  # what all layers share, and one of them so often
        one, none = (with_sizes(part, layers=n) for n in (1, 0))
        scale = 1 / sizes["layers"]
        one = replace(one, flops=part.flops * scale, bytes=part.bytes * scale)
        return [
            *((sizes["layers"] * times, p) for times, p in smaller(one)),
            *(((1 - sizes["layers"]) * times, p) for times, p in smaller(replace(none, flops=0, bytes=0))),
        ]
    for name, least in (("rows", 1), ("tokens", 32), ("batch", 32), ("numbers", 2**20)):
        count = sizes.get(name, 0)
        share = min(1.0, AT_ONCE / max(part.flops, 1), LARGEST / max(part.bytes, 1))
        few = max(least, int(count * share))
        if count > 2 * few:
            return along(part, name, few, count)
    return [(1, part)]


def along(part: Piece, name: str, few: int, count: int) -> Work:
    """A piece extrapolated in a straight line from two smaller ones."""
    half = max(1, few // 2)
    if half == few:
        return [(count / few, with_sizes(part, **{name: few}))]
    rise = (count - few) / (few - half)
    return [(1 + rise, with_sizes(part, **{name: few})), (-rise, with_sizes(part, **{name: half}))]


def with_sizes(part: Piece, **changes: Any) -> Piece:
    """The same kind of piece with other sizes."""
    return replace(part, sizes=tuple((dict(part.sizes) | changes).items()))
