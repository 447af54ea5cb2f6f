"""`saerl plan COMMAND`: the job's settings, its sizes, its times."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config import typed
from saerl_cli.config.groups import ALL_GPUS
from saerl_cli.run.configs import conf_dir, config_dirs, register_schema
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.launch import gpus
from saerl_cli.run.refusals import readable
from saerl_cli.run.words import expand_sites, split_words

if TYPE_CHECKING:
    from saerl_cli.plan.machine import Machine
    from saerl_cli.plan.meta import Estimate

PLANNED = ("train-lm", "train-sae", "train-reward", "rlhf", "evaluate", "eval-sae")
"""Commands that can be planned."""
HERE, ELSEWHERE = "here", "a100-80gb"
"""What --device says of this machine, and what GPUs are taken to be where a job asks for several and none is here."""
START_S = 13.0
"""Imports and loading, where nothing was run."""


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
        probing: run the job shortly where that was not done before.
        sae_words: of the `saerl train-sae` that makes SAEs which are not there yet.
        length: tokens of a completion on average, where the job is not run.
        again: run also what was run before.

    Raises:
        ValueError: one line about what cannot be planned.
    """
    if command not in PLANNED:
        raise ValueError(f"saerl plan has no word {command}; write one of {', '.join(PLANNED)}")
    config = composed(command, words)
    if length is not None and length <= 0:
        raise ValueError(f"--length is in tokens, > 0, got {length:g}")
    missing = unmade(command, config)
    making = composed("train-sae", sae_words) if missing else None
    if making is not None and command == "rlhf":
        making.model = config.model
    found = estimate(command, config, making, length)
    if missing:
        what = " ".join(["saerl train-sae", *sae_words])
        found.notes.insert(0, f"{missing} is not there yet: taken to hold what `{what}` makes")
    from saerl_cli.plan.machine import present, published

    elsewhere = not config.launch.cpu and config.launch.num_processes > max(1, gpus())
    name = device or (ELSEWHERE if elsewhere else HERE)
    if name != HERE:
        return described(command, config, found, published(name), {})
    from saerl_cli.plan.probe import probe

    machine = present(config.launch)
    try:
        job = (command, list(words), config, list(sae_words) if missing else None)
        timed = probe(job, found.count, machine, probing, again)
    except TimeoutError:
        timed = {}
        found.notes.append("a short run took too long and was given up")
    return described(command, config, found, machine, timed)


def composed(command: str, words: Sequence[str]) -> Any:
    """The settings of a command as its job would compose them, without asking for what is not there yet.

    Raises:
        ValueError: a word that makes no sense, a contradiction, or a flag that does not choose settings.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    name, (flags, overrides) = command.replace("-", "_"), split_words(words)
    extra = [flag for flag in flags if flag.startswith("-") and flag not in ("--config-dir", "-cd")]
    if extra:
        raise ValueError(f"saerl plan plans one job; leave out {extra[0]}")
    register_schema(name)
    schema, places = resolve(JOBS[name].schema), ",".join(f"file://{path}" for path in config_dirs(flags))
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(name, [f"hydra.searchpath=[{places}]", *expand_sites(overrides, conf_dir(), False)])
        if cfg.launch.num_processes == ALL_GPUS:  # of a machine that may be another
            cfg.launch.num_processes = max(1, gpus())
        return typed(cfg, schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(readable(error, name, schema)) from None


def unmade(command: str, config: Any) -> str:
    """The folder of SAEs that the job reads, where it has yet to be made."""
    paths = config.paths() if command == "eval-sae" else [config.adapter.saes] if command == "rlhf" else []
    return "" if any(path is None or Path(path).is_dir() for path in paths) else next(iter(paths), "")


def estimate(command: str, config: Any, making: Any, length: float | None) -> "Estimate":
    """Sizes and work of a command's job, counted on its objects; `making` trains SAEs that are not there yet."""
    from saerl_cli.models import quiet_transformers
    from saerl_cli.plan import language, rlhf, saes

    with quiet_transformers():
        if command == "rlhf":
            return rlhf.rlhf(config, making, length)
        if command == "evaluate":
            return rlhf.evaluate(config, length)
        if command == "eval-sae":
            return saes.eval_sae(config, making)
        counts = {"train-lm": language.train_lm, "train-reward": language.train_reward, "train-sae": saes.train_sae}
        return counts[command](config)


def described(
    command: str, config: Any, found: "Estimate", machine: "Machine", timed: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the table shows.

    Args:
        command: its command word.
        config: its settings.
        found: its sizes and work.
        machine: what the times are those of.
        timed: what short runs found (`saerl_cli.plan.probe`); empty where there were none.
    """
    stays = {name: round(held) for name, held in found.stays.items() if held}
    base = sum(stays.values())
    counted = {
        "start": (START_S, base),
        "repeated": (machine.seconds(found.once, found.one), base + found.holds),
        "rest": (machine.seconds(found.measurement, found.one), base + found.measuring),
    }
    parts = timed.get("parts") or {
        part: {"seconds": seconds, "cpu_seconds": 0.0, "peak_bytes": peak} for part, (seconds, peak) in counted.items()
    }
    rows = {
        "start": ("start and text", 1, 0.0),
        "repeated": (found.repeated, found.count, float(found.once[0])),
        "look": ("looks", timed.get("looks", 0), 0.0),
        "rest": ("measurement", 1, float(found.measurement[0])),
    }
    phases = [
        {"name": name, "count": count, "flops": flops, **parts[part]}
        for part, (name, count, flops) in rows.items()
        if count
    ]
    whole = {key: sum(one["count"] * one[key] for one in phases) for key in ("flops", "seconds", "cpu_seconds")}
    peak, processes = max(phases, key=lambda phase: phase["peak_bytes"]), config.launch.num_processes
    return {
        "command": command,
        "processes": processes,
        "dtype": found.one.dtype,
        "machine": machine.record(),
        "timed": timed.get("timed"),
        "parameters": {name: number for name, number in found.parameters.items() if number},
        "stays_bytes": stays,
        "phases": phases,
        "peak_bytes": round(peak["peak_bytes"]),
        "peak_phase": peak["name"],
        "fits": peak["peak_bytes"] * (processes if machine.on_cpu else 1) <= machine.memory,
        **whole,
        "flops": processes * whole["flops"],
        "disk_bytes": {name: round(held) for name, held in found.disk.items() if held},
        "notes": [*found.notes, *assumed(machine, timed, whole["cpu_seconds"] / whole["seconds"])],
    }


def assumed(machine: "Machine", timed: dict[str, Any], share: float) -> list[str]:
    """How far the times can be trusted; `share` is that of a core which the short runs got."""
    if not machine.here:
        return [f"not measured: 40 % of the published products and 60 % of the bandwidth of one {machine.name}"]
    if not timed:
        return ["not run: times are those of products at half the speed of a large one; memory is without libraries"]
    busy = machine.on_cpu and share < 0.7
    return [f"other work ran beside the short runs, which got {share:.0%} of a core"] if busy else []
