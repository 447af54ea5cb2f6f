"""Settings of `saerl train-lm`."""

from dataclasses import dataclass, field

from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig


@dataclass
class TrainLmConfig:
    """Train a small Pythia-architecture language model; its sizes are `model.world.*`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Only `planted`: the shape and training of the new model."""
    data: DataConfig = field(default_factory=DataConfig)
    """`planted` (the embedded language, cached) or `text` (your own; words become the vocabulary)."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
