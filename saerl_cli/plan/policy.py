"""`saerl rlhf` and `saerl evaluate` before they run."""

from math import ceil
from pathlib import Path
from typing import Any

from saerl_cli.activations import row_length
from saerl_cli.config.adapter import COEFFICIENTS, SITES, AdapterKind, Splice
from saerl_cli.config.algo import HELD as LOGITS
from saerl_cli.config.algo import AlgoKind, Critic
from saerl_cli.config.groups import ModelConfig, ModelKind, Precision
from saerl_cli.config.reward import RewardKind
from saerl_cli.config.rlhf import EvaluationConfig, PromptKind, RlhfConfig
from saerl_cli.models import resolve_sites
from saerl_cli.plan.dictionaries import Dictionary, dictionaries
from saerl_cli.plan.launches import Sharing, sharing
from saerl_cli.plan.shapes import Shape, from_description, pythia, shape_of
from saerl_cli.plan.text import PROMPT_BYTES, reading
from saerl_cli.plan.work import (
    HELD,
    SAVED,
    SIZE,
    Estimate,
    Phase,
    Work,
    adam,
    copied,
    decode,
    forward,
    logits,
    score,
    small,
    start,
)

EXACT_ROWS = 16
"""Completions of a phase whose exact KL is computed (`saerl_cli.rl.trainers.rollouts`)."""
FILE_PROMPT = 128
"""Tokens of a prompt from a file."""
KEPT = 3
"""Vectors of the frozen part that a rollout keeps for each token."""
TRAINER_STEP, PHASE = 3000, 8000
"""Small operations that an optimiser step, and a phase, cost in transformers' and TRL's trainers beside the model
(measured, experiments/014-plan)."""
LABEL_ROWS = 64
"""Held-out rows by which the most moved features are named (`saerl_cli.rl.summary`), encoded all at once."""
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
        if self.adapter.kind in COEFFICIENTS:
            self.saes, notes = dictionaries(config.adapter, config.model, self.description, sae_words)
            self.notes += notes
        self.full = self.adapter.kind is AdapterKind.full
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

    @property
    def trained(self) -> int:
        """Numbers that the adapter trains."""
        adapter, shape = self.adapter, self.shape
        if self.full:
            return shape.parameters
        if adapter.kind in COEFFICIENTS:
            vectors = 1 + (adapter.splice is Splice.pre_activation) + (adapter.sparsity.hard_concrete is not None)
            return vectors * sum(sae.d_sae for sae in self.saes)
        if adapter.kind is AdapterKind.bias_only:
            return shape.biases
        if adapter.kind is AdapterKind.lora:
            return self.lora()
        if adapter.kind is AdapterKind.ia3:
            return self.ia3()
        return sum(site.width for site in self.sites())

    def sites(self) -> list[Any]:
        """Where vectors are put."""
        return resolve_sites(self.adapter.sites or SITES[self.adapter.kind], self.description)

    def lora(self) -> int:
        """R (in + out) for every layer adapted, r chosen as `saerl_cli.adapter.choose` does."""
        chosen = self.adapter.targets
        every = [one for one in self.shape.linears if chosen is None or one.name in chosen]
        if self.adapter.match is None:
            return (self.adapter.rank or 1) * self.shape.layers * sum(one.inputs + one.outputs for one in every)
        groups = [every] if chosen else [every, *([one] for one in every)]
        sizes = [self.shape.layers * sum(one.inputs + one.outputs for one in group) for group in groups]
        numbers = [max(1, round(self.adapter.match / size)) * size for size in sizes]
        return min(numbers, key=lambda found: abs(found - (self.adapter.match or 0)))

    def ia3(self) -> int:
        """A factor on queries, keys and values, or the outputs of named layers, and on the MLP's hidden units."""
        inside = {"gpt_neox": ["dense_4h_to_h"]}.get(self.shape.family, ["down_proj"])
        usual = {"gpt_neox": ["query_key_value", "dense_4h_to_h"]}.get(
            self.shape.family, ["k_proj", "v_proj", "down_proj"]
        )
        names = self.adapter.targets or usual
        widths = [one.inputs if one.name in inside else one.outputs for one in self.shape.linears if one.name in names]
        return self.shape.layers * sum(widths)

    @property
    def critic(self) -> int:
        """Numbers of the value head, or of the separate value model."""
        if self.algo.kind is not AlgoKind.ppo:
            return 0
        trunk = self.shape.trunk if self.algo.critic is Critic.separate else 0
        return trunk + self.shape.width + 1

    @property
    def lowest(self) -> int:
        """Layers below everything that is trained; 0 where nothing can be kept."""
        kind = self.adapter.kind
        if not self.algo.prefix_cache or kind in (
            AdapterKind.full,
            AdapterKind.lora,
            AdapterKind.ia3,
            AdapterKind.bias_only,
        ):
            return 0
        sites = [sae.layer for sae in self.saes] if kind in COEFFICIENTS else [site.layer for site in self.sites()]
        return min((0 if layer is None else layer) for layer in sites) if sites else 0

    @property
    def above(self) -> float:
        """Layers that are computed again in every pass: those above the lowest site, of its own layer nothing."""
        layer = self.lowest
        if self.algo.prefix_cache and self.saes:
            return self.shape.layers - layer - 1
        return self.shape.layers - layer

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
    """Completions with their scores, and those of the policy with their KL (`saerl_cli.rl.measuring.measure.draw`)."""
    parts = ceil(samples / evaluation.batch_size)
    rows = min(samples, evaluation.batch_size)
    work = [(parts * n, w) for n, w in generating(policy, rows, policy.new, policy.written, not reference)]
    if not reference:
        layers = policy.shape.layers
        for how in ("encode", None):
            work += [(parts * n, w) for n, w in distributions(policy, rows, layers, how)]
    return [*work, small(LOOK)]


