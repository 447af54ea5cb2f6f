"""Settings of `saerl demo`."""

from dataclasses import dataclass, field
from enum import Enum


class Scale(Enum):
    """Size of the demonstration."""

    full = "full"
    small = "small"
    """Seconds instead of minutes, for tests: the numbers mean nothing."""


@dataclass
class DemoConfig:
    """The main job on the planted model: language model, SAEs, coefficient-only PPO beside an unconstrained run."""

    scale: Scale = Scale.full
    """`small` only checks that the pipeline runs."""
    seed: int = 0
    """Seed of every stage."""
    overrides: dict[str, list[str]] = field(default_factory=dict)
    """Further words for a stage: train_lm, train_sae, sparse_coeffs, full, evaluate."""
