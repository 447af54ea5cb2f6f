"""A policy before it is trained: its sizes, and what sampling from it and measuring it take."""

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from saerl_cli.config.algo import AlgoKind, Critic
from saerl_cli.config.groups import ModelConfig, ModelKind, Precision
from saerl_cli.config.rlhf import EvaluationConfig, PromptKind, RlhfConfig
from saerl_cli.data.documents import row_length
from saerl_cli.models import resolve_sites
from saerl_cli.plan.dictionaries import Dictionary, dictionaries
from saerl_cli.plan.launches import for_sampling, weights
from saerl_cli.plan.shapes import Shape, from_description, pythia, shape_of
from saerl_cli.plan.work import (
    HELD,
    SAVED,
    SIZE,
    Phase,
    Work,
    copied,
    decode,
    forward,
    logits,
    small,
)
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rl.adapters import adapter_of, count_trained

FILE_PROMPT = 128
"""Tokens of a prompt from a file."""
TRAINER_STEP, PHASE = 3000, 8000
"""Small operations that an optimiser step, and a phase, cost in transformers' and TRL's trainers beside the model
(measured, experiments/014-plan)."""
LOOK = 4000
"""The same for a look at the policy."""
DISTRIBUTIONS = 6
"""Matrices [tokens, vocabulary] that a measurement holds."""


class Policy:
    """The sizes of what is trained and of what it computes."""

    def __init__(self, config: RlhfConfig, sae_words: list[str], length: float | None):
        self.config, self.adapter, self.algo = config, config.adapter, config.algo
        self.shape, self.description = shape_of(config.model)
        self.notes: list[str] = []
        self.saes: list[Dictionary] = []
        if adapter_of(self.adapter).saes is not None:
            self.saes, notes = dictionaries(config.adapter, config.model, self.description, sae_words)
            self.notes += notes
        self.full = adapter_of(self.adapter).whole_model
        low = config.launch.mixed_precision is not Precision.no
        self.dtype = config.model.dtype.value
        self.computes = "bfloat16" if low else self.dtype  # what products are computed in during training
        self.processes = config.launch.num_processes
        self.rows = self.algo.rollouts // self.processes
        self.micro = self.algo.micro_batch or config.rows_of_a_step
        self.prompt, self.new = config.prompts.tokens, self.algo.max_new_tokens
        if config.prompts.kind is PromptKind.file:
            self.prompt = min(FILE_PROMPT, self.shape.context - self.new)
            self.notes.append(f"prompts of a file are taken to have {self.prompt} tokens")
        self.written = min(self.new, length or self.new)  # tokens that a completion has on average
        if length is None:
            self.notes.append("every completion is taken to be algo.max_new_tokens long; --length N says otherwise")
        self.seq = self.prompt + self.new

    @cached_property
    def trained(self) -> int:
        """Numbers that the adapter trains."""
        if self.full:
            return self.shape.parameters
        return count_trained(self.adapter, self.description, {sae.site: sae.d_sae for sae in self.saes})

    def sites(self) -> list[Any]:
        """Where vectors are put."""
        return resolve_sites(self.adapter.sites or adapter_of(self.adapter).sites, self.description)

    @property
    def critic(self) -> int:
        """Numbers of the value head, or of the separate value model."""
        if self.algo.kind is not AlgoKind.ppo:
            return 0
        trunk = self.shape.trunk if self.algo.critic is Critic.separate else 0
        return trunk + self.shape.width + 1

    @property
    def sited(self) -> bool:
        """Whether all that is trained lies at sites, so that gradients end at the lowest."""
        return bool(self.saes or adapter_of(self.adapter).sites)

    @property
    def lowest(self) -> int:
        """Layers below everything that is trained; 0 where nothing can be kept."""
        if not self.algo.prefix_cache or not self.sited:
            return 0
        sites = [sae.layer for sae in self.saes] or [site.layer for site in self.sites()]
        return min((0 if layer is None else layer) for layer in sites) if sites else 0

    @property
    def above(self) -> int:
        """Layers that gradients go through: those above the lowest site, of its own layer nothing.

        They are what every pass over a rollout computes again.
        """
        return self.shape.layers - self.lowest - (1 if self.algo.prefix_cache and self.sited else 0)

    @property
    def grad(self) -> str:
        """How far gradients go."""
        return "weights" if self.full else "inputs"


