"""Settings of `saerl audit`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from saerl_cli.config.adapter import FeatureChoice
from saerl_cli.config.groups import LaunchConfig, refuse_unless
from saerl_cli.config.rlhf import EvaluationConfig
from saerl_cli.config.settings import check_settings, setting


@dataclass
class AuditConfig:
    """Which features caused the reward of a finished coefficient run: reverting, keeping only, controls."""

    policy: str = MISSING
    """Run directory of `saerl rlhf --sparse-coeffs`, or of adapter=random_dictionary."""
    peers: list[str] = field(default_factory=list)
    """Runs on the same SAEs, for instance of other seeds, whose coefficients are compared with the policy's."""
    top: int = setting(20, ">= 1")
    """Features reverted one by one: the first of the ranking by attribution."""
    features: FeatureChoice = field(default_factory=FeatureChoice)
    """Further features to revert, for instance features.ids=[mlp_out.1:7]."""
    pairs: int = setting(6, ">= 0")
    """Pairs of the first features that are reverted, and kept alone, together; 0 leaves interactions out."""
    alphas: int = setting(8, ">= 1")
    """Points between the reference (0) and the policy (1) at which the gradient of the reward is taken."""
    draws: int = setting(3, ">= 2")
    """Random draws of each control."""
    prefix_rewards: bool | None = None
    """Score also the beginnings of completions, so that a token answers only for what it and later ones earn: less
    noise, one scoring a token. When empty, unless a part of the reward is a model (hf) or your own function."""
    f1: float = setting(0.5, "in [0, 1]")
    """Smallest F1 with which a feature counts as one of an attribute of the planted language."""
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(samples=160, batch_size=160, heldout_tokens=6_000)
    )
    """How it is measured: `samples` prompts rank the features, as many others measure them (the same ones again, with
    other random numbers, where there are too few). A variant of the policy takes one completion a prompt; there are
    about 120 variants."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    seed: int = 2
    """Seed of prompts, samples and random controls."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_unless(
            self.launch.shards == 1, "audit works on whole models; write launch.sharding=none, for instance launch=gpu"
        )
        refuse_unless(
            self.evaluation.samples >= 8, f"evaluation.samples must be >= 8 for an audit, got {self.evaluation.samples}"
        )
