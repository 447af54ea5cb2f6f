"""How RLHF learns."""

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.pairs import PairsConfig

LOGITS_HELD = 2**22
"""Logits held at once in scoring, about: 16 MiB a copy."""


class AlgoKind(Enum):
    """The algorithm."""

    ppo = "ppo"
    """Actor-critic: a value head is the baseline of every token (Schulman et al. 2017)."""
    grpo = "grpo"
    """The group's mean is the baseline, the KL a k3 penalty in the loss (Shao et al. 2024)."""
    rloo = "rloo"
    """The mean of the others of the group is the baseline, the KL part of the reward (Ahmadian et al. 2024)."""
    sft = "sft"
    """Supervised: the likelihood of documents, or of completions of prompts."""
    dpo = "dpo"
    """From preference pairs, without sampling (Rafailov et al. 2023)."""
    rwr = "rwr"
    """Reward-weighted regression: the KL-optimal policy fitted by likelihood, from completions of the untouched model
    weighted with exp(reward / beta) (Peters and Schaal 2007)."""


class Schedule(Enum):
    """Learning rate over training."""

    linear = "linear"
    constant = "constant"


class Critic(Enum):
    """What computes the value of a state, and how far its gradient reaches."""

    detached = "detached"
    """A linear head on the policy's last hidden state; its gradient stays in the head."""
    shared = "shared"
    """The same head; its gradient reaches the policy's trainable parameters too."""
    separate = "separate"
    """A model of its own: a copy of the base model with a head, all of it trained at `value_lr`."""


PPO, ROLLOUTS = (AlgoKind.ppo,), (AlgoKind.ppo, AlgoKind.grpo, AlgoKind.rloo)
SUPERVISED = (AlgoKind.sft, AlgoKind.dpo, AlgoKind.rwr)
BELONGS: dict[str, tuple[AlgoKind, ...]] = {
    **dict.fromkeys(("gamma", "lam", "cliprange_value", "vf_coef", "value_lr", "whiten_advantages"), PPO),
    **dict.fromkeys(("critic", "critic_warmup", "entropy_coef", "stop_epochs_kl"), PPO),
    **dict.fromkeys(("rollouts", "minibatches", "epochs", "cliprange"), ROLLOUTS),
    **dict.fromkeys(("kl_target", "kl_gain", "missing_eos_penalty", "prefix_cache"), ROLLOUTS),
    **dict.fromkeys(("batch_size", "steps"), SUPERVISED),
    "kl_coef": (*ROLLOUTS, AlgoKind.dpo, AlgoKind.rwr),
    "group": (*ROLLOUTS, AlgoKind.rwr),
    "draws": (AlgoKind.rwr,),
    "scale_rewards": (AlgoKind.grpo,),
    "pairs": (AlgoKind.dpo,),
    "examples": (AlgoKind.sft,),
    "attribute": (AlgoKind.sft,),
}
"""Settings that not every algorithm has, and which have them."""

GROUPS = {AlgoKind.ppo: 1, AlgoKind.grpo: 16, AlgoKind.rloo: 4, AlgoKind.rwr: 32}
"""Completions a prompt where the settings leave it open; 16 because one good answer may take a dozen tries."""