def scored(policy: Policy) -> Work:
    """The two scoring passes of a phase, and the exact KL of some completions."""
    shape, dtype = policy.shape, policy.computes
    batches = policy.rows / policy.micro
    tokens = policy.micro * policy.written
    first: Work = [(1, forward(shape, shape.layers, policy.micro, policy.seq, dtype))]
    first += [(1, sae.piece(policy.micro * policy.seq, "encode")) for sae in policy.saes]
    again: Work = [(1, forward(shape, policy.above, policy.micro, policy.seq, dtype))]
    head: Work = [(2, score(shape, tokens, dtype, "none"))]
    rows = policy.rows if policy.algo.kl_target else min(EXACT_ROWS, policy.rows)
    exact = distributions(policy, rows, policy.above, "encode") + distributions(policy, rows, policy.above, None)
    work = [(batches * n, w) for n, w in [*first, *again, *head]]
    if policy.critic > shape.width + 1:  # a model of its own
        work.append((batches, forward(shape, shape.layers, policy.micro, policy.seq, dtype)))
    return [*work, *exact, small(PHASE)]


def updated(policy: Policy) -> Work:
    """An optimiser step: its micro-batches, the gradient's norm, Adam."""
    shape, dtype, algo = policy.shape, policy.computes, policy.algo
    batches = policy.config.rows_of_a_step / policy.micro
    tokens = policy.micro * policy.seq
    grad = policy.grad
    work: Work = [(1, forward(shape, policy.above, policy.micro, policy.seq, dtype, grad))]
    if algo.activation_checkpointing:
        work.append((1, forward(shape, policy.above, policy.micro, policy.seq, dtype)))
    work.append((1, score(shape, policy.micro * policy.written, dtype, grad)))
    first = True
    for sae in sorted(policy.saes, key=lambda one: one.layer or 0):
        known = first and policy.algo.prefix_cache
        work.append((1, sae.piece(tokens, "known" if known else "back")))
        first = False
    if policy.critic > shape.width + 1:
        work.append((1, forward(shape, shape.layers, policy.micro, policy.seq, dtype, "weights")))
    numbers = policy.trained + policy.critic
    return [*((batches * n, w) for n, w in work), (1, adam(numbers)), small(TRAINER_STEP + 3000 * (batches - 1))]