# --- pieces ---------------------------------------------------------------------------------------------------------


def generating(policy: Policy, rows: int, new: int, written: float, spliced: bool = True) -> Work:
    """Completions: a pass over the prompts, then a token a row and step; rows that have ended are left out."""
    shape, dtype = policy.shape, policy.dtype
    steps = max(0, new - 1)
    busy = written / new  # share of the rows that are still being written, on average
    middle = policy.prompt + max(1, round(new / 2))
    work: Work = [
        (1, forward(shape, shape.layers, rows, policy.prompt, dtype)),
        (1, logits(shape, rows, dtype)),
        (steps, decode(shape, max(1, round(rows * busy)), middle, dtype)),
        small(30 * steps),
    ]
    if spliced:
        for sae in policy.saes:
            tokens = max(1, round(rows * busy))
            work += [(steps, sae.piece(tokens, "encode")), (1, sae.piece(rows * policy.prompt, "encode"))]
    return work


def distributions(policy: Policy, rows: float, layers: float, how: str | None) -> Work:
    """Passes over completions that give whole distributions."""
    work: Work = [
        (1, forward(policy.shape, layers, rows, policy.seq, policy.dtype)),
        (1, logits(policy.shape, rows * policy.new, policy.dtype)),
        copied(24 * rows * policy.new * policy.shape.vocabulary),
    ]
    return work + ([(1, sae.piece(rows * policy.seq, how)) for sae in policy.saes] if how else [])


def drawn(policy: Policy, evaluation: EvaluationConfig, samples: int, reference: bool = False) -> Work:
    """Completions with their scores, and those of the policy with their KL (`saerl_cli.rl.evaluation.measure.draw`)."""
    parts = ceil(samples / evaluation.batch_size)
    rows = min(samples, evaluation.batch_size)
    work = [(parts * n, w) for n, w in generating(policy, rows, policy.new, policy.written, not reference)]
    if not reference:
        layers = policy.shape.layers
        for how in ("encode", None):
            work += [(parts * n, w) for n, w in distributions(policy, rows, layers, how)]
    return [*work, small(LOOK)]


@dataclass
class Learning:
    """What an algorithm does and holds in training."""

    phases: list[Phase]
    """Training itself."""
    before: list[Phase] = field(default_factory=list)
    """What comes before the first look at the policy."""
    after: list[Phase] = field(default_factory=list)
    """What is measured beside at the end."""
    reading: Work = field(default_factory=list)
    """Reading what is learned from."""
    read: dict[str, float] = field(default_factory=dict)
    """Bytes held while it is read."""
    stays: dict[str, float] = field(default_factory=dict)
    """Bytes that it is held in."""


# --- memory ---------------------------------------------------------------------------------------------------------


def held(policy: Policy) -> dict[str, float]:
    """Bytes from beginning to end, of one process."""
    trained, critic, launch = policy.trained, policy.critic, policy.config.launch
    stays = weights(policy.shape, SIZE[policy.dtype], launch)
    if policy.full:
        stays["its frozen copy"] = stays["language model"]
    elif trained:
        stays["adapter"] = 4.0 * trained
    if policy.saes:
        stays["SAEs"] = 4.0 * sum(sae.parameters for sae in policy.saes)
    if critic:
        stays["critic"] = 4.0 * critic
    split = trained / launch.shards if policy.full and launch.shards > 1 else 0.0
    alike = critic if split else trained + critic  # in all processes
    stays["gradients"] = 4.0 * (split + alike * (1 if policy.processes == 1 else 2))  # twice: what is averaged
    stays["optimiser"] = 8.0 * (split + alike)
    return stays


def activation_bytes(policy: Policy, tokens: float) -> dict[str, float]:
    """What the tokens of a micro-batch keep for the backward pass, and the weights that autocast makes."""
    shape, size = policy.shape, SIZE[policy.computes]
    saved = SAVED[policy.grad] * shape.width * size
    layers = policy.above
    kept = (shape.width * size * layers + saved) if policy.algo.activation_checkpointing else saved * layers
    spliced = sum(sae.step_bytes for sae in policy.saes)
    low = 2.0 * policy.trained if policy.full and policy.computes != policy.dtype else 0.0
    return {"activations": tokens * (kept + spliced), "weights for autocast": low}