@dataclass
class AlgoConfig:
    """The algorithm and its settings.

    A phase of ppo, grpo and rloo writes `rollouts` completions, then makes epochs x minibatches optimiser steps on
    them; a phase of sft, dpo and rwr is `steps` optimiser steps of `batch_size` sequences or pairs.
    """

    kind: AlgoKind = AlgoKind.ppo
    """ppo, grpo, rloo, sft, dpo or rwr; `algo=NAME` also sets what suits it."""
    phases: int = 60
    """Phases of the run; episodes = phases x rollouts."""
    rollouts: int = 64
    """Completions a phase, over all processes (ppo, grpo, rloo)."""
    group: int | None = None
    """Completions a prompt, a divisor of `rollouts`, or of `draws`: 1 for ppo, 16 for grpo, 4 for rloo, 32 for rwr when
    empty; at least 2 but for ppo (ppo, grpo, rloo, rwr)."""
    draws: int = 8192
    """Completions of the untouched model to learn from, drawn once (rwr)."""
    minibatches: int = 4
    """Optimiser steps an epoch; divides rollouts / processes (ppo, grpo, rloo)."""
    steps: int = 10
    """Optimiser steps a phase (sft, dpo, rwr)."""
    batch_size: int = 32
    """Sequences or pairs an optimiser step, over all processes (sft, dpo, rwr)."""
    micro_batch: int | None = None
    """Sequences a process puts through the model at once in scoring and updates (gradients add up); divides what a
    process has of an optimiser step, which it is when empty."""
    epochs: int = 4
    """Passes over the rollouts of a phase (ppo, grpo, rloo)."""
    stop_epochs_kl: float | None = None
    """No further update in a phase once the KL of the policy that wrote the completions from the one being trained
    exceeds this, nats per token; 0.02 to 0.05 are usual; never when empty (ppo)."""
    max_new_tokens: int = 32
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of sampling and scoring alike; a reported KL is that of the tempered policies."""
    kl_coef: float = 0.05
    """beta, > 0: the weight of log pi - log pi_ref in the reward (ppo, rloo), of k3 in the loss (grpo), or the
    temperature of the implicit reward (dpo) or of the optimal policy (rwr)."""
    kl_target: float | None = None
    """Nats per completion at the end of the run; when given, beta adapts to reach it (ppo, grpo, rloo)."""
    kl_gain: float = 3.0
    """How strongly beta answers a KL that is off its target; rule: `rl/trainers/kl_control.py` (ppo, grpo, rloo)."""
    gamma: float = 1.0
    """Discount (ppo)."""
    lam: float = 0.95
    """GAE's lambda (ppo)."""
    cliprange: float = 0.2
    """Clip of the probability ratio, of a token (ppo, grpo) or a completion (rloo)."""
    cliprange_value: float = 0.2
    """Clip of the value's change (ppo)."""
    vf_coef: float = 0.1
    """Weight of the value loss (ppo)."""
    value_lr: float = 1e-3
    """Learning rate of the value head, or of the separate value model (ppo)."""
    critic: Critic = Critic.detached
    """detached, shared or separate (ppo)."""
    critic_warmup: int = 0
    """First phases in which only the critic learns (ppo)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss, >= 0 (ppo)."""
    max_grad_norm: float = 1.0
    """Of the policy's and, separately, of the critic's gradient."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over all processes and kept tokens (ppo)."""
    scale_rewards: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (grpo)."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a completion that ends with none of the model's end tokens (ppo, grpo, rloo)."""
    schedule: Schedule = Schedule.linear
    """Learning rates: linear to 0, or constant."""
    warmup: float = 0.0
    """Share of the optimiser steps over which the learning rates first rise from 0, in [0, 1)."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """The preference pairs (dpo)."""
    examples: str | None = None
    """File whose rows hold a prompt and its completion: jsonl, json or parquet; the documents of `data`, packed, when
    empty (sft)."""
    attribute: str | None = None
    """Only documents of the planted language that carry this attribute, for instance arithmetic (sft)."""
    prefix_cache: bool = True
    """Compute what training cannot change (all below the lowest trained parameter) once a rollout instead of in every
    pass, with equal results (ppo, grpo, rloo); takes about rollouts x length x 3 x width numbers of memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        self.refuse_foreign_settings()
        for name in ("phases", "rollouts", "minibatches", "epochs", "max_new_tokens", "steps", "batch_size", "draws"):
            refuse_unless(getattr(self, name) >= 1, f"algo.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "kl_coef", "kl_gain", "value_lr", "max_grad_norm", "cliprange"):
            refuse_unless(getattr(self, name) > 0, f"algo.{name} must be > 0, got {getattr(self, name)}")
        refuse_unless(
            self.stop_epochs_kl is None or self.stop_epochs_kl > 0,
            f"algo.stop_epochs_kl must be > 0, got {self.stop_epochs_kl}; leave it out for none",
        )
        for name in ("gamma", "lam"):
            refuse_unless(0 <= getattr(self, name) <= 1, f"algo.{name} must be in [0, 1], got {getattr(self, name)}")
        refuse_unless(self.entropy_coef >= 0, f"algo.entropy_coef must be >= 0, got {self.entropy_coef}")
        refuse_unless(0 <= self.warmup < 1, f"algo.warmup must be in [0, 1), got {self.warmup}")
        refuse_unless(self.micro_batch is None or self.micro_batch >= 1, "algo.micro_batch must be >= 1")
        refuse_unless(
            self.kl_target is None or self.kl_target > 0, f"algo.kl_target must be > 0 nats, got {self.kl_target}"
        )
        refuse_unless(
            0 <= self.critic_warmup < self.phases,
            f"algo.critic_warmup={self.critic_warmup} leaves none of algo.phases={self.phases} for the policy",
        )
        refuse_unless(
            self.examples is None or self.attribute is None,
            "algo.attribute chooses documents, algo.examples replaces them; write one of them",
        )
        if self.samples:
            self.refuse_uneven_phases()
        if self.kind is AlgoKind.rwr:
            refuse_unless(
                self.group_size >= 2 and self.draws % self.group_size == 0,
                f"algo.group={self.group_size} must be at least 2 and divide algo.draws={self.draws}",
            )

    @property
    def samples(self) -> bool:
        """Whether the policy writes completions to learn from."""
        return self.kind in ROLLOUTS

    @property
    def group_size(self) -> int:
        """Completions a prompt."""
        return GROUPS.get(self.kind, 1) if self.group is None else self.group

    @property
    def prompts_per_phase(self) -> int:
        """Prompts a phase; 0 for algorithms that write no completions."""
        return self.rollouts // self.group_size if self.samples else 0

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps a phase."""
        return self.epochs * self.minibatches if self.samples else self.steps

    def refuse_foreign_settings(self) -> None:
        """Refuse a setting that this algorithm does not have, wherever it is not what it would be anyway."""
        for setting in fields(self):
            name, kinds = setting.name, BELONGS.get(setting.name, tuple(AlgoKind))
            if self.kind not in kinds:
                refuse_unless(
                    getattr(self, name) == default_of(setting),
                    f"algo.{name} belongs to {' and '.join(f'algo={kind.value}' for kind in kinds)}, not to"
                    f" algo={self.kind.value}; leave it out",
                )

    def refuse_uneven_phases(self) -> None:
        """Refuse rollouts that do not divide into minibatches and groups."""
        smallest = 1 if self.kind is AlgoKind.ppo else 2
        legal = [str(n) for n in range(smallest, self.rollouts + 1) if self.rollouts % n == 0]
        refuse_unless(
            str(self.group_size) in legal,
            f"algo.group={self.group_size} must divide algo.rollouts={self.rollouts} for algo={self.kind.value}; write"
            f" one of {', '.join(legal) or 'more rollouts'}",
        )
        refuse_unless(
            self.rollouts % self.minibatches == 0,
            f"algo.minibatches={self.minibatches} must divide algo.rollouts={self.rollouts}",
        )


def default_of(setting: Any) -> Any:
    """The default of a dataclass field."""
    return setting.default_factory() if callable(setting.default_factory) else setting.default
