"""The SAEs of a run that may not be trained yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.groups import ModelConfig
from saerl_cli.config.sae import Architecture, SaeConfig
from saerl_cli.models import resolve_sites
from saerl_cli.plan.compose import composed
from saerl_cli.plan.work import Piece, dictionary, splice
from saerl_cli.run.files import read_json
from saerl_cli.sae.files import find_saes, read_sae_config
from saerl_cli.sae.sweep import Planned, plan

LIKELY_L0 = 64
"""Active features a token that are assumed where settings do not say."""


@dataclass(frozen=True)
class Dictionary:
    """The sizes of an SAE that coefficients are put on."""

    site: str
    layer: int | None
    d_in: int
    d_sae: int
    k: int
    """Active features a token, about."""
    topk: bool
    """The k largest are chosen on every token, so that nothing of the encoder can be left out."""

    @property
    def parameters(self) -> int:
        """Frozen numbers."""
        return 2 * self.d_in * self.d_sae + self.d_sae + self.d_in

    @property
    def step_bytes(self) -> float:
        """What a token adds to a pass with gradients: its codes, and the dense matrices that they are found in."""
        return 16.0 * self.k + 4 * self.d_in + 2 * 4 * self.d_sae

    def piece(self, tokens: float, how: str) -> Piece:
        """Its splice (`saerl_cli.plan.work.splice`)."""
        return splice(self.d_in, self.d_sae, self.k, self.topk, tokens, how)

    def measured(self, tokens: float, how: str) -> Piece:
        """It alone (`saerl_cli.plan.work.dictionary`)."""
        return dictionary(self.d_in, self.d_sae, self.k, self.topk, tokens, how)


def dictionaries(
    adapter: AdapterConfig, model: ModelConfig, description: Any, words: Sequence[str]
) -> tuple[list[Dictionary], list[str]]:
    """The SAEs that an adapter names, from the lowest site up, and what was assumed.

    Those of a folder are read from it; of a folder that is not there yet they are what `saerl train-sae WORDS` on the
    same model makes.

    Raises:
        ValueError: sites that the model lacks.
    """
    if adapter.saes is None:  # random directions
        sites = resolve_sites(adapter.sites or [], description)
        random = [Dictionary(s.name, s.layer, s.width, adapter.d_sae or 0, adapter.k or 0, True) for s in sites]
        return sorted_by_layer(random), []
    if Path(adapter.saes).is_dir():
        return sorted_by_layer([found(name, path, description) for name, path in of_folder(adapter).items()]), []
    config = composed("train_sae", words)
    config.model = model
    made = []
    for planned in plan(config, description):
        if adapter.sites and planned.site.name not in adapter.sites:
            continue
        made.append(dictionary_of(planned))
    kept = list({one.site: one for one in made}.values())  # of a sweep one a site
    if not kept:
        raise ValueError(f"saerl train-sae {' '.join(words)} makes no SAE of adapter.sites; give its words in --sae")
    what = f"saerl train-sae {' '.join(words)}".strip()
    return sorted_by_layer(kept), [f"{adapter.saes} is not there yet: taken to hold what `{what}` makes"]


def dictionary_of(planned: Planned) -> Dictionary:
    """An SAE that a run will train."""
    site, settings = planned.site, planned.config
    d_sae = settings.width(site.width)
    topk = settings.architecture is Architecture.topk
    return Dictionary(site.name, site.layer, site.width, d_sae, round(active(settings, d_sae)), topk)


def active(config: SaeConfig, d_sae: int) -> float:
    """Active features a token."""
    if config.architecture in (Architecture.topk, Architecture.batchtopk, Architecture.matryoshka):
        return config.k
    return min(d_sae, config.target_l0 or LIKELY_L0)


def of_folder(adapter: AdapterConfig) -> dict[str, Path]:
    """Site -> folder of the SAEs that are there."""
    saes = find_saes(adapter.saes or "")
    return {site: path for site, path in saes.items() if not adapter.sites or site in adapter.sites}


def found(name: str, folder: Path, description: Any) -> Dictionary:
    """An SAE by its settings file."""
    config = read_sae_config(folder)
    (site,) = resolve_sites([name], description)
    topk = config.get("architecture") == "topk"
    k = config.get("k") or mean_l0(folder, name) or LIKELY_L0
    return Dictionary(name, site.layer, config["d_in"], config["d_sae"], round(k), topk)


def mean_l0(folder: Path, name: str) -> float | None:
    """Active features a token that the summary of the SAE's run tells."""
    try:
        return read_json(folder.parent.parent / "summary.json")["saes"][name]["l0"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sorted_by_layer(saes: list[Dictionary]) -> list[Dictionary]:
    """From the lowest site up."""
    return sorted(saes, key=lambda one: (one.layer or 0, one.site))
