"""Settings of `saerl evaluate`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.config.rlhf import EvaluationConfig


@dataclass
class EvaluateConfig:
    """Reward, KL and held-out loss of a finished policy, on prompts and samples of its own."""

    policy: str = MISSING
    """Run directory of `saerl rlhf`."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it is measured."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    seed: int = 1
    """Seed of the fresh prompts and samples."""
