"""How RLHF learns."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import refuse_unless


class Schedule(Enum):
    """Learning rate over training."""

    linear = "linear"
    constant = "constant"


@dataclass
class AlgoConfig:
    """PPO. A phase generates `rollouts` completions, then makes epochs x minibatches optimiser steps on them."""

    phases: int = 60
    """Phases of the run; episodes = phases x rollouts."""
    rollouts: int = 64
    """Completions a phase, over all processes."""
    minibatches: int = 4
    """Optimiser steps an epoch; divides rollouts / processes."""
    micro_batch: int | None = None
    """Completions a process puts through the model at once in scoring and updates (gradients add up); divides
    rollouts / processes / minibatches, which it is when empty."""
    epochs: int = 4
    """Passes over the rollouts of a phase."""
    max_new_tokens: int = 32
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of sampling and scoring alike; a reported KL is that of the tempered policies."""
    kl_coef: float = 0.05
    """beta: the weight of log pi - log pi_ref in the per-token reward, > 0."""
    kl_target: float | None = None
    """Nats per completion; when given, beta adapts to reach it (Ziegler et al. 2019)."""
    kl_horizon: float = 10_000.0
    """Episodes over which beta adapts."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    cliprange: float = 0.2
    """Clip of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip of the value's change."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    value_lr: float = 1e-3
    """Learning rate of the value head."""
    max_grad_norm: float = 1.0
    """Of the policy's and, separately, of the value head's gradient."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over all processes and kept tokens."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a completion that does not end."""
    critic_warmup: int = 0
    """First phases in which only the value head learns."""
    schedule: Schedule = Schedule.linear
    """Learning rates: linear to 0, or constant."""

    def __post_init__(self) -> None:
        for name in ("phases", "rollouts", "minibatches", "epochs", "max_new_tokens"):
            refuse_unless(getattr(self, name) >= 1, f"algo.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "kl_coef", "kl_horizon", "value_lr", "max_grad_norm", "cliprange"):
            refuse_unless(getattr(self, name) > 0, f"algo.{name} must be > 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            refuse_unless(0 <= getattr(self, name) <= 1, f"algo.{name} must be in [0, 1], got {getattr(self, name)}")
        refuse_unless(
            self.rollouts % self.minibatches == 0,
            f"algo.minibatches={self.minibatches} must divide algo.rollouts={self.rollouts}",
        )
        refuse_unless(self.micro_batch is None or self.micro_batch >= 1, "algo.micro_batch must be >= 1")
        refuse_unless(self.kl_target is None or self.kl_target > 0, "algo.kl_target must be > 0 nats")
        refuse_unless(
            0 <= self.critic_warmup < self.phases,
            f"algo.critic_warmup={self.critic_warmup} leaves none of algo.phases={self.phases} for the policy",
        )
