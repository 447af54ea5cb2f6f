"""How RLHF learns."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.pairs import PairsConfig
from saerl_cli.config.settings import check_settings, filled, setting

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


ROLLOUTS = (AlgoKind.ppo, AlgoKind.grpo, AlgoKind.rloo)
SUPERVISED = (AlgoKind.sft, AlgoKind.dpo, AlgoKind.rwr)
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
    phases: int = setting(60, ">= 1")
    """Phases of the run; episodes = phases x rollouts."""
    rollouts: int = setting(64, ">= 1", kind=ROLLOUTS)
    """Completions a phase, over all processes."""
    group: int | None = setting(None, ">= 1", kind=GROUPS)
    """Completions a prompt, a divisor of `rollouts`, or of `draws`: 1 for ppo, 16 for grpo, 4 for rloo, 32 for rwr when
    empty; at least 2 but for ppo."""
    draws: int = setting(8192, ">= 1", kind=AlgoKind.rwr)
    """Completions of the untouched model to learn from, drawn once."""
    minibatches: int = setting(4, ">= 1", kind=ROLLOUTS)
    """Optimiser steps an epoch; divides rollouts / processes."""
    steps: int = setting(10, ">= 1", kind=SUPERVISED)
    """Optimiser steps a phase."""
    batch_size: int = setting(32, ">= 1", kind=SUPERVISED)
    """Sequences or pairs an optimiser step, over all processes."""
    micro_batch: int | None = setting(None, ">= 1")
    """Sequences a process puts through the model at once in scoring and updates (gradients add up); divides what a
    process has of an optimiser step, which it is when empty."""
    epochs: int = setting(4, ">= 1", kind=ROLLOUTS)
    """Passes over the rollouts of a phase."""
    stop_epochs_kl: float | None = setting(None, "> 0", kind=AlgoKind.ppo)
    """No further update in a phase once the KL of the policy that wrote the completions from the one being trained
    exceeds this, nats per token; 0.02 to 0.05 are usual; never when empty."""
    max_new_tokens: int = setting(32, ">= 1")
    """Longest completion in tokens."""
    temperature: float = setting(1.0, "> 0")
    """Of sampling and scoring alike; a reported KL is that of the tempered policies."""
    kl_coef: float = setting(0.05, "> 0", kind=(*ROLLOUTS, AlgoKind.dpo, AlgoKind.rwr))
    """beta: the weight of log pi - log pi_ref in the reward (ppo, rloo), of k3 in the loss (grpo), or the temperature
    of the implicit reward (dpo) or of the optimal policy (rwr)."""
    kl_target: float | None = setting(None, "> 0", kind=ROLLOUTS)
    """Nats per completion at the end of the run; when given, beta adapts to reach it."""
    kl_gain: float = setting(3.0, "> 0", kl_target=True)
    """How strongly beta answers a KL that is off its target; rule: `rl/trainers/kl_control.py`."""
    gamma: float = setting(1.0, "in [0, 1]", kind=AlgoKind.ppo)
    """Discount."""
    lam: float = setting(0.95, "in [0, 1]", kind=AlgoKind.ppo)
    """GAE's lambda."""
    cliprange: float = setting(0.2, "> 0", kind=ROLLOUTS)
    """Clip of the probability ratio, of a token (ppo, grpo) or a completion (rloo)."""
    cliprange_value: float = setting(0.2, kind=AlgoKind.ppo)
    """Clip of the value's change."""
    vf_coef: float = setting(0.1, kind=AlgoKind.ppo)
    """Weight of the value loss."""
    value_lr: float = setting(1e-3, "> 0", kind=AlgoKind.ppo)
    """Learning rate of the value head, or of the separate value model."""
    critic: Critic = setting(Critic.detached, kind=AlgoKind.ppo)
    """detached, shared or separate."""
    critic_warmup: int = setting(0, ">= 0", kind=AlgoKind.ppo)
    """First phases in which only the critic learns."""
    entropy_coef: float = setting(0.0, ">= 0", kind=AlgoKind.ppo)
    """Weight of the entropy bonus in the loss."""
    max_grad_norm: float = setting(1.0, "> 0")
    """Of the policy's and, separately, of the critic's gradient."""
    whiten_advantages: bool = setting(True, kind=AlgoKind.ppo)
    """Mean 0 and variance 1 over all processes and kept tokens."""
    scale_rewards: bool = setting(True, kind=AlgoKind.grpo)
    """Divide a group's advantages by the standard deviation of its rewards."""
    missing_eos_penalty: float | None = setting(None, kind=ROLLOUTS)
    """Subtracted from the score of a completion that ends with none of the model's end tokens."""
    schedule: Schedule = Schedule.linear
    """Learning rates: linear to 0, or constant."""
    warmup: float = setting(0.0, "in [0, 1)")
    """Share of the optimiser steps over which the learning rates first rise from 0."""
    pairs: PairsConfig = setting(PairsConfig, kind=AlgoKind.dpo)
    """The preference pairs."""
    examples: str | None = setting(None, kind=AlgoKind.sft)
    """File whose rows hold a prompt and its completion: jsonl, json or parquet; the documents of `data`, packed, when
    empty."""
    attribute: str | None = setting(None, kind=AlgoKind.sft)
    """Only documents of the planted language that carry this attribute, for instance arithmetic."""
    prefix_cache: bool = setting(True, kind=ROLLOUTS)
    """Compute what training cannot change (all below the lowest trained parameter) once a rollout instead of in every
    pass, with equal results; takes about rollouts x length x 3 x width numbers of memory."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        check_settings(self, "algo")
        refuse_unless(
            self.critic_warmup < self.phases,
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
        return filled(self, "group") or 1

    @property
    def prompts_per_phase(self) -> int:
        """Prompts a phase; 0 for algorithms that write no completions."""
        return self.rollouts // self.group_size if self.samples else 0

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps a phase."""
        return self.epochs * self.minibatches if self.samples else self.steps

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
