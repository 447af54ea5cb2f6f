"""How often the untouched model finds right answers: pass@k, without which verified rewards teach nothing."""

from math import comb
from typing import TYPE_CHECKING, Any

from saerl_cli.run.progress import say

if TYPE_CHECKING:
    from saerl_cli.data.prompts import Prompt
    from saerl_cli.rewards.score import Reward
    from saerl_cli.rl.evaluation.measure import Sampling
    from saerl_cli.rl.policy import Policy

SAMPLES = 16
"""Completions a prompt."""
KS = (1, 2, 4, 8, 16)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k completions is right, unbiased (Chen et al. 2021, arXiv 2107.03374).

    Args:
        samples: completions drawn for a prompt, >= k.
        right: how many of them are right.
        k: completions allowed.
    """
    return 1 - comb(samples - right, k) / comb(samples, k)


def base_passes(
    policy: "Policy", reward: "Reward", verifiers: list[str], prompts: "list[Prompt]", how: "Sampling"
) -> dict[str, dict[str, Any]]:
    """Measure pass@k of the untouched model for every verifier of the reward.

    Args:
        policy: its reference is asked.
        reward: with the verifiers among its parts.
        verifiers: their names.
        prompts: each gets `SAMPLES` completions.
        how: settings of the samples.

    Returns:
        Part -> prompts, samples (a prompt), and pass_at: {k: mean over prompts}.
    """
    from saerl_cli.rl.evaluation.measure import draw

    if not verifiers:
        return {}
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    samples = draw(policy, reward, repeated, how, reference=True)
    return {name: passes(samples.scores[name], len(prompts)) for name in verifiers}


def passes(scores: list[float], prompts: int) -> dict[str, Any]:
    """The numbers of one verifier; `scores` holds `SAMPLES` for the first prompt, then for the next."""
    right = [sum(score > 0 for score in scores[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(prompts)]
    means = {str(k): sum(pass_at_k(SAMPLES, r, k) for r in right) / prompts for k in KS}
    return {"prompts": prompts, "samples": SAMPLES, "pass_at": means}


def tell_passes(found: dict[str, dict[str, Any]]) -> None:
    """Say how often the untouched model is right, and warn when it never is."""
    for name, numbers in found.items():
        rates = ", ".join(f"pass@{k} {rate:.1%}" for k, rate in numbers["pass_at"].items())
        say(f"{name}, the untouched model on {numbers['prompts']} prompts: {rates}")
        if numbers["pass_at"][str(SAMPLES)] == 0:
            say(
                f"WARNING: {name}: the untouched model is never right in {SAMPLES} tries at {numbers['prompts']}"
                " prompts; what is never sampled is never learned, give easier prompts or a better model"
            )
