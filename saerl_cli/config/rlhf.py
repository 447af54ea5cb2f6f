"""Settings of `saerl rlhf`."""

from dataclasses import dataclass, field

from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.algo import AlgoConfig
from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig, refuse_unless
from saerl_cli.config.reward import RewardConfig


@dataclass
class PromptConfig:
    """Prompts: the beginnings of documents; training prompts from the training part, evaluation from the held-out."""

    tokens: int = 6
    """Length in tokens (a BOS token, where the tokenizer adds one, comes on top), >= 1."""
    count: int | None = None
    """Distinct training prompts, at most; all documents when empty."""

    def __post_init__(self) -> None:
        refuse_unless(self.tokens >= 1, f"prompts.tokens must be >= 1, got {self.tokens}")


@dataclass
class EvaluationConfig:
    """Fresh samples from policy and reference on held-out prompts."""

    samples: int = 256
    """Completions from which reward, KL and their standard errors are estimated."""
    batch_size: int = 64
    """Completions generated at once."""
    every: int = 10
    """Phases between two entries of samples.jsonl (a few completions); 0 keeps only the first and the last."""
    heldout_tokens: int = 20_000
    """Held-out tokens for the language-modelling loss, at most what there is."""

    def __post_init__(self) -> None:
        refuse_unless(self.samples >= 2 and self.batch_size >= 1, "evaluation.samples must be >= 2, batch_size >= 1")
        refuse_unless(self.every >= 0 and self.heldout_tokens >= 1, "evaluation.every must be >= 0")


@dataclass
class RlhfConfig:
    """RLHF by PPO; `--sparse-coeffs` restricts it to SAE feature coefficients."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Documents whose beginnings are the prompts."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """How prompts are cut."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What may change."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is asked for."""
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    """How it learns."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it is measured."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    checkpoint_every: int = 10
    """Phases between two checkpoints."""
    seed: int = 0
    """Seed of prompts, sampling and initialisation."""

    def __post_init__(self) -> None:
        refuse_unless(len(self.reward.parts) > 0, "reward.parts is empty; choose one, for instance reward=cursing")
        refuse_unless(self.checkpoint_every >= 1, f"checkpoint_every must be >= 1, got {self.checkpoint_every}")
        per_process = self.launch.num_processes * self.algo.minibatches
        refuse_unless(
            self.algo.rollouts % per_process == 0,
            f"algo.rollouts={self.algo.rollouts} must be a multiple of launch.num_processes x algo.minibatches"
            f" = {per_process}",
        )
        minibatch = self.algo.rollouts // per_process
        refuse_unless(
            self.algo.rollouts >= 2 * self.launch.num_processes,
            f"algo.rollouts={self.algo.rollouts} leaves fewer than two completions a process; raise it",
        )
        refuse_unless(
            minibatch % (self.algo.micro_batch or minibatch) == 0,
            f"algo.micro_batch={self.algo.micro_batch} must divide the {minibatch} completions that a process has of a"
            " minibatch",
        )
