"""Settings of `saerl train-sae`."""

from dataclasses import dataclass, field

from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig, SaeConfig, SiteConfig, refuse_unless


@dataclass
class TrainSaeConfig:
    """Train one SAE per site from one stream of activations, and evaluate each on held-out text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text it reads."""
    site: SiteConfig = field(default_factory=SiteConfig)
    """Where activations are taken."""
    sae: SaeConfig = field(default_factory=SaeConfig)
    """The autoencoder."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    eval_tokens: int = 50_000
    """Held-out tokens for the metrics, at most what there is."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of the order of text and activations."""

    def __post_init__(self) -> None:
        for name in ("eval_tokens", "log_every", "checkpoint_every"):
            refuse_unless(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
