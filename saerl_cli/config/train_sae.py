"""Settings of `saerl train-sae`."""

from dataclasses import dataclass, field
from typing import Any

from saerl_cli.config.activations import ActivationsConfig
from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig, SiteConfig, refuse_unless
from saerl_cli.config.sae import SaeConfig
from saerl_cli.config.settings import check_settings, setting


@dataclass
class TrainSaeConfig:
    """Train SAEs at one or more sites from one stream of activations, and evaluate each on held-out text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text it reads."""
    site: SiteConfig = field(default_factory=SiteConfig)
    """Where activations are taken."""
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    """How they are shuffled and kept."""
    sae: SaeConfig = field(default_factory=SaeConfig)
    """The autoencoder."""
    sweep: list[Any] = field(default_factory=list)
    """Several SAEs a site in one pass: each entry changes settings of `sae`, a list of values gives one SAE each, for
    instance sweep=[{k:[8,16,32]},{sae:relu,l1:[2,5]}]; `sae` names a preset to begin with."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    eval_tokens: int = setting(50_000, ">= 1")
    """Held-out tokens for the metrics, at most what there is."""
    log_every: int = setting(20, ">= 1")
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = setting(200, ">= 1")
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the order of text and activations."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_unless(
            not (self.activations.prefetch and self.launch.shards > 1),
            "activations.prefetch computes in a thread of its own, where the processes of a split model cannot meet;"
            " write activations.prefetch=false",
        )
