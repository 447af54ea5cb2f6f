"""Settings of `saerl evaluate`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from saerl_cli.config.groups import LaunchConfig, refuse_unless
from saerl_cli.config.rlhf import EvaluationConfig
from saerl_cli.config.settings import check_settings, setting

BASE_SAMPLES = 64
"""Completions of the reference per prompt where the frontier is asked for: enough for its limit at about 2 nats."""


@dataclass
class EvaluateConfig:
    """Reward, KL and held-out loss of a finished policy, on prompts and samples of its own; its reward-KL frontier."""

    policy: str = MISSING
    """Run directory of `saerl rlhf`."""
    snapshots: bool = False
    """Measure also the policies that the run kept along the way, on the same prompts with the same random numbers, and
    draw reward against KL beside its limits."""
    factors: list[float] = field(default_factory=list)
    """Measure also what the policy becomes when all that it learned is multiplied by these factors, for instance
    [0.2,0.4,0.6,0.8]: a frontier from one run without snapshots, and a better one than its early policies make."""
    base_samples: int | None = setting(None, base=False)
    """Completions of the reference for each prompt, from which the KL-optimal policy and best-of-n are estimated: with
    K of them reliably to a KL of about log K - 2; 0 leaves the limits out. When empty 64 with `snapshots` or `factors`,
    else 0."""
    base: str | None = None
    """Take the rewards of these completions from another run of `saerl evaluate`, of the same model, reward, prompts,
    sampling and seed, instead of drawing them again."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it is measured."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    seed: int = 1
    """Seed of the fresh prompts and samples."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_unless(
            all(factor > 0 for factor in self.factors),
            f"factors must be > 0, for instance [0.25,0.5], got {self.factors}",
        )
        refuse_unless(
            self.base_samples is None or self.base_samples == 0 or self.base_samples >= 2,
            f"base_samples must be 0 or >= 2, got {self.base_samples}",
        )

    @property
    def samples_a_prompt(self) -> int:
        """`base_samples`, or what stands for it when empty."""
        frontier = self.snapshots or bool(self.factors)
        return BASE_SAMPLES * frontier if self.base_samples is None else self.base_samples
