"""`saerl evaluate`: a finished policy on prompts and samples of its own."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.groups import ModelKind
from saerl_cli.models import describe
from saerl_cli.rewards.check import check_reward
from saerl_cli.run.directory import Run
from saerl_cli.run.progress import say

if TYPE_CHECKING:
    from saerl_cli.rl.prompts import Prompt


def check(config: EvaluateConfig) -> None:
    """Refuse a policy that is not there or has not finished.

    Raises:
        ValueError: one line saying what is wrong.
    """
    from saerl_cli.rl.runs import policy_folder, run_config

    trained = run_config(config.policy)
    policy_folder(config.policy, trained)
    describe(trained.model)
    check_reward(trained.reward)
    if config.launch.num_processes > 1:
        raise ValueError("saerl evaluate measures in one process; write launch=one")


def work(config: EvaluateConfig, run: Run, accelerator: Any) -> float:
    """Draw fresh samples, measure, write summary.json; returns the reward of the policy."""
    from saerl_cli.activations import documents
    from saerl_cli.models import quiet_transformers
    from saerl_cli.rewards.score import TOTAL, build_reward
    from saerl_cli.rl.build import heldout_rows
    from saerl_cli.rl.exact import derived_seed
    from saerl_cli.rl.measure import Sampling, measure
    from saerl_cli.rl.policy import load_policy
    from saerl_cli.rl.questions import choose_prompts
    from saerl_cli.rl.runs import run_config
    from saerl_cli.rl.summary import curse_words

    start = time.monotonic()
    trained = run_config(config.policy)
    trained.evaluation = config.evaluation
    with quiet_transformers():
        policy = load_policy(config.policy, accelerator.device)
    reward = build_reward(trained.reward, policy.tokenizer, accelerator.device)
    texts = documents(trained.data, trained.model, "heldout")
    _, prompts = choose_prompts(trained, policy.tokenizer, policy.context_size)
    how = Sampling(
        trained.algo.max_new_tokens,
        trained.algo.temperature,
        config.evaluation.batch_size,
        derived_seed(config.seed, 7),
    )
    say(f"sampling {config.evaluation.samples} completions from the policy and from its reference")
    numbers, _, after = measure(
        policy,
        reward,
        drawn(prompts, config.evaluation.samples, config.seed),
        heldout_rows(trained, policy.context_size, policy.tokenizer, texts),
        how,
        attributes=trained.model.kind is ModelKind.planted,
    )
    rows = zip(after.prompts, after.texts, after.scores[TOTAL], after.kl, strict=True)
    for prompt, text, score, kl in list(rows)[:64]:
        run.sample(0, prompt.text, text, score, kl)
    record = {"policy": str(Path(config.policy)), "adapter": trained.adapter.kind.value, "seed": config.seed}
    numbers = record | numbers | curse_words(numbers) | {"seconds": round(time.monotonic() - start, 1)}
    run.summary(numbers)
    return numbers["reward_after"]


def drawn(prompts: "list[Prompt]", count: int, seed: int) -> "list[Prompt]":
    """So many prompts in an order that depends on the seed; each as often as the next where there are too few."""
    from random import Random

    order = list(prompts)
    Random(seed).shuffle(order)
    return [order[i % len(order)] for i in range(count)]
