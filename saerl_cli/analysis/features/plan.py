"""Which features of which SAEs `saerl features` describes, on which model and text; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from saerl_cli.config.features import FeaturesConfig
from saerl_cli.config.groups import DataConfig, ModelConfig
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.adapters.selection import by_number
from saerl_cli.rl.runs import coefficient_run, policy_folder
from saerl_cli.sae.evaluate import combined, recorded_settings
from saerl_cli.sae.files import find_saes, read_sae_config


@dataclass
class Plan:
    """What is to be described."""

    model: ModelConfig
    data: DataConfig
    saes: dict[str, Path]
    """Site -> SAE folder."""
    sizes: dict[str, int]
    """Site -> features of its SAE."""
    ids: dict[str, set[int]] | None
    """Site -> features asked for; None: those with the largest effect."""
    trained: RlhfConfig | None
    """Settings of the policy's run."""


def plan_of(config: FeaturesConfig) -> Plan:
    """Which features of which SAEs, on which model and text.

    Raises:
        ValueError: no such run or SAEs, an unfinished run, a site or feature that is not there.
    """
    if config.policy is not None:
        trained, saes = policy_saes(config.policy)
        model, data = trained.model, trained.data
    else:
        trained, saes = None, find_saes(str(config.saes))
        recorded = recorded_settings(next(iter(saes.values())))
        model = combined("model", config.model, recorded, ModelConfig)
        data = combined("data", config.data, recorded, DataConfig)
    missing = [site for site in config.sites or [] if site not in saes]
    if missing:
        raise ValueError(f"sites: there is no SAE of {missing[0]}; there are {', '.join(saes)}")
    saes = {site: folder for site, folder in saes.items() if config.sites is None or site in config.sites}
    sizes = {site: int(read_sae_config(folder)["d_sae"]) for site, folder in saes.items()}
    ids = by_number(config.ids, "ids", sizes) if config.ids is not None else None
    return Plan(model, data, saes, sizes, ids, trained)


def policy_saes(run: str) -> tuple[RlhfConfig, dict[str, Path]]:
    """Settings of a finished coefficient run, and the SAEs of its adapter by site.

    Raises:
        ValueError: no such run, not finished, or without coefficients.
    """
    trained = coefficient_run(run)
    from saerl_cli.adapter.files import check_adapter  # imports PEFT, hence last

    adapter = check_adapter(policy_folder(run, trained))
    sites = adapter.sites or {}
    return trained, {sites.get(module, module): adapter.find_sae(module) for module in adapter.saes or {}}