# --- memory ---------------------------------------------------------------------------------------------------------


def held(policy: Policy, shared: Sharing) -> dict[str, float]:
    """Bytes from beginning to end, of one process."""
    shape = policy.shape
    trained, critic = policy.trained, policy.critic
    stays = {"language model": shape.parameters * SIZE[policy.dtype] / shared.weights}
    if policy.full:
        stays["its frozen copy"] = shape.parameters * SIZE[policy.dtype] / shared.weights
    elif policy.adapter.kind is not AdapterKind.bias_only or trained:
        stays["adapter"] = 4.0 * trained
    if policy.saes:
        stays["SAEs"] = 4.0 * sum(sae.parameters for sae in policy.saes)
    if critic:
        stays["critic"] = 4.0 * critic
    numbers = (trained + critic) / shared.states
    stays["gradients"] = 4.0 * numbers * (1 if policy.processes == 1 or shared.states > 1 else 2)  # DDP's buckets
    stays["optimiser"] = 8.0 * numbers
    return stays


def rollout_bytes(policy: Policy) -> float:
    """What is kept of the frozen part, from the first scoring pass to the end of the phase."""
    if not policy.algo.prefix_cache or not policy.lowest and not policy.saes:
        return 0.0
    vectors = KEPT * policy.shape.width * SIZE[policy.computes]
    codes = sum(8 * sae.k for sae in policy.saes if sae.layer == policy.lowest)
    return 2.0 * policy.rows * policy.seq * (vectors + codes)  # in TRL's buffer, and shuffled


def updating_bytes(policy: Policy) -> dict[str, float]:
    """What a micro-batch keeps for the backward pass."""
    shape, tokens, size = policy.shape, policy.micro * policy.seq, SIZE[policy.computes]
    saved = SAVED[policy.grad] * shape.width * size
    layers = policy.above
    kept = (shape.width * size * layers + saved) if policy.algo.activation_checkpointing else saved * layers
    spliced = sum(sae.step_bytes for sae in policy.saes)
    tile = min(policy.micro * policy.written * shape.vocabulary, max(16 * shape.vocabulary, LOGITS))
    low = 2.0 * policy.trained if policy.full and policy.computes != policy.dtype else 0.0
    return {"activations": tokens * (kept + spliced), "logits": 4 * 4 * tile, "weights for autocast": low}


def measuring_bytes(policy: Policy, evaluation: EvaluationConfig) -> dict[str, float]:
    """What the KL of a batch of samples holds: whole distributions over the vocabulary."""
    rows, shape = min(evaluation.batch_size, evaluation.samples), policy.shape
    numbers = rows * shape.vocabulary
    return {"distributions": 4.0 * numbers * (policy.seq + (DISTRIBUTIONS - 1) * policy.new)}


def generation_bytes(policy: Policy, rows: int) -> dict[str, float]:
    """Keys, values and the logits of one step."""
    shape = policy.shape
    cache = shape.kv_bytes(rows, policy.seq, SIZE[policy.dtype])
    return {"keys and values": cache * (1 + 1 / shape.layers), "logits": 24.0 * rows * shape.vocabulary}


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


