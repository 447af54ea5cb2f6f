"""Refusing before anything happens: compose, type, check. What is wrong becomes one `ValueError` of one line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config import flat, typed
from saerl_cli.config.groups import ALL_GPUS
from saerl_cli.run import cluster, launch, lock
from saerl_cli.run.configs import conf_dir, config_dirs
from saerl_cli.run.directory import Run, shown
from saerl_cli.run.files import read_json, sha256_file
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.refusals import readable
from saerl_cli.run.sweep_table import RECORD, recorded
from saerl_cli.run.words import sweep_points

MAY_CHANGE = ("launch.threads", "launch.trackers", "activations.prefetch", "activations.cache_gb", "algo.prefix_cache")
"""Settings that may differ when a run is resumed."""
ANOTHER = "two sweeps in one directory; write another hydra.sweep.dir"
SAE_WEIGHTS = "sae_weights.safetensors"
"""The file by whose hash a run names an SAE."""


def preflight(
    name: str, flags: Sequence[str], overrides: Sequence[str], multirun: bool
) -> tuple[Path | None, list[str]]:
    """Compose every point, build its dataclass, run the command's own checks. Nothing is written.

    Returns:
        The run directory, None for a sweep, which has one a point; and words that write down
        what this machine decided.

    Raises:
        ValueError: one line saying what is wrong and what to write instead.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for_sweeps = [word for word in overrides if word.startswith(("hydra/launcher=", "hydra/sweeper="))]
    if for_sweeps and not multirun:  # Hydra would quietly run the job here
        raise ValueError(f"{for_sweeps[-1]} has no effect without -m; add -m (one job is a sweep of one)")
    if multirun and all(word.startswith("hydra.") for word in overrides):  # would start a run of the defaults
        raise ValueError("-m sweeps over values, and no setting has any; write KEY=VALUE,VALUE, or leave -m out")
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs(flags))}]"]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            words = list(sweep_points(overrides)) if multirun else [list(overrides)]
            composed = [compose(name, [*search, *point], return_hydra_config=True) for point in words]
            foreseen = not multirun or (len(words[0]) == len(overrides) and is_plain(composed[0].hydra.sweeper))
            place = Path(composed[0].hydra.sweep.dir).absolute() if multirun else None
            points = [as_point(name, cfg, i if multirun else None, foreseen) for i, cfg in enumerate(composed)]
            if place is not None:
                if (place / "run.json").is_file():
                    raise ValueError(f"{shown(place)} is the directory of a run; write another hydra.sweep.dir")
                asked = {point.folder: point.cfg for point in points if point.folder}
                refuse_other_sweep(place, name, asked, lambda noted: compose(name, [*search, *noted]))
        for point in points:  # checks may read files: only once all are well-formed
            check_point(name, point)
        return (None if multirun else points[0].folder), decisions(points)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(readable(error, name, resolve(JOBS[name].schema))) from None
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


@dataclass
class Point:
    """One run that is asked for."""

    folder: Path | None
    """The directory it will write, absolute; None where a sweeper that chooses points has yet to number it."""
    launcher: Any
    """Hydra's settings of what starts it; None for a single run, which is started here."""
    cfg: Any
    """Its settings as Hydra composed them."""
    config: Any
    """The same as its dataclass."""
    counted: bool
    """Whether its number of processes is that of the GPUs."""


def decisions(points: Sequence[Point]) -> list[str]:
    """The number of GPUs as a word, where `launch=gpu` and its like ask for it, so that the run's config names it."""
    if not any(point.counted for point in points):
        return []
    numbers = {point.config.launch.num_processes for point in points}
    if len(numbers) > 1:
        raise ValueError("a sweep over launch= cannot count GPUs; name numbers, for instance launch=one,gpu_2")
    return [f"launch.num_processes={numbers.pop()}"]


def is_plain(sweeper: Any) -> bool:
    """Whether a sweep's points are the product of the command line's values, in their order."""
    return sweeper._target_.endswith(".BasicSweeper") and not sweeper.get("params")


def as_point(name: str, cfg: Any, number: int | None, foreseen: bool = True) -> Point:
    """A composed config as its dataclass, whose `__post_init__` judges; `number` is its place in a sweep."""
    from omegaconf import open_dict

    folder = run_dir(cfg, number) if foreseen else None
    launcher, hydra = cfg.hydra.launcher if number is not None else None, cfg.hydra
    counted = "launch" in cfg and cfg.launch.num_processes == ALL_GPUS
    with open_dict(cfg):
        if counted:
            on_cluster = launcher is not None and cluster.is_slurm(launcher)
            visible = hydra.launcher.get("gpus_per_node") if on_cluster else launch.gpus()
            cfg.launch.num_processes = launch.counted(cfg.launch, hydra.runtime.choices.launch, visible)
        del cfg["hydra"]
    return Point(folder, launcher, cfg, typed(cfg, resolve(JOBS[name].schema)), counted)


