"""Settings of `saerl train-lm`."""

from dataclasses import dataclass, field

from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig
from saerl_cli.config.settings import check_settings, setting


@dataclass
class TrainLmConfig:
    """Train a small Pythia-architecture language model; its sizes are `model.planted.*`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Only `planted`: the shape and training of the new model."""
    data: DataConfig = field(default_factory=DataConfig)
    """`planted` (the planted language, cached) or `text` (your own; words become the vocabulary)."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    log_every: int = setting(50, ">= 1")
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = setting(200, ">= 1")
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        check_settings(self)
