"""Times and peak memory of a job from short runs of the very command, with its launcher, threads and sizes.

A short run has few of the steps or phases, and a share of what is measured beside them. It is watched from outside:

    start      up to where its repeated part begins
    repeated   from line to line of metrics.jsonl: a phase, or an optimiser step
    look       what the last phase of RLHF has beside
    rest       from the last line to the end

Steps or phases are multiplied; start and rest are straight lines through two runs, of shares s and 2 s, extended to
share 1. What was found is kept, with its date, for every job that has the same short runs.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from saerl_cli.config import flat
from saerl_cli.config.algo import AlgoKind
from saerl_cli.models import locate
from saerl_cli.plan.machine import Machine
from saerl_cli.plan.saes import CHUNK
from saerl_cli.planted.cache import cache_folder
from saerl_cli.run.directory import utc_now, versions
from saerl_cli.run.files import read_json, read_jsonl, write_json
from saerl_cli.run.launch import stop
from saerl_cli.run.progress import say

LEAST = 1 / 8
"""Share of what is measured that a short run has at least: what it costs is multiplied by the inverse."""
ENOUGH_S, MOST = 4.0, 20
"""The second run repeats for so many seconds, but at most so many units."""
LIMIT_S = 900.0
"""Seconds after which a short run is given up."""
POLL_S, FAMILY_S = 0.01, 0.25
GROWN = 2**24
"""Bytes by which memory must grow from one share to the next to be more than the heap's whim."""

Job = tuple[str, list[str], Any, list[str] | None]
"""Its command word; what would follow that; its settings; the words that train its SAEs, None where they are there."""