def measuring_bytes(policy: Policy, evaluation: EvaluationConfig) -> dict[str, float]:
    """What the KL of a batch of samples holds: whole distributions over the vocabulary."""
    rows, shape = min(evaluation.batch_size, evaluation.samples), policy.shape
    numbers = rows * shape.vocabulary
    return {"distributions": 4.0 * numbers * (policy.seq + (DISTRIBUTIONS - 1) * policy.new)}


def generation_bytes(policy: Policy, rows: int) -> dict[str, float]:
    """Keys, values and the logits of one step."""
    shape = policy.shape
    cache = shape.kv_bytes(rows, policy.seq, SIZE[policy.dtype])
    held = {"keys and values": cache * (1 + 1 / shape.layers), "logits": 24.0 * rows * shape.vocabulary}
    return held | for_sampling(shape, SIZE[policy.dtype], policy.config.launch)


def forward_bytes(policy: Policy, rows: int) -> float:
    """A pass without gradients."""
    return rows * policy.seq * HELD * policy.shape.width * SIZE[policy.dtype]


# --- estimates ------------------------------------------------------------------------------------------------------


def scaled(work: Work, times: float) -> Work:
    """Some work so often."""
    return [(times * count, part) for count, part in work]


def measured_phases(policy: Policy) -> tuple[Work, Phase, dict[str, float]]:
    """Fresh samples of policy and reference, the loss of both on held-out text, and what the samples' KL holds."""
    config, shape = policy.config, policy.shape
    evaluation, context = config.evaluation, row_length(config.data, shape.context)
    rows = max(1, evaluation.heldout_tokens // context)
    batch = min(16, rows)
    one: Work = [
        (2, forward(shape, shape.layers, batch, context, policy.dtype)),
        (2, logits(shape, batch * context, policy.dtype)),
        *((1, sae.piece(batch * context, "encode")) for sae in policy.saes),
    ]
    loss = Phase(
        "held-out loss", 1, scaled(one, rows / batch), {"logits": 4.0 * 3 * batch * context * shape.vocabulary}
    )
    samples = evaluation.samples
    both = [*drawn(policy, evaluation, samples, reference=True), *drawn(policy, evaluation, samples)]
    holds = measuring_bytes(policy, evaluation) | {"forward pass": forward_bytes(policy, evaluation.batch_size)}
    return both, loss, holds


def behaviour(policy: Policy) -> Work:
    """The KL of constant completions: 32 finalists and 3 graded ones on 16 prompts (`rl/measuring/baselines.py`)."""
    rows = min(16, policy.config.evaluation.samples)
    one: Work = [
        (1, forward(policy.shape, policy.shape.layers, rows, policy.seq, policy.dtype)),
        (1, logits(policy.shape, rows * policy.seq, policy.dtype)),
        small(200),
    ]
    return [(36 * n, w) for n, w in one]


def reward_models(policy: Policy) -> list[tuple[Work, float]]:
    """Scoring a phase's completions with each reward model, and its bytes.

    One that is not there yet is taken to be as large as the policy.
    """
    found = []
    for part in policy.config.reward.parts.values():
        if not kind_of(part).model:
            continue
        path = part.path or ""
        shape, guessed = reward_shape(path, policy.shape)
        if guessed:
            policy.notes.append(f"the reward model {path} is not there: taken to be as large as the policy")
        rows = min(part.batch_size, policy.rows)
        work: Work = [(policy.rows / rows, forward(shape, shape.layers, rows, policy.seq, "float32"))]
        found.append((work, 4.0 * shape.trunk))
    return found


def reward_shape(path: str, otherwise: Shape) -> tuple[Shape, bool]:
    """The sizes of a reward model, and whether they are a guess."""
    if (Path(path) / "config.json").is_file():
        return shape_of(ModelConfig(kind=ModelKind.local, path=path))[0], False
    known = pythia(path)
    return (from_description(known), False) if known else (otherwise, True)
