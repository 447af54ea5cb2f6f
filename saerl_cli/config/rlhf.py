"""Settings of `saerl rlhf`."""

from dataclasses import dataclass, field
from enum import Enum

from saerl_cli.config.adapter import AdapterConfig, Splice
from saerl_cli.config.algo import AlgoConfig, AlgoKind, Critic
from saerl_cli.config.groups import DataConfig, LaunchConfig, ModelConfig, Precision, refuse_unless
from saerl_cli.config.reward import Normalise, RewardConfig
from saerl_cli.config.settings import check_settings, setting


class PromptKind(Enum):
    """Where prompts come from."""

    documents = "documents"
    """The beginnings of documents."""
    arithmetic = "arithmetic"
    """Reviews of the planted language up to a sum's result, with the right answer."""
    file = "file"
    """Rows of a file, with answers where it has them."""


@dataclass
class PromptConfig:
    """Prompts: training prompts from the training part, evaluation from the held-out."""

    kind: PromptKind = PromptKind.documents
    """`documents` cuts the beginnings of `data`; `arithmetic` asks for sums of the planted language; `file` reads
    `path`."""
    tokens: int = setting(6, ">= 1", kind=PromptKind.documents)
    """Length in tokens (a BOS token, where the tokenizer adds one, comes on top)."""
    count: int | None = setting(None, ">= 1")
    """Distinct training prompts, at most; all when empty."""
    path: str | None = setting(None, write="FILE", kind=PromptKind.file)
    """A jsonl, json or parquet file, or a glob; JSON also as .gz or .zst."""
    field: str | None = setting(None, kind=PromptKind.file)
    """Column of the prompt; when empty, prompt, question or text, whichever there is."""
    answer_field: str = setting("answer", kind=PromptKind.file)
    """Column of the right answer, which need not be there."""
    template: str = setting("{prompt}", kind=PromptKind.file)
    """Text around a prompt, for instance "Question: {prompt} Answer:"."""
    heldout: float = setting(0.1, "in (0, 0.5]", kind=PromptKind.file)
    """Share of the rows, from the end, that training never sees."""

    def __post_init__(self) -> None:
        check_settings(self, "prompts")
        refuse_unless("{prompt}" in self.template, "prompts.template must hold {prompt}")


@dataclass
class EvaluationConfig:
    """Fresh samples from policy and reference on held-out prompts."""

    samples: int = setting(256, ">= 2")
    """Completions from which reward, KL and their standard errors are estimated."""
    batch_size: int = setting(64, ">= 1")
    """Completions generated at once."""
    every: int = setting(10, ">= 0")
    """Phases between two looks at the policy, the same held-out prompts with the same random numbers every time: eval_*
    in metrics.jsonl, a few completions in samples.jsonl; 0 keeps only the first and the last."""
    tracked: int = setting(32, ">= 8")
    """Completions of such a look."""
    heldout_tokens: int = setting(20_000, ">= 1")
    """Held-out tokens for the language-modelling loss, at most what there is."""
    kl_limit: float | None = setting(None, "> 0")
    """Nats per completion: what a sweeper optimises is the reward after training, but a run whose exact KL exceeds
    this counts as worse than the untouched model; see `saerl_cli.rl.outcome.objective`. No limit when empty."""

    def __post_init__(self) -> None:
        check_settings(self, "evaluation")


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
    checkpoint_every: int = setting(10, ">= 1")
    """Phases between two checkpoints."""
    snapshots: int | None = setting(None, ">= 0")
    """Policies kept along the way beside the last one, evenly over the phases, for `saerl evaluate snapshots=true`;
    when empty 8, and 0 for adapter=full, where each is as large as the model."""
    seed: int = 0
    """Seed of prompts, sampling and initialisation."""

    def __post_init__(self) -> None:
        check_settings(self)
        refuse_unless(len(self.reward.parts) > 0, "reward.parts is empty; choose one, for instance reward=cursing")
        algo, processes = self.algo, self.launch.num_processes
        if self.launch.shards > 1:
            refuse_unless(
                algo.critic is not Critic.separate,
                "algo.critic=separate copies a whole model; with launch.sharding=fsdp2 write algo.critic=shared",
            )
        refuse_unless(
            algo.stop_epochs_kl is None or self.launch.mixed_precision is not Precision.fp16,
            "algo.stop_epochs_kl does not go with launch.mixed_precision=fp16, whose scaler cannot pass over a step;"
            " write bf16",
        )
        refuse_unless(
            algo.samples or (self.reward.normalise is Normalise.none and self.reward.clip is None),
            f"reward.normalise and reward.clip change what ppo, grpo and rloo learn from; leave them out for"
            f" algo={algo.kind.value}",
        )
        refuse_unless(
            algo.kind is not AlgoKind.rwr or self.adapter.splice is not Splice.reconstruct,
            "algo=rwr learns from the untouched model, which is not the reference of adapter.splice=reconstruct; write"
            " adapter.splice=error_preserving",
        )
        if algo.samples:
            per_process = processes * algo.minibatches
            refuse_unless(
                algo.rollouts % per_process == 0,
                f"algo.rollouts={algo.rollouts} must be a multiple of launch.num_processes x algo.minibatches"
                f" = {per_process}",
            )
            refuse_unless(
                algo.rollouts >= 2 * processes,
                f"algo.rollouts={algo.rollouts} leaves fewer than two completions a process; raise it",
            )
        refuse_unless(
            self.rows_of_a_step * processes * (algo.minibatches if algo.samples else 1)
            == (algo.rollouts if algo.samples else algo.batch_size),
            f"algo.batch_size={algo.batch_size} must be a multiple of launch.num_processes={processes}",
        )
        refuse_unless(
            self.rows_of_a_step % (algo.micro_batch or self.rows_of_a_step) == 0,
            f"algo.micro_batch={algo.micro_batch} must divide the {self.rows_of_a_step} completions that a process has"
            " of a minibatch",
        )

    @property
    def rows_of_a_step(self) -> int:
        """Sequences or pairs that a process has of an optimiser step."""
        algo = self.algo
        return (algo.rollouts // algo.minibatches if algo.samples else algo.batch_size) // self.launch.num_processes