def estimate(config: RlhfConfig, sae_words: list[str], length: float | None) -> Estimate:
    """Sizes and work of RLHF.

    Args:
        config: its settings.
        sae_words: of the `saerl train-sae` that makes the SAEs which are not there yet.
        length: tokens of a completion on average.

    Raises:
        ValueError: sft and dpo, which are not counted.
    """
    algo, evaluation = config.algo, config.evaluation
    if not algo.samples:
        raise ValueError(f"saerl plan counts algo=ppo, grpo and rloo, not algo={algo.kind.value}")
    policy = Policy(config, sae_words, length)
    shape, shared = policy.shape, sharing(config.launch)
    text, text_bytes, notes = reading(config.data, config.model, PROMPT_BYTES)
    rewards = reward_models(policy)
    stays = held(policy, shared) | {"reward models": sum(size for _, size in rewards), "text": text_bytes}
    grading: Work = [part for work, _ in rewards for part in work]
    both, loss, measured = measured_phases(policy)
    named = LABEL_ROWS * row_length(config.data, shape.context)  # tokens that name the most moved features
    labels: Work = [(1, sae.piece(named, "encode")) for sae in policy.saes]
    dense = 3 * 4.0 * named * max((sae.d_sae for sae in policy.saes), default=0)
    looks = 2 + (algo.phases - 1) // evaluation.every if evaluation.every else 2
    recorded = {"kept of rollouts": rollout_bytes(policy)}
    tile = {"logits": 4.0 * 4 * min(LOGITS, policy.micro * policy.new * shape.vocabulary)}
    gathered = {"a gathered layer": shape.block * SIZE[policy.dtype]} if shared.weights > 1 else {}
    seen = min(evaluation.samples, 256)
    numbers = {
        "language model": shape.parameters,
        "SAEs": sum(sae.parameters for sae in policy.saes),
        "trained": policy.trained,
        "critic": policy.critic,
    }
    phases = [
        Phase("start and text", 1, [(1, start("rl")), (1, start("command")), *text, small(TRAINER_STEP)]),
        Phase(
            "first look", 1,
            [*drawn(policy, evaluation, seen, reference=True), *scaled(grading, seen / policy.rows)],
            generation_bytes(policy, min(evaluation.batch_size, seen)),
        ),
        Phase(
            "generation", algo.phases, [*generating(policy, policy.rows, policy.new, policy.written), *grading],
            generation_bytes(policy, policy.rows) | gathered,
        ),
        Phase(
            "scoring", algo.phases, scored(policy),
            recorded | tile | {"forward pass": forward_bytes(policy, policy.micro)} | gathered,
        ),
        Phase(
            "updates", algo.phases * algo.steps_per_phase, updated(policy),
            recorded | updating_bytes(policy) | gathered,
        ),
        Phase("looks", looks, drawn(policy, evaluation, evaluation.tracked), measured),
        Phase("measurement", 1, [*both, *behaviour(policy)], measured),
        loss,
        *([Phase("naming features", 1, labels, {"features": dense}, on_host=True)] if policy.saes else []),
    ]  # fmt: skip
    each = 4.0 * (shape.parameters if policy.full else policy.trained)
    disk = {
        "policy": each,
        "snapshots": each * snapshots(config),
        "checkpoint": 12.0 * (policy.trained + policy.critic),
    }
    return Estimate("rlhf", policy.processes, policy.computes, numbers, stays, phases, disk, policy.notes + notes)


def behaviour(policy: Policy) -> Work:
    """The KL of constant completions: 32 finalists and 3 graded ones on 16 prompts (`rl/measuring/baselines.py`)."""
    rows = min(16, policy.config.evaluation.samples)
    one: Work = [
        (1, forward(policy.shape, policy.shape.layers, rows, policy.seq, policy.dtype)),
        (1, logits(policy.shape, rows * policy.seq, policy.dtype)),
        small(200),
    ]
    return [(36 * n, w) for n, w in one]


def snapshots(config: RlhfConfig) -> int:
    """Policies kept along the way."""
    usual = 0 if config.adapter.kind is AdapterKind.full else 8
    return min(config.algo.phases - 1, usual if config.snapshots is None else config.snapshots)


def reward_models(policy: Policy) -> list[tuple[Work, float]]:
    """Scoring a phase's completions with each reward model, and its bytes.

    One that is not there yet is taken to be as large as the policy.
    """
    found = []
    for part in policy.config.reward.parts.values():
        if part.kind is not RewardKind.hf:
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
