"""`saerl evaluate` before it runs: it reads the settings of the run that it measures."""

from dataclasses import replace

from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.plan.launches import weights
from saerl_cli.plan.policy import Policy, behaviour, drawn, measured_phases, reward_models, scaled
from saerl_cli.plan.text import PROMPT_BYTES, reading
from saerl_cli.plan.work import SIZE, Estimate, Phase, start
from saerl_cli.rl.runs import run_config, snapshot_files


def estimate(config: EvaluateConfig, length: float | None) -> Estimate:
    """Sizes and work of measuring a policy.

    Args:
        config: its settings.
        length: tokens of a completion on average.

    Raises:
        ValueError: `policy` is no run directory.
    """
    run = run_config(config.policy)
    run = replace(run, evaluation=config.evaluation, launch=config.launch)
    policy = Policy(run, [], length)
    evaluation, shape = config.evaluation, policy.shape
    earlier = len(snapshot_files(config.policy)) if config.snapshots else 0
    policies = 1 + earlier + len(config.factors)
    text, text_bytes, notes = reading(run.data, run.model, PROMPT_BYTES)
    rewards = reward_models(policy)
    grading = [(times / policy.rows, part) for work, _ in rewards for times, part in work]
    measured, heldout, holds = measured_phases(policy)
    base = config.samples_a_prompt * evaluation.samples if config.base is None else 0
    stays = weights(shape, SIZE[policy.dtype], config.launch, 2 if policy.full else 1) | {
        "adapter": 0 if policy.full else 4.0 * policy.trained,
        "SAEs": 4.0 * sum(sae.parameters for sae in policy.saes),
        "reward models": sum(size for _, size in rewards),
        "text": text_bytes,
    }
    samples = evaluation.samples * (1 + policies)
    work = [*measured, *scaled(drawn(policy, evaluation, evaluation.samples), policies - 1)]
    work += [*scaled(grading, samples), *behaviour(policy)]
    phases = [
        Phase("start and text", 1, [(1, start("rl")), (1, start("command")), *text]),
        Phase("measurement", 1, work, holds),
        Phase("held-out loss", 1, scaled(heldout.work, (1 + policies) / 2), heldout.holds),
    ]
    if base:
        drawing = [*drawn(policy, evaluation, base, reference=True), *scaled(grading, base)]
        phases.insert(2, Phase("reference's samples", 1, drawing, holds))
    numbers = {
        "language model": shape.parameters,
        "SAEs": sum(sae.parameters for sae in policy.saes),
        "trained": policy.trained,
    }
    return Estimate("evaluate", policy.processes, policy.dtype, numbers, stays, phases, {}, policy.notes + notes)
