"""Settings of the PPO trainer."""

from dataclasses import dataclass, field

from trl.trainer.grpo_config import GRPOConfig

from saerl_cli.rl.trainers.phases import RolloutSettings


@dataclass
class PPOConfig(RolloutSettings, GRPOConfig):
    """GRPOConfig with PPO's settings. `beta` is the KL coefficient in the reward, `epsilon` the clip range.

    `learning_rate` belongs to the policy's parameters, `value_learning_rate` to the value head; `max_grad_norm` holds
    for each of the two.
    """

    num_generations: int = field(default=1, metadata={"help": "Completions a prompt; the critic replaces the group."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: passes over the completions of a phase."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of the policy; 1e-2 suits SAE coefficients."})
    beta: float = field(default=0.05, metadata={"help": "KL coefficient in the per-token reward, > 0."})
    loss_type: str = field(default="dapo", metadata={"help": "Token mean over the phase, the same for every split."})
    scale_rewards: str = field(default="none", metadata={"help": "Unused: a critic is the baseline."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value's change."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the value head."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Over all processes and kept tokens."})
    critic: str = field(default="detached", metadata={"help": "detached, shared or separate: `trainers.value`."})
    critic_warmup: int = field(default=0, metadata={"help": "First phases in which only the critic learns."})
    stop_epochs_kl: float | None = field(default=None, metadata={"help": "Nats per token that end a phase's updates."})

    def __post_init__(self):
        alone = self.num_generations == 1
        if alone:  # GRPOConfig refuses 1: lend it a divisor of the generation batch while it validates
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps
            self.num_generations_eval = 1
            if self.num_generations < 2:
                raise ValueError("a phase needs at least two completions a process")
        super().__post_init__()
        if alone:
            self.num_generations = 1
        assert self.steps_per_generation is not None  # the base class has derived it
        refusals = {
            "beta must be > 0: it is the KL coefficient of the reward": self.beta <= 0,
            "use_vllm: its weight sync merges the adapter, and a splice cannot be merged": self.use_vllm,
            "use_transformers_continuous_batching with bf16 casts the whole model, coefficients included": (
                self.use_transformers_continuous_batching and bool(self.bf16)
            ),
            "mask_truncated_completions hides exactly the completions missing_eos_penalty is for": (
                self.mask_truncated_completions and self.missing_eos_penalty is not None
            ),
            "loss_type must be dapo: the value loss is normalised like it": self.loss_type != "dapo",
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