def check_point(name: str, point: Point) -> None:
    """Judge a run by its directory, this machine or the cluster, and the job's own check."""
    if point.folder is not None and point.folder.is_dir():
        lock.refuse_if_held(point.folder)
        if point.launcher is None and (point.folder / RECORD).is_file():
            again = read_json(point.folder / RECORD)["command"]
            raise ValueError(f"{shown(point.folder)} is a sweep ({again}); take another hydra.run.dir")
        refuse_other_settings(point.folder, name, point.cfg, in_sweep=point.launcher is not None)
        if Run(point.folder).status == "completed":
            return  # nothing will be done
        refuse_changed_saes(point.folder)
    if hasattr(point.config, "launch"):
        on_cluster = point.launcher is not None and cluster.is_slurm(point.launcher)
        launch.check_launch(point.config.launch, here=not on_cluster)
        if on_cluster:
            cluster.check_slurm(point.launcher, point.config.launch)
    resolve(JOBS[name].check)(point.config)


def run_dir(cfg: Any, number: int | None) -> Path:
    """The directory a composed job will write, absolute."""
    from omegaconf import open_dict

    if number is None:
        return Path(cfg.hydra.run.dir).absolute()
    with open_dict(cfg):
        cfg.hydra.job.num = number
    return Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir).absolute()


class SweepRefused(ValueError):
    """A sweep that its directory does not allow, found out when its points are known; nothing has been started."""


def refuse_other_settings(folder: Path, name: str, cfg: Any, in_sweep: bool = False) -> None:
    """Refuse a directory that another command, or other settings, began. Hydra would overwrite its config.

    Raises:
        ValueError: it was; `SweepRefused` when `in_sweep`.
    """
    run = Run(folder)
    job_before, before = run.record.get("job", name), run.settings
    if job_before != name:
        what, instead = f"is a run of saerl {job_before.replace('_', '-')}", "; take another hydra.run.dir"
    elif before and (changed := changed_setting(before, cfg)):
        what = f"was started with other settings ({changed})"
        instead = "; repeat its command to resume it, or take another hydra.run.dir"
    else:
        return
    if in_sweep:
        raise SweepRefused(f"{shown(folder)} {what}: {ANOTHER}")
    raise ValueError(f"{shown(folder)} {what}{instead}")


def refuse_other_sweep(
    place: Path, name: str, points: Mapping[Path, Any], composed: Callable[[Sequence[str]], Any]
) -> None:
    """Refuse points that the sweep of this directory has noted with other settings, though nothing has begun them.

    Args:
        place: the sweep's directory.
        name: root config of the command.
        points: folder -> settings, of the points that are asked for.
        composed: what makes settings of a noted point's words.

    Raises:
        SweepRefused: the message names a point and what differs.
    """
    noted = recorded(place)
    if noted and (job := read_json(place / RECORD)["job"]) != name:
        raise SweepRefused(f"{shown(place)} is a sweep of saerl {job.replace('_', '-')}: {ANOTHER}")
    for folder, cfg in points.items():
        if folder not in noted or (folder / ".hydra" / "config.yaml").is_file():  # which tells itself
            continue
        if changed := changed_setting(composed(noted[folder]), cfg):
            raise SweepRefused(f"{shown(folder)} is noted with other settings ({changed}): {ANOTHER}")


def changed_setting(before: Any, now: Any) -> str | None:
    """Name the first setting that differs between two configs though it may not: `KEY=WAS, now GIVEN`."""
    from omegaconf import OmegaConf

    one, two = (flat(OmegaConf.create(OmegaConf.to_yaml(cfg))) for cfg in (before, now))
    for key in {**two, **one}:
        if one.get(key) != two.get(key) and key not in MAY_CHANGE:
            was, given = (OmegaConf.select(which, key) for which in (before, now))
            return f"{key}={was}, now {given}"
    return None


def refuse_changed_saes(folder: Path) -> None:
    """Refuse to resume a run whose SAEs are no longer the files it began with."""
    run = Run(folder)
    for site, sae in run.record.get("inputs", {}).get("sae", {}).items() if run.checkpoints() else ():
        weights = Path(sae["path"]) / SAE_WEIGHTS
        if weights.is_file() and (found := sha256_file(weights)) != sae["sha256"]:
            raise ValueError(
                f"{shown(folder)} was begun with another SAE at {site}: {sae['path']} had sha256"
                f" {sae['sha256'][:12]}, now {found[:12]}; put it back, or take another hydra.run.dir"
            )
