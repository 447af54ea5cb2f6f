"""`saerl evaluate`: a finished policy, and those on the way to it, on prompts and samples of their own.

summary.json    the numbers; frontier, an entry a policy with its efficiency; optimum, pooled_optimum, best_of_n: limits
base.jsonl      rewards of the reference's completions, a line a prompt
frontier.csv    what frontier.svg and frontier.png show
"""

import time
from typing import Any

from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.models import describe
from saerl_cli.rewards.score import check_reward
from saerl_cli.rl.evaluation.base import check_base
from saerl_cli.rl.runs import policy_folder, run_config, snapshot_files
from saerl_cli.run.directory import Run
from saerl_cli.run.processes import process_group
from saerl_cli.run.progress import say


def check(config: EvaluateConfig) -> None:
    """Refuse a policy that is not there or has not finished, and snapshots or base samples that are not there.

    Raises:
        ValueError: one line saying what is wrong.
    """
    trained = run_config(config.policy)
    policy_folder(config.policy, trained)
    if config.snapshots and not snapshot_files(config.policy):
        raise ValueError(
            f"{config.policy} kept no policies along the way; leave snapshots=true out, or train it with snapshots=8"
        )
    check_base(config, trained)
    describe(trained.model)
    check_reward(trained.reward)


def work(config: EvaluateConfig, run: Run, accelerator: Any) -> float:
    """Measure, write summary.json, the figure and its data, print the frontier; returns the reward of the policy."""
    from saerl_cli.analysis.limits import curves, limits_of, samples_of, shares
    from saerl_cli.report.frontier import print_table, write_frontier
    from saerl_cli.rl.policy_evaluation import evaluate_policy

    start = time.monotonic()
    found = evaluate_policy(config, run, accelerator.device, process_group())
    if not run.writes:
        return found.numbers["reward_after"]
    numbers, limits = found.numbers, limits_of(found.base)
    points = [entry | shares(entry, limits) for entry in numbers["frontier"]]
    numbers |= {"frontier": points, "base_samples": samples_of(found.base), **shares(points[-1], limits)}
    numbers |= curves(limits, max(entry["kl_exact"] for entry in points))
    if len(points) > 1 or limits:
        write_frontier(run.path, "frontier", {numbers["adapter"]: [points]}, {}, numbers)
        print_table(points)
    for warning in numbers["warnings"]:
        say(f"WARNING: {warning}")
    run.summary(numbers | {"seconds": round(time.monotonic() - start, 1)})
    return numbers["reward_after"]
