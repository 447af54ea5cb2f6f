"""Several SAEs a site from one stream of activations: the points of `sweep`.

    sweep=[{k:[8,16,32]},{sae:relu,l1:[2,5],seed:[0,1]}]

is seven SAEs a site: three TopK ones, and ReLU ones with every combination of two coefficients and two seeds. An entry
changes settings of `sae`; a list gives one SAE each (a setting that is a list itself takes a list of lists); `sae`
names a preset to begin with, of which the sizes and the budget of `sae` (tokens, batch, width, seed) are not taken.
Every SAE that is in the sweep is named by what is changed in it.
"""

from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from itertools import product
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saerl_cli.config.groups import SiteConfig
from saerl_cli.config.sae import NAMES, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.models import Site, resolve_sites
from saerl_cli.run.configs import conf_dir

SHARED = ("batch_size",)
"""Settings of the stream, which all points share."""
KEPT = ("tokens", "batch_size", "expansion", "d_sae", "seed", "encoder_dtype", "kernel", "init_from")
"""What a preset in a sweep leaves as `sae` has it."""
LISTS = tuple(f.name for f in fields(SaeConfig) if "list" in str(f.type))


@dataclass(frozen=True)
class Planned:
    """One SAE that a run trains."""

    name: str
    """Its folder: the site, and what the sweep changed."""
    site: Site
    """What it reads."""
    target: Site | None
    """What a transcoder predicts; None for an autoencoder."""
    config: SaeConfig
    """Its settings."""


def plan(config: TrainSaeConfig, model: Any) -> list[Planned]:
    """Every SAE of a run, in order of sites.

    Args:
        config: the run's settings.
        model: a model or its description.

    Raises:
        ValueError: sites that the model lacks, or a sweep that makes no sense.
    """
    points = sweep_points(config.sae, config.sweep)
    return [
        Planned(f"{place}-{point}" if point else place, site, target, sae)
        for place, site, target in places(config.site, model)
        for point, sae in points.items()
    ]


def places(config: SiteConfig, model: Any) -> list[tuple[str, Site, Site | None]]:
    """Name, site and target of what `site` asks for."""
    sites = resolve_sites(config.names, model)
    if config.targets is None:
        return [(site.name, site, None) for site in sites]
    targets = resolve_sites(config.targets, model)
    if len(sites) != len(targets):
        raise ValueError(
            f"site.names gives {len(sites)} sites and site.targets {len(targets)}; a transcoder needs one of each"
        )
    for site, target in zip(sites, targets, strict=True):
        if site == target:
            raise ValueError(f"a transcoder from {site.name} to itself is an autoencoder; leave site.targets empty")
    return [(f"{site.name}-to-{target.name}", site, target) for site, target in zip(sites, targets, strict=True)]


def sweep_points(base: SaeConfig, sweep: list[Any]) -> dict[str, SaeConfig]:
    """Name -> settings; one point without a name where there is no sweep.

    Raises:
        ValueError: an entry that is no mapping, an unknown setting or preset, two points alike, or a contradiction.
    """
    if not sweep:
        return {"": base}
    points: dict[str, SaeConfig] = {}
    for number, entry in enumerate(sweep):
        if not isinstance(entry, dict) or not entry:
            raise ValueError(f"sweep[{number}] must change settings, for instance sweep=[{{k:[8,16,32]}}]")
        for changes in expanded(entry):
            name = point_name(changes)
            if name in points:
                raise ValueError(f"two points of the sweep are alike: {name}")
            points[name] = changed(base, changes)
    return points


def expanded(entry: dict[Any, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of an entry."""
    axes = []
    for key, value in entry.items():
        many = isinstance(value, list) and (key not in LISTS or all(isinstance(item, list) for item in value))
        axes.append([(str(key), item) for item in (value if many else [value])])
    return [dict(pairs) for pairs in product(*axes)]


def point_name(changes: dict[str, Any]) -> str:
    """`relu-l1_2-seed_0`: presets and architectures by their name, other settings by theirs and their value."""
    parts = []
    for key, value in changes.items():
        shown = "_".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(shown if key in ("sae", "architecture") else f"{key}_{shown}")
    return "-".join(parts).replace("/", "_")


def changed(base: SaeConfig, changes: dict[str, Any]) -> SaeConfig:
    """`base`, or a preset of its size and budget, with changes."""
    rest = {key: value for key, value in changes.items() if key != "sae"}
    for key in rest:
        if key in SHARED:
            raise ValueError(f"sweep: {key} belongs to the stream, which all points share; set sae.{key}")
        if key not in NAMES:
            raise ValueError(f"sweep: there is no setting sae.{key}; saerl train-sae --help lists them")
    if "d_sae" in rest or "expansion" in rest:  # one empties the other
        rest = {"d_sae": None, "expansion": None} | rest
    start = base if "sae" not in changes else from_preset(base, str(changes["sae"]))
    return built(start, rest)


def from_preset(base: SaeConfig, name: str) -> SaeConfig:
    """The option `name` of the config group `sae`, with the sizes and the budget of `base`."""
    kept = {key: getattr(base, key) for key in KEPT}
    return built(SaeConfig(), preset(name) | kept)


def preset(name: str) -> dict[str, Any]:
    """The settings of an option of the config group `sae`, those of the options that it builds on included."""
    path = conf_dir() / "sae" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"sweep: there is no preset sae={name}; there are {known}")
    own: Any = OmegaConf.to_container(OmegaConf.load(path)) or {}
    parents = [parent for parent in own.pop("defaults", []) if parent != "_self_"]
    settings: dict[str, Any] = {}
    for parent in parents:
        settings |= preset(parent)
    return settings | own


def built(start: SaeConfig, changes: dict[str, Any]) -> SaeConfig:
    """`start` with changes as a person writes them: names for enumerations, `1e-3` for a number."""
    plain = {key: value.name if isinstance(value, Enum) else value for key, value in changes.items()}
    try:
        settings = OmegaConf.merge(OmegaConf.structured(SaeConfig), as_plain(start), plain)
        result = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise ValueError(f"sweep: {str(error).splitlines()[0]}") from None
    assert isinstance(result, SaeConfig)
    return replace(result)


def as_plain(config: SaeConfig) -> dict[str, Any]:
    """Settings with the names of enumerations."""
    return {key: value.name if isinstance(value, Enum) else value for key, value in asdict(config).items()}
