"""Samples drawn beside training: of the untouched model, and of the policy on the same held-out prompts every time."""

from itertools import islice

from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rewards.score import TOTAL, spread
from saerl_cli.rl.build import RlhfSetup
from saerl_cli.rl.evaluation.measure import cycled, draw, mean_and_error
from saerl_cli.rl.evaluation.passes import SAMPLES, base_passes, tell_passes
from saerl_cli.rl.outcome import unreachable
from saerl_cli.rl.policy import Policy
from saerl_cli.run.progress import say

SHOWN_SAMPLES = 8
"""Completions that samples.jsonl gets at a time, of the same held-out prompts each time."""


def sample_untouched(setup: RlhfSetup, policy: Policy) -> None:
    """Sample the untouched model: step 0 of samples.jsonl, and a warning when the reward tells nothing apart."""
    if not setup.run.writes:
        return
    prompts = cycled(setup.prompts, min(setup.config.evaluation.samples, 256))
    samples = draw(policy, setup.reward, prompts, setup.sampling("spread"), reference=True)
    spreads = {name: spread(values) for name, values in samples.scores.items()}
    verifiers = [name for name, part in setup.config.reward.parts.items() if kind_of(part).answers is not None]
    asked = setup.prompts[: max(1, setup.config.evaluation.samples // SAMPLES)]
    found = base_passes(policy, setup.reward, verifiers, asked, setup.sampling("passes"))
    setup.run.update(reward_spread=spreads, **({"base_passes": found} if found else {}))
    tell_passes(found)
    for name, seen in spreads.items():
        if seen["std"] == 0:
            say(
                f"WARNING: {name} is {seen['mean']:g} for all {len(prompts)} completions of the untouched model;"
                " no algorithm can learn from a score that tells nothing apart"
            )
        elif seen["coverage"] < 0.05:
            say(f"WARNING: {name} tells only {seen['coverage']:.1%} of {len(prompts)} completions from the rest")
    target = setup.config.algo.kl_target
    if target is not None and (warning := unreachable(target, samples.scores[TOTAL])):
        say(f"WARNING: {warning}")
    sample_policy(setup, policy, 0)


def sample_policy(setup: RlhfSetup, policy: Policy, step: int) -> dict[str, float]:
    """Sample the policy on the same held-out prompts, with the same random numbers every time.

    The first few go into samples.jsonl.

    Returns:
        eval_reward and eval_kl with standard errors, and eval_kl_exact, for metrics.jsonl.
    """
    prompts = cycled(setup.heldout_prompts, setup.config.evaluation.tracked)
    was_training = policy.model.training
    policy.model.eval()
    samples = draw(policy, setup.reward, prompts, setup.sampling("shown"))
    policy.model.train(was_training)
    rows = zip(samples.prompts, samples.texts, samples.scores[TOTAL], samples.kl, strict=True)
    for prompt, text, reward, kl in islice(rows, SHOWN_SAMPLES):
        setup.run.sample(step, prompt.text, text, reward, kl)
    reward, kl = mean_and_error(samples.scores[TOTAL]), mean_and_error(samples.kl)
    exact = mean_and_error(samples.kl_exact)[0]
    return {
        **{"eval_reward": reward[0], "eval_reward_se": reward[1], "eval_kl": kl[0], "eval_kl_se": kl[1]},
        "eval_kl_exact": exact,
    }
