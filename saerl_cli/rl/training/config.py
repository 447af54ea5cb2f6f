"""Settings of the trainers: those of TRL's, divided into phases."""

from abc import abstractmethod
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig


@dataclass
class PhaseConfig:
    """Mixed in before a config of TRL: defaults that every algorithm here shares."""

    adam_epsilon: float = field(default=1e-5, metadata={"help": "Of AdamW."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Trade time for memory."})
    bf16: bool | None = field(default=False, metadata={"help": "Autocast in bfloat16."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "NaN stops the run instead."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "No outside trackers."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    @property
    @abstractmethod
    def steps_per_phase(self) -> int:
        """Optimiser steps of a phase."""

    def divide_into_phases(self: Any) -> None:
        """Log once a phase; refuse checkpoints and an end inside one."""
        self.logging_steps = self.steps_per_phase
        if self.save_strategy == "steps" and self.save_steps % self.steps_per_phase:
            raise ValueError(
                f"save_steps must be a multiple of {self.steps_per_phase}, the optimiser steps of a phase: rollouts are"
                " not saved, so only a checkpoint between two phases resumes exactly"
            )
        if self.max_steps > 0 and self.max_steps % self.steps_per_phase:
            raise ValueError(f"max_steps must be a multiple of {self.steps_per_phase}, the optimiser steps of a phase")


UNUSED = (
    "use_vllm", "use_transformers_continuous_batching", "mask_truncated_completions", "loss_type", "delta",
    "importance_sampling_level", "multi_objective_aggregation", "top_entropy_quantile", "use_adaptive_entropy",
    "off_policy_mask_threshold", "use_bias_correction_kl", "sync_ref_model", "epsilon_high", "shuffle_dataset",
    "log_completions", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
)  # fmt: skip
"""Settings of TRL's GRPOTrainer that have no effect here: anything but their default is refused."""


@dataclass
class PPOConfig(PhaseConfig, GRPOConfig):
    """GRPOConfig for `PPOTrainer`. `beta` is the KL coefficient, `epsilon` the clip range of the ratio.

    `learning_rate` belongs to the policy's parameters, `value_learning_rate` to the critic's; `max_grad_norm` holds for
    each of the two.
    """

    algorithm: str = field(default="ppo", metadata={"help": "ppo, grpo or rloo: what advantages are made of."})
    num_generations: Any = field(default=1, metadata={"help": "Completions a prompt; grpo and rloo need at least 2."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs: passes over the completions of a phase."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of the policy; 1e-2 suits SAE coefficients."})
    beta: float = field(default=0.05, metadata={"help": "KL coefficient, > 0: in the reward, of grpo in the loss."})
    kl_target: float | None = field(default=None, metadata={"help": "Nats per completion; beta adapts to reach it."})
    kl_gain: float = field(default=3.0, metadata={"help": "How strongly beta answers."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Subtracted where no end token came."})
    prefix_cache: bool = field(default=True, metadata={"help": "Compute what is frozen once a rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Sampling and scoring must be one distribution."})
    scale_rewards: str = field(default="none", metadata={"help": "group: divide by the group's std (grpo)."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus, >= 0."})
    gamma: float = field(default=1.0, metadata={"help": "Discount (ppo)."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda (ppo)."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over all processes and kept tokens (ppo)."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss (ppo)."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value's change (ppo)."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the critic (ppo)."})
    critic: str = field(default="detached", metadata={"help": "detached, shared or separate (ppo)."})
    critic_warmup: int = field(default=0, metadata={"help": "First phases in which only the critic learns (ppo)."})
    stop_epochs_kl: float | None = field(default=None, metadata={"help": "Nats per token that end a phase's updates."})

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch and process."""
        return self.steps_per_generation or 1

    @property
    def steps_per_phase(self) -> int:
        """Epochs x minibatches."""
        return self.micro_batches * self.num_iterations // self.gradient_accumulation_steps

    def __post_init__(self):
        if self.algorithm not in ("ppo", "grpo", "rloo"):
            raise ValueError(f"algorithm must be ppo, grpo or rloo, got {self.algorithm}")
        alone = self.num_generations == 1 and self.algorithm == "ppo"
        if alone:  # GRPOConfig refuses 1: lend it a divisor of the generation batch while it validates
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps
            self.num_generations_eval = 1
            if self.num_generations < 2:
                raise ValueError("a phase needs at least two completions a process")
        super().__post_init__()
        if alone:
            self.num_generations = 1
        self.refuse_unused()
        assert self.steps_per_generation is not None  # the base class has derived it
        refusals = {
            "beta must be > 0: without it there is no reference": self.beta <= 0,
            "scale_rewards must be none or group": self.scale_rewards not in ("none", "group"),
            "disable_dropout must be true: sampling and scoring must be one distribution": not self.disable_dropout,
            "steps_per_generation must be a multiple of gradient_accumulation_steps": (
                self.steps_per_generation % self.gradient_accumulation_steps != 0
            ),
            "stop_epochs_kl with fp16: its scaler cannot pass over an optimiser step": (
                self.stop_epochs_kl is not None and bool(self.fp16)
            ),
        }
        for message, holds in refusals.items():
            if holds:
                raise ValueError(message)
        self.divide_into_phases()

    def refuse_unused(self) -> None:
        """Refuse what TRL's GRPOTrainer would do and `PPOTrainer` does not.

        Raises:
            ValueError: a setting of `UNUSED` is not at its default.
        """
        for setting in fields(self):
            default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
            if setting.name in UNUSED and getattr(self, setting.name) != default:
                raise ValueError(f"{setting.name} has no effect in PPOTrainer; leave it at {default!r}")


@dataclass
class SupervisedConfig(PhaseConfig):
    """Of SFT, DPO and RWR."""

    phase_steps: int = field(default=10, metadata={"help": "Optimiser steps of a phase."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rows are tokens already."})

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps of a phase."""
        return self.phase_steps

    def __post_init__(self: Any) -> None:
        cast(Any, super()).__post_init__()
        self.divide_into_phases()


@dataclass
class SFTConfig(SupervisedConfig, TRLSFTConfig):
    """TRL's SFTConfig in phases."""


@dataclass
class DPOConfig(SupervisedConfig, TRLDPOConfig):
    """TRL's DPOConfig in phases."""


@dataclass
class RWRConfig(SFTConfig):
    """SFTConfig for weighted completions."""

    temperature: float = field(default=1.0, metadata={"help": "Of the policies, in scoring as in sampling."})
    longest: int = field(default=1, metadata={"help": "Tokens of the longest completion; divides the loss."})
