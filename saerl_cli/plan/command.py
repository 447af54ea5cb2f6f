"""`saerl plan COMMAND`: the job's settings, its sizes, its times."""

from collections.abc import Callable, Sequence
from typing import Any

from saerl_cli.plan import eval_sae, evaluation, language, rlhf, sae
from saerl_cli.plan.compose import composed
from saerl_cli.plan.machine import Machine, as_record, published, threads_of
from saerl_cli.plan.work import Estimate, Phase, Piece, Work

PLANNED = ("train-lm", "train-sae", "train-reward", "rlhf", "evaluate", "eval-sae")
"""Commands that can be planned."""
HERE = "here"
ELSEWHERE = "a100-80gb"
"""What GPUs are taken to be where a job asks for several and none is here."""
ON_HOST = ("text", "examples")
"""What is held throughout, but never on a GPU."""
BUDGET_S = 55.0
"""Seconds after which no further piece is timed."""

SPLIT = ["times leave out that split weights are gathered from the other processes in every pass"]
"""Said of a split model."""


def plan(
    command: str,
    words: Sequence[str],
    device: str = "",
    probing: bool = True,
    sae_words: Sequence[str] = (),
    length: float | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """The plan of a job as plain data.

    Args:
        command: its command word.
        words: what would follow that.
        device: a GPU's name, `here`, or empty: here where the job could run here.
        probing: time pieces of the job that were not timed before.
        sae_words: of the `saerl train-sae` that makes SAEs which are not there yet.
        length: tokens of a completion on average.
        again: time also what was timed before.

    Raises:
        ValueError: one line about what cannot be planned.
    """
    if command not in PLANNED:
        raise ValueError(f"saerl plan has no word {command}; write one of {', '.join(PLANNED)}")
    config = composed(command.replace("-", "_"), words)
    if config.launch.num_processes < 1:  # a process on every GPU of a machine that may be another
        from saerl_cli.run.launch import gpus

        config.launch.num_processes = max(1, gpus())
    if length is not None and length <= 0:
        raise ValueError(f"--length is in tokens, > 0, got {length:g}")
    found = estimate(command, config, list(sae_words), length)
    machine = machine_for(found, config.launch, device, probing, again)
    return described(found, machine)


def estimate(command: str, config: Any, sae_words: list[str], length: float | None) -> Estimate:
    """Sizes and work of a command's job."""
    counts: dict[str, Callable[[], Estimate]] = {
        "train-lm": lambda: language.train_lm(config),
        "train-sae": lambda: sae.estimate(config),
        "train-reward": lambda: language.train_reward(config),
        "rlhf": lambda: rlhf.estimate(config, sae_words, length),
        "evaluate": lambda: evaluation.estimate(config, length),
        "eval-sae": lambda: eval_sae.estimate(config, sae_words),
    }
    return counts[command]()


def machine_for(found: Estimate, launch: Any, device: str, probing: bool, again: bool) -> Machine:
    """What the times are those of: this machine where it can do the job, else a GPU by its published numbers."""
    from saerl_cli.run.launch import gpus

    elsewhere = not launch.cpu and launch.num_processes > max(1, gpus())
    name = device or (ELSEWHERE if elsewhere else HERE)
    if name != HERE:
        return published(name)
    from saerl_cli.plan.probe import probe

    cpu = launch.cpu or not gpus()
    threads, budget = threads_of(launch.threads, launch.num_processes), BUDGET_S if probing else 0.0
    return probe(by_weight(found), threads, cpu, budget, again)


def by_weight(found: Estimate) -> list[Piece]:
    """The pieces of a job, those first on which most is computed or moved."""
    weights: dict[Piece, float] = {}
    for phase in found.phases:
        for times, part in phase.work:
            cost = part.flops / 3e10 + part.bytes / 5e9 + part.calls * 5e-6
            weights[part] = weights.get(part, 0.0) + phase.count * times * cost
    return sorted(weights, key=lambda part: -weights[part])


# --- as plain data --------------------------------------------------------------------------------------------------


def described(found: Estimate, machine: Machine) -> dict[str, Any]:
    """Everything that the table shows, and more."""
    libraries = resident(found, machine) if machine.on_cpu else 0.0
    stays = {"libraries": libraries, **found.stays}
    if not machine.on_cpu:
        stays = {name: size for name, size in stays.items() if name not in ON_HOST}
    stays = {name: round(size) for name, size in stays.items() if size}
    total = sum(stays.values())
    phases = [described_phase(phase, machine, total) for phase in found.phases]
    peak = max(phases, key=lambda phase: phase["peak_bytes"])
    seconds = sum(phase["count"] * phase["seconds"] for phase in phases)
    every: Work = [(phase.count * times, part) for phase in found.phases for times, part in phase.work]
    return {
        "command": found.command,
        "processes": found.processes,
        "dtype": found.dtype,
        "machine": as_record(machine),
        "parameters": found.parameters,
        "stays_bytes": stays,
        "phases": phases,
        "peak_bytes": peak["peak_bytes"],
        "peak_phase": peak["name"],
        "fits": peak["peak_bytes"] * (found.processes if machine.on_cpu else 1) <= machine.memory,
        "flops": found.processes * sum(phase["count"] * phase["flops"] for phase in phases),
        "seconds": seconds,
        "timed_share": machine.timed(every),
        "disk_bytes": {name: round(size) for name, size in found.disk.items() if size},
        "notes": [
            *found.notes,
            *assumptions(machine, every, libraries),
            *(SPLIT if "gathered weights" in stays else []),
        ],
        "pieces": {part.key: machine.seconds(part) for _, part in every},
    }


def described_phase(phase: Phase, machine: Machine, stays: float) -> dict[str, Any]:
    """One phase: bytes and operations of one process, seconds at full speed."""
    counts = machine.on_cpu or not phase.on_host
    held = phase.holds | (phase.on_cpu if machine.on_cpu else phase.on_gpu)
    holds = {name: round(size) for name, size in held.items() if size and counts}
    spent = machine.total(phase.work) / machine.threads if machine.on_cpu else machine.total(phase.work)
    return {
        "name": phase.name,
        "count": phase.count,
        "flops": phase.flops,
        "seconds": spent,
        "cpu_seconds": machine.total(phase.work) if machine.on_cpu else None,
        "holds_bytes": holds,
        "peak_bytes": round(stays + sum(holds.values())),
    }


def resident(found: Estimate, machine: Machine) -> float:
    """Bytes that a worker's libraries hold, where that was measured."""
    for phase in found.phases:
        for _, part in phase.work:
            if part.kind == "start" and "modules=command" not in part.key:
                return machine.known.get(part.key, {}).get("resident_bytes", 0.0)
    return 0.0


def assumptions(machine: Machine, work: Work, libraries: float) -> list[str]:
    """How far the numbers can be trusted."""
    if not machine.measured:
        return [
            f"times are not measured: 40 % of the published products and 60 % of the bandwidth of one {machine.name}"
        ]
    notes, share = [], machine.timed(work)
    if machine.on_cpu and not libraries:
        notes.append("memory is without that of the libraries, which was not measured here")
    if share < 0.9:
        notes.append(f"{1 - share:.0%} of the time rests on the machine's general rates, not on pieces of this job")
    return notes