@dataclass
class Short:
    """How a command is made short.

    Attributes:
        count: its steps or phases; 0 where nothing is repeated.
        unit: steps that are timed together, as those that one shuffle buffer lasts for.
        word: the setting that says how many there are.
        each: its value for a unit.
        looks: at the policy; one comes with the last phase.
        scaled: setting -> its value, and the least that is representative.
        fixed: settings of every short run.
    """

    count: int = 0
    unit: int = 1
    word: str = ""
    each: int = 1
    looks: int = 0
    scaled: dict[str, tuple[int, int]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the scaled settings, in the first run."""
        least = max((least / full for full, least in self.scaled.values()), default=1.0)
        return 1.0 if least > 0.5 else max(LEAST, least)

    def words(self, units: int, share: float) -> list[str]:
        """Settings of a short run that times so many units, after one that warms up."""
        settings = self.fixed | {name: max(least, round(full * share)) for name, (full, least) in self.scaled.items()}
        units += 1 + (self.looks > 0)
        if units * self.unit < self.count:
            settings[self.word] = self.each * units
        return [f"{name}={value}" for name, value in settings.items()]


def shortened(command: str, config: Any, count: int) -> Short:
    """How a job of these settings, with so many steps or phases, is made short."""
    if command == "train-lm":
        return Short(count, 10, "model.planted.steps", 10, fixed={"log_every": 10})
    if command == "train-sae":
        batch, heldout = config.sae.batch_size, {"eval_tokens": (config.eval_tokens, CHUNK)}
        unit = max(1, config.activations.buffer(batch) // batch)
        return Short(
            count, unit, "sae.tokens", unit * batch, 0, heldout, {"log_every": unit, "activations.cache": "null"}
        )
    if command == "train-reward":
        return Short(count, 8, "pairs.count", 8 * config.batch_size, fixed={"epochs": 1} if count > 16 else {})
    if command == "eval-sae":
        sizes = {"eval_tokens": CHUNK} | ({} if config.probes else {"probe_tokens": 4000})
        sizes |= {"control_tokens": 65_536} if config.controls else {}
        return Short(scaled={name: (getattr(config, name), least) for name, least in sizes.items()})
    evaluation = config.evaluation
    least = {"samples": evaluation.batch_size, "heldout_tokens": 2000}
    sizes = {f"evaluation.{name}": (full := getattr(evaluation, name), min(full, few)) for name, few in least.items()}
    if command == "evaluate":
        return Short(scaled=sizes)
    algo = config.algo
    if algo.kind is AlgoKind.rwr:
        sizes["algo.draws"] = (algo.draws, algo.group_size * max(2, 64 // algo.group_size))
    fixed = {"evaluation.every": 0, "snapshots": 0} | ({"algo.critic_warmup": 0} if algo.critic_warmup else {})
    looks = 1 + ((count - 1) // evaluation.every if evaluation.every else 0)
    return Short(count, 1, "algo.phases", 1, looks, sizes, fixed)


# --- a run that is watched -------------------------------------------------------------------------------------------


def watched(words: list[str], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run a command and note when each line of its metrics.jsonl came.

    Returns:
        marks: (phase or step, wall seconds, CPU seconds of all processes) of each line; end: the same two at the end;
        resident: the most bytes of one worker before the first line, between lines, after the last; peak: the most.

    Raises:
        ValueError: the command refused or failed; its own line.
        TimeoutError: it took more than LIMIT_S.
    """
    log, metrics = folder.with_suffix(".log"), folder / "metrics.jsonl"
    argv = [sys.executable, "-m", "saerl_cli.cli", *words, f"hydra.run.dir={folder}"]
    began = family_at = time.monotonic()
    with log.open("w") as out:
        job = subprocess.Popen(argv, stdout=out, stderr=out, env=os.environ | env)
    marks: list[tuple[float, float]] = []
    resident, family, peak, cpu = [0], list[psutil.Process](), 0, 0.0
    try:
        while True:
            pid, status, used = os.wait4(job.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                job.returncode = os.waitstatus_to_exitcode(status)
                break
            if now - began > LIMIT_S:
                raise TimeoutError
            lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            try:
                if now >= family_at:
                    family, family_at = psutil.Process(job.pid).children(recursive=True), now + FAMILY_S
                resident[-1] = max([resident[-1], *(worker.memory_info().rss for worker in family)])
                peak = max([peak, *map(high_water, family)])
                cpu = sum(sum(process.cpu_times()[:4]) for process in (psutil.Process(job.pid), *family))
            except psutil.Error:  # one has just ended
                family_at = now
            resident += [0] * (lines - len(marks))
            marks += [(now - began, cpu)] * (lines - len(marks))
            time.sleep(POLL_S)
    finally:
        stop(job)
    if job.returncode:
        said = [line for line in log.read_text().splitlines() if line.strip()][-1:] or ["it said nothing"]
        reason = said[0].removeprefix("saerl: ")
        raise ValueError(reason if job.returncode == 2 else f"a short run of this job failed: {reason}")
    places = [row.get("phase", row["step"]) for row in read_jsonl(metrics)]
    return {
        "marks": [(place, *mark) for place, mark in zip(places, marks, strict=False)],
        "end": (now - began, used.ru_utime + used.ru_stime),
        "resident": (resident[0], max(resident[1:-1], default=0), resident[-1]),
        "peak": max(peak, read_json(folder / "run.json").get("peak_gpu_bytes") or 0),
    }


def high_water(process: psutil.Process) -> int:
    """The most memory that a process has held, bytes; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


# --- from short runs to the job --------------------------------------------------------------------------------------


def extrapolated(runs: list[dict[str, Any]], short: Short) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds, and peak bytes, of the parts of the job; repeated and look are those of one.

    Args:
        runs: one or two that were watched, each with its `share`.
        short: how they were made short.
    """
    shares = [run["share"] for run in runs]
    first, steady, last = np.array([ends(run["marks"], short) for run in runs]).swapaxes(0, 1)  # [runs, 3] each
    span = (steady - first).sum(0)
    once = span[1:] / max(span[0], 1)  # wall, CPU
    look = last - steady
    seconds = {
        "start": at_whole(first[:, 1:] - once * first[:, :1], shares),
        "repeated": once,
        "look": (look[:, 1:] - once * look[:, :1]).mean(0).clip(0),
        "rest": at_whole(np.array([run["end"] for run in runs]) - last[:, 1:], shares),
    }
    start, repeated, rest = at_whole(np.array([run["resident"] for run in runs]), shares, GROWN)
    held = {"start": start, "repeated": repeated, "look": repeated, "rest": rest}
    top = max(held, key=lambda part: held[part])
    held[top] = max(held[top], *(run["peak"] for run in runs))
    return {
        part: {"seconds": float(wall), "cpu_seconds": float(cpu), "peak_bytes": float(held[part])}
        for part, (wall, cpu) in seconds.items()
    }


def ends(marks: list[Any], short: Short) -> list[Any]:
    """The first and the last line between which there is nothing but steps or phases, and the last of all."""
    last = marks[-1] if marks else (0, 0.0, 0.0)
    found = [mark for mark in marks if mark[0] and mark[0] % short.unit == 0]
    found = found[:-1] if short.looks else found
    return [found[0], found[-1], last] if len(found) > 1 else [last] * 3


def at_whole(values: np.ndarray, shares: list[float], least: float = 0.0) -> np.ndarray:
    """Straight lines through one or two rows of values at their shares, at share 1, where they rise by so much."""
    if len(values) == 1:
        return values[0]
    rise = values[1] - values[0]
    return np.where(rise > least, values[1] + rise / (shares[1] - shares[0]) * (1 - shares[1]), values.mean(0))


# --- what is kept ----------------------------------------------------------------------------------------------------


def probe(job: Job, count: int, machine: Machine, probing: bool, again: bool) -> dict[str, Any]:
    """Run a job shortly, unless that was done before.

    Args:
        job: what is to be run.
        count: its steps or phases.
        machine: this one.
        probing: run what was not run before.
        again: run also what was; the faster of the two is kept.

    Returns:
        parts: seconds and peaks; looks: how often the policy is looked at; timed: when. Empty where nothing was run.

    Raises:
        ValueError: the command refused or failed.
        TimeoutError: a short run took too long.
    """
    command, words, config, making = job
    short = shortened(command, config, count)
    facts: list[Any] = [command, making, short.words(1, short.share), machine.name, machine.threads, versions()]
    varied = {short.word, *short.scaled, *short.fixed}
    facts += [(key, str(value)) for key, value in flat(asdict(config)).items() if key not in varied]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    file = cache_folder() / "plan" / f"{key}.json"
    known: dict[str, Any] | None = read_json(file) if file.is_file() else None
    if probing and (known is None or again):
        timings: list[dict[str, Any]] = [known] if known else []
        timings.append({"job": [command, *words], "runs": short_runs(job, short), "timed": utc_now()})
        known = min(timings, key=lambda timing: pace(extrapolated(timing["runs"], short)))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    if known is None:
        return {}
    return {"parts": extrapolated(known["runs"], short), "looks": short.looks, "timed": known["timed"]}


def pace(parts: dict[str, dict[str, float]]) -> float:
    """What decides which of two timings is the better: seconds of what is repeated, else of all."""
    return parts["repeated"]["seconds"] or sum(part["seconds"] for part in parts.values())


def short_runs(job: Job, short: Short) -> list[dict[str, Any]]:
    """One run, or two of different shares; the second repeats for longer where the first was quick."""
    command, words, config, making = job
    shares = [1.0] if short.share == 1 else [short.share, 2 * short.share]
    runs: list[dict[str, Any]] = []
    if command != "train-lm" and hasattr(config.model, "kind"):
        locate(config.model)  # making or fetching a model is no part of a short run
    with tempfile.TemporaryDirectory(prefix="saerl-plan-") as place:
        folder, env = Path(place), {"SAERL_CACHE": f"{place}/cache"} if command == "train-lm" else {}
        if making is not None:
            say("training SAEs for a moment, to run the job with")
            shared = ("model=", "model.", "data=", "data.", "launch") if command == "rlhf" else ()
            few = [word for word in words if word.startswith(shared)] + [*making, "sae.tokens=131072"]
            watched(["train-sae", *few, f"eval_tokens={CHUNK}"], folder / "saes", {})
            words = [*words, f"{'adapter.saes' if command == 'rlhf' else 'saes'}={folder / 'saes'}"]
        units = 2 if command == "rlhf" else 1
        for number, share in enumerate(shares):
            say(f"running the job shortly ({number + 1} of {len(shares)})")
            run = watched([command, *words, *short.words(units, share)], folder / f"run{number}", env)
            runs.append({"share": share} | run)
            each = extrapolated(runs, short)["repeated"]["seconds"] * short.unit
            units = max(units, min(MOST, ceil(ENOUGH_S / each))) if each else units
    return runs
