"""What RLHF may change: an entry a kind of adapter, and everything that the commands ask of it.

To add an adapter you write
  1. `conf/adapter/NAME.yaml` with `kind: NAME` and its learning rate;
  2. an entry in `ADAPTERS` below: its check before work and its PEFT configuration, of PEFT's own methods or ours;
  3. for a new method, a folder config.py layer.py model.py in `saerl_cli/adapter`, made known to PEFT in its
     `__init__`, with what `merge_and_unload` leaves behind if it is to be exported as a model;
  4. for settings of its own, fields of `AdapterConfig` (`saerl_cli/config/adapter.py`) that say they belong to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.groups import ModelConfig
from saerl_cli.rl.adapters import coefficients, layers

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from saerl_cli.models import Loaded
    from saerl_cli.run.directory import Run


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the commands ask of a kind of adapter; importing it loads no torch."""

    check: Callable[[AdapterConfig, ModelConfig, Any], None]
    """check(settings, model, its description): a `ValueError` of one line, before any work and without torch, where
    the model has no place for the adapter."""
    peft_config: "Callable[[AdapterConfig, Loaded, Mapping[str, Path]], PeftConfig] | None"
    """peft_config(settings, loaded, saes by site): the configuration for `get_peft_model`; the model is only looked at.
    None: no PEFT, every weight of the model is trained and saved."""
    saes: "Callable[[AdapterConfig, Loaded, Tensor, Run], dict[str, Path]] | None" = None
    """saes(settings, loaded, held-out token ids [n, context], run): site -> folder of the SAE whose features have
    coefficients. None: there are no features."""
    count: Callable[[AdapterConfig, Mapping[str, int]], int] | None = None
    """count(settings, features by site): numbers trained on the features of its SAEs; with `saes`."""
    sites: list[str] = field(default_factory=list)
    """Where it acts unless `adapter.sites` says otherwise; empty where that follows from SAEs, or is everywhere."""
    untouched: Mapping[str, float | None] = field(default_factory=dict)
    """Part of a parameter's name -> its value at which the policy is the base model, None where the others decide that;
    0 for all others."""

    def __post_init__(self) -> None:
        if (self.saes is None) != (self.count is None):
            raise ValueError("an adapter on features of SAEs has both saes and count; write the other one too")

    @property
    def whole_model(self) -> bool:
        """Whether every weight is trained: the policy is a model, its reference a frozen copy."""
        return self.peft_config is None


def vector(kind: str, sites: list[str]) -> Adapter:
    """One trainable vector a site, added (`shift`) or multiplied (`scale`)."""
    return Adapter(
        check=partial(layers.check_sites, default=sites),
        peft_config=partial(layers.vector_config, kind=kind, default=sites),
        sites=sites,
    )


ADAPTERS = {
    "sparse_coeffs": Adapter(
        check=coefficients.check,
        peft_config=coefficients.peft_config,
        saes=lambda adapter, *_: coefficients.named_saes(adapter),
        count=coefficients.count,
        untouched={"sparse_coeffs_gate": None},
    ),
    "random_dictionary": Adapter(
        check=coefficients.check,
        peft_config=coefficients.peft_config,
        saes=coefficients.drawn_saes,
        count=coefficients.count,
        untouched={"sparse_coeffs_gate": None},
    ),
    "full": Adapter(check=layers.check_precision, peft_config=None),
    "lora": Adapter(check=layers.check_layers, peft_config=layers.lora_config, untouched={"lora_A": None}),
    "ia3": Adapter(check=layers.check_layers, peft_config=layers.ia3_config, untouched={"ia3": 1.0}),
    "bias_only": Adapter(check=layers.check_biases, peft_config=layers.bias_config),
    "steering_vector": vector("shift", ["resid_post.*"]),
    "neuron_basis": vector("scale", ["mlp_hidden.*"]),
}
"""By the name of their option in `conf/adapter`."""


def adapter_of(settings: AdapterConfig) -> Adapter:
    """The entry of the adapter that settings choose.

    Raises:
        ValueError: there is none.
    """
    if settings.kind not in ADAPTERS:
        raise ValueError(
            f"there is no adapter.kind={settings.kind}; there are {', '.join(sorted(ADAPTERS))}"
            " (a new one is an entry in saerl_cli/rl/adapters)"
        )
    return ADAPTERS[settings.kind]


def peft_config(
    settings: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path] | None = None
) -> "PeftConfig | None":
    """Build the PEFT configuration that settings choose; None where every weight is trained.

    Args:
        settings: of the adapter.
        loaded: the model, which is only looked at.
        saes: site -> SAE folder, for an adapter on their features.

    Raises:
        ValueError: a site, layer or bias that the model lacks, or SAEs that do not fit it.
    """
    configure = adapter_of(settings).peft_config
    return None if configure is None else configure(settings, loaded, saes or {})


def count_trained(settings: AdapterConfig, description: Any, features: Mapping[str, int]) -> int:
    """Count the numbers that an adapter trains, on the model without its weights.

    Args:
        settings: of the adapter.
        description: the model's config.
        features: site -> features of its SAE, for an adapter on them.
    """
    import peft

    from saerl_cli.models import Loaded, without_weights

    count = adapter_of(settings).count
    if count is not None:
        return count(settings, features)
    model = without_weights(description)
    chosen = peft_config(settings, Loaded(model, None, "", None, "", 0, Path()))
    if chosen is not None:
        model = peft.get_peft_model(model, chosen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
