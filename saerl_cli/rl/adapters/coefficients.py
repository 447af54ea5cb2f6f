"""Coefficients on the features of SAEs, trained or random: their checks without torch, SAEs and PEFT configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.adapter import AdapterConfig, Splice, refuse_top_k
from saerl_cli.config.groups import ModelConfig
from saerl_cli.models import known_sha256, resolve_sites
from saerl_cli.rl.adapters.selection import free_features
from saerl_cli.sae.files import check_sae, find_saes, provenance, read_sae_config, refuse_transcoder

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from saerl_cli.models import Loaded
    from saerl_cli.run.directory import Run


def check(adapter: AdapterConfig, model: ModelConfig, description: Any) -> None:
    """Refuse SAEs and features that are not there, and more coefficients to keep than there are.

    Raises:
        ValueError: a site without an SAE, an SAE of another width, site or model, an unknown feature.
    """
    if adapter.saes:
        sizes = {site: read_sae_config(path)["d_sae"] for site, path in check_saes(adapter, model, description).items()}
    else:
        d_sae, k = adapter.d_sae or 0, adapter.k or 0
        sizes = {site.name: d_sae for site in resolve_sites(adapter.sites or [], description)}
        if k > d_sae:
            raise ValueError(f"adapter.k={k} directions cannot fire of adapter.d_sae={d_sae}; lower it")
    free = free_features(adapter, sizes)
    refuse_top_k(adapter.sparsity, sum(map(len, free.values())) if free else sum(sizes.values()))


def check_saes(adapter: AdapterConfig, model: ModelConfig, description: Any) -> dict[str, Path]:
    """The SAE folders to use, by site name, each fit for this model.

    Raises:
        ValueError: no SAEs, a site without one, or an SAE of another width, site or model.
    """
    saes, sha256 = named_saes(adapter), known_sha256(model)
    for name, folder in saes.items():
        (site,) = resolve_sites([name], description)
        config = check_sae(folder, model_sha256=sha256, width=site.width)
        refuse_transcoder(config, folder, site.name)
        module = provenance(config).get("module")
        if module not in (None, site.module):
            raise ValueError(
                f"the SAE {folder} was trained at {module}, but {site.name} of this model is {site.module}"
            )
    return saes


def named_saes(adapter: AdapterConfig) -> dict[str, Path]:
    """Site -> folder of the SAEs that the settings name.

    Raises:
        ValueError: no SAEs, or a site without one.
    """
    saes = find_saes(adapter.saes or "")
    missing = [site for site in adapter.sites or [] if site not in saes]
    if missing:
        raise ValueError(f"there is no SAE of {missing[0]} in {adapter.saes}; there are {', '.join(sorted(saes))}")
    return {site: saes[site] for site in (adapter.sites or sorted(saes))}


def drawn_saes(adapter: AdapterConfig, loaded: "Loaded", rows: "Tensor", run: "Run") -> dict[str, Path]:
    """Site -> folder of its random directions, drawn into RUN/sae unless an earlier attempt did.

    Args:
        adapter: the settings.
        loaded: the model.
        rows: held-out token ids, [n, context], by which random directions are centred and calibrated.
        run: its directory.
    """
    from saerl_cli.rl.adapters.directions import draw

    saes = named_saes(adapter) if adapter.saes else {}
    return draw(adapter, saes, loaded, rows, run)


def peft_config(adapter: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path]) -> "PeftConfig":
    """A coefficient on every feature of `saes`, by site."""
    from saerl_cli.adapter import sparse_coeffs

    gates = adapter.sparsity.hard_concrete is not None
    return sparse_coeffs(loaded, saes, splice=adapter.splice.value, gates=gates)


def count(adapter: AdapterConfig, features: Mapping[str, int]) -> int:
    """A coefficient a feature, and a bias or a gate where there are such."""
    vectors = 1 + (adapter.splice is Splice.pre_activation) + (adapter.sparsity.hard_concrete is not None)
    return vectors * sum(features.values())
