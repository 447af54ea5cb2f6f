"""`saerl rlhf` before it runs: what all algorithms have around their training."""

from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.documents import row_length
from saerl_cli.plan import rollouts, supervised
from saerl_cli.plan.policy import (
    TRAINER_STEP,
    Policy,
    behaviour,
    drawn,
    generation_bytes,
    held,
    measured_phases,
    reward_models,
    scaled,
)
from saerl_cli.plan.text import PROMPT_BYTES, reading
from saerl_cli.plan.work import Estimate, Phase, Work, small, start
from saerl_cli.rl.adapters import adapter_of

LABEL_ROWS = 64
"""Held-out rows by which the most moved features are named (`saerl_cli.rl.summary`), encoded all at once."""


def estimate(config: RlhfConfig, sae_words: list[str], length: float | None) -> Estimate:
    """Sizes and work of RLHF.

    Args:
        config: its settings.
        sae_words: of the `saerl train-sae` that makes the SAEs which are not there yet.
        length: tokens of a completion on average.

    Raises:
        ValueError: SAEs that cannot be, pairs or examples that cannot be read.
    """
    algo, evaluation = config.algo, config.evaluation
    policy = Policy(config, sae_words, length)
    shape = policy.shape
    text, text_bytes, notes = reading(config.data, config.model, PROMPT_BYTES)
    rewards = reward_models(policy)
    grading: Work = [part for work, _ in rewards for part in work]
    learnt = (rollouts if algo.samples else supervised).learning(policy, grading)
    stays = held(policy) | {"reward models": sum(size for _, size in rewards), "text": text_bytes}
    both, loss, measured = measured_phases(policy)
    looks = 2 + (algo.phases - 1) // evaluation.every if evaluation.every else 2
    seen = min(evaluation.samples, 256)
    numbers = {
        "language model": shape.parameters,
        "SAEs": sum(sae.parameters for sae in policy.saes),
        "trained": policy.trained,
        "critic": policy.critic,
    }
    begin: Work = [(1, start("rl")), (1, start("command")), *text, *learnt.reading, small(TRAINER_STEP)]
    first = [*drawn(policy, evaluation, seen, reference=True), *scaled(grading, seen / policy.rows)]
    phases = [
        Phase("start and text", 1, begin, learnt.read, on_host=True),
        *learnt.before,
        Phase("first look", 1, first, generation_bytes(policy, min(evaluation.batch_size, seen))),
        *learnt.phases,
        Phase("looks", looks, drawn(policy, evaluation, evaluation.tracked), measured),
        Phase("measurement", 1, [*both, *behaviour(policy)], measured),
        loss,
        *learnt.after,
        *([naming(policy)] if policy.saes else []),
    ]
    each = 4.0 * (shape.parameters if policy.full else policy.trained)
    disk = {
        "policy": each,
        "snapshots": each * snapshots(config),
        "checkpoint": 12.0 * (policy.trained + policy.critic),
    }
    return Estimate(
        "rlhf", policy.processes, policy.computes, numbers, stays | learnt.stays, phases, disk, policy.notes + notes
    )


def naming(policy: Policy) -> Phase:
    """The most moved features encoded on held-out text, dense and all at once."""
    tokens = LABEL_ROWS * row_length(policy.config.data, policy.shape.context)
    dense = 3 * 4.0 * tokens * max(sae.d_sae for sae in policy.saes)
    work: Work = [(1, sae.piece(tokens, "encode")) for sae in policy.saes]
    return Phase("naming features", 1, work, {"features": dense}, on_host=True)


def snapshots(config: RlhfConfig) -> int:
    """Policies kept along the way."""
    usual = 0 if adapter_of(config.adapter).whole_model else 8
    return min(config.algo.phases - 1, usual if config.snapshots is None else config.snapshots)
