"""Settings of TRL's trainers, divided into phases: what one is, and where a checkpoint may lie."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.sft_config import SFTConfig


@dataclass
class PhaseSettings:
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


@dataclass
class RolloutSettings(PhaseSettings):
    """Of trainers that write completions: what their score becomes, and how the KL is held."""

    disable_dropout: bool = field(default=True, metadata={"help": "Sampling and scoring must be one distribution."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Subtracted where no end token came."})
    kl_target: float | None = field(default=None, metadata={"help": "Nats per completion; beta adapts to reach it."})
    kl_gain: float = field(default=3.0, metadata={"help": "How strongly beta answers."})
    prefix_cache: bool = field(default=True, metadata={"help": "Compute what is frozen once a rollout."})

    @property
    def steps_per_phase(self: Any) -> int:
        """Epochs x minibatches."""
        return self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps


@dataclass
class GroupSettings(RolloutSettings):
    """Of GRPO and RLOO."""

    def __post_init__(self: Any) -> None:
        if self.beta <= 0:
            raise ValueError("beta must be > 0: without it there is no reference")
        cast(Any, super()).__post_init__()
        self.divide_into_phases()


@dataclass
class GRPOPhases(GroupSettings, GRPOConfig):
    """GRPOConfig in phases. `beta` weighs the KL (k3) in the loss."""

    beta: float = field(default=0.05, metadata={"help": "Weight of the KL in the loss, > 0."})


@dataclass
class RLOOPhases(GroupSettings, RLOOConfig):
    """RLOOConfig in phases. `beta` weighs the KL (k1) in the reward."""


@dataclass
class SupervisedSettings(PhaseSettings):
    """Of SFT and DPO."""

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
class SFTPhases(SupervisedSettings, SFTConfig):
    """SFTConfig in phases."""


@dataclass
class DPOPhases(SupervisedSettings, DPOConfig):
    """DPOConfig in phases."""


@dataclass
class RWRPhases(SFTPhases):
    """SFTPhases for weighted completions."""

    temperature: float = field(default=1.0, metadata={"help": "Of the policies, in scoring as in sampling."})
    longest: int = field(default=1, metadata={"help": "Tokens of the longest completion; divides the loss."})
