"""Constant completions that a policy must beat: the best string, the best token again and again, nothing at all.

The verdict is taken on what was optimised, `reward - kl_coef * KL`; a constant that wins by reward alone is a note.

They are chosen on one half of the prompts and graded on the other, where the policy is graded too. Writing `y` whatever
the prompt `x` is a policy as well: its KL from the reference is `-log p_ref(y | x)`, nats.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.evaluation.behaviour import beaten, detect, near, one_token
from saerl_cli.rl.evaluation.measure import Samples, Sampling, log_probabilities, mean_and_error
from saerl_cli.rl.policy import Policy

FREQUENT, BEST, TOKENS = 8, 16, 512
"""Candidates: the policy's most frequent completions; the best-rewarded ones of policy and reference; single tokens."""
FINALISTS = 16
"""Strings, and as many tokens, that are looked at closely."""
FIRST, SECOND, GRADED, PRICED = 2, 32, 128, 16
"""Prompts that all candidates, that finalists and that the chosen are scored on; and that a KL is computed on."""


@dataclass(frozen=True)
class Constant:
    """A completion that does not depend on the prompt."""

    kind: str
    """empty, string or token."""
    ids: tuple[int, ...]
    """With the end token, where it ends."""
    text: str


def behaviour(
    policy: Policy, reward: Reward, before: Samples, after: Samples, how: Sampling, kl_coef: float | None = None
) -> dict[str, Any]:
    """What summary.json says of a policy's behaviour under `behaviour`.

    Args:
        policy: the policy.
        reward: scores completions.
        before: completions of the reference.
        after: completions of the policy, of the same prompts.
        how: how they were drawn.
        kl_coef: weight of the KL in what the policy was trained for; None where it had none.

    Returns:
        before, after: `saerl_cli.rl.evaluation.behaviour.detect`; one_token: `behaviour.one_token` with its text;
        baselines: `baselines`; beaten: `saerl_cli.rl.evaluation.behaviour.beaten` of them.
    """

    def decode(ids: Sequence[int]) -> str:
        return policy.tokenizer.decode(list(ids))

    rewards = (before.scores[TOTAL], after.scores[TOTAL])
    token = one_token(before.completion_ids, after.completion_ids, *rewards)
    found = baselines(policy, reward, before, after, how, kl_coef)
    return {
        "before": detect(before.completion_ids, rewards[0], decode),
        "after": detect(after.completion_ids, rewards[1], decode),
        "one_token": token and token | {"text": decode([token["token"]])},
        "baselines": found,
        "beaten": beaten({"baselines": found}),
    }


def baselines(
    policy: Policy, reward: Reward, before: Samples, after: Samples, how: Sampling, kl_coef: float | None
) -> dict[str, Any]:
    """The best constants and the policy on the prompts that the constants were not chosen on.

    Returns:
        string and best, of highest reward and of highest objective, token, empty: {kind, text, token, reward,
        reward_se, difference (less the policy's reward on the same prompts), difference_se, kl, kl_se, objective
        (reward - kl_coef * KL; None without kl_coef, and best is string then), near (share of the policy's completions
        that are nearly this)}; policy: {reward, kl, objective}; and candidates, prompts, kl_coef. With a single
        prompt, constants are chosen and graded on it.
    """
    prompts = list(dict.fromkeys(after.prompts))
    chosen_on, graded_on = prompts[::2], prompts[1::2][:GRADED] or prompts
    every = candidates(policy, before, after, how.max_new_tokens)
    best = finalists(reward, every, chosen_on[:FIRST])
    scores = [sum(score(reward, c, chosen_on[:SECOND])) / len(chosen_on[:SECOND]) for c in best]
    prices = [sum(price(policy, c, chosen_on[:PRICED], how)) / len(chosen_on[:PRICED]) for c in best]
    costs = list(zip(scores, prices, best, strict=True))
    ranked = [c for _, _, c in sorted(costs, key=lambda entry: (-entry[0], entry[1]))]
    picked = {
        "string": ranked[0],
        "best": ranked[0] if kl_coef is None else max(costs, key=lambda entry: entry[0] - kl_coef * entry[1])[2],
        "token": next((c for c in ranked if c.kind == "token"), None),
        "empty": next(c for c in ranked if c.kind == "empty"),
    }
    own = {p: [] for p in graded_on}
    kls = []
    for prompt, value, kl in zip(after.prompts, after.scores[TOTAL], after.kl_exact, strict=True):
        if prompt in own:
            own[prompt].append(value)
            kls.append(kl)
    means = [sum(values) / len(values) for values in own.values()]
    mean, kl = sum(means) / len(means), sum(kls) / len(kls)
    objective = None if kl_coef is None else mean - kl_coef * kl
    graded = {
        constant: grade(policy, reward, constant, graded_on, means, after, how, kl_coef)
        for constant in dict.fromkeys(picked.values())
        if constant
    }
    return {
        **{name: constant and graded[constant] for name, constant in picked.items()},
        "policy": {"reward": mean, "kl": kl, "objective": objective},
        "candidates": len(every),
        "prompts": len(graded_on),
        "kl_coef": kl_coef,
    }


def candidates(policy: Policy, before: Samples, after: Samples, longest: int) -> list[Constant]:
    """Constants worth trying, natural ones first."""
    tokenizer, special = policy.tokenizer, {*policy.tokenizer.all_special_ids, *policy.eos_token_ids}
    frequent = [ids for ids, _ in Counter(map(tuple, after.completion_ids)).most_common(FREQUENT)]
    best = [ids for samples in (after, before) for ids in best_rewarded(samples, BEST)]
    end = tuple(policy.eos_token_ids[:1])
    strings = [ids for ids in dict.fromkeys([*frequent, *best]) if set(ids) - special]
    written = Counter(token for row in (*after.completion_ids, *before.completion_ids) for token in row)
    vocabulary = [token for token, _ in written.most_common()]
    if len(tokenizer) <= TOKENS:
        vocabulary += [token for token in range(len(tokenizer)) if token not in written]
    tokens = [token for token in vocabulary if token not in special][:TOKENS]
    return [
        Constant("empty", end, ""),
        *(Constant("string", ids, tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in strings),
        *(Constant("token", (token,) * longest, tokenizer.decode([token] * longest)) for token in tokens),
    ]


def best_rewarded(samples: Samples, count: int) -> list[tuple[int, ...]]:
    """The best-rewarded completions, each once."""
    order = sorted(range(len(samples.texts)), key=lambda i: -samples.scores[TOTAL][i])
    return list(dict.fromkeys(tuple(samples.completion_ids[i]) for i in order))[:count]


def finalists(reward: Reward, every: Sequence[Constant], prompts: Sequence[Prompt]) -> list[Constant]:
    """The best strings and the best tokens on a few prompts; of equals the first; the empty one always."""
    rows = [(constant, prompt) for constant in every for prompt in prompts]
    values = score_rows(reward, rows)
    n = len(prompts)
    mean = {constant: sum(values[i * n : (i + 1) * n]) / n for i, constant in enumerate(every)}
    kept = []
    for kinds in (("empty",), ("string",), ("token",)):
        own = [constant for constant in every if constant.kind in kinds]
        kept += sorted(own, key=lambda constant: -mean[constant])[:FINALISTS]
    return kept


def score(reward: Reward, constant: Constant, prompts: Sequence[Prompt]) -> list[float]:
    """Reward of a constant on every prompt."""
    return score_rows(reward, [(constant, prompt) for prompt in prompts])


def score_rows(reward: Reward, rows: Sequence[tuple[Constant, Prompt]]) -> list[float]:
    """Rewards of constants as completions of prompts."""
    texts, ids = [c.text for c, _ in rows], [list(c.ids) for c, _ in rows]
    return reward.score([p.text for _, p in rows], texts, ids, [p.answer for _, p in rows])[TOTAL]


@torch.no_grad()
def price(policy: Policy, constant: Constant, prompts: Sequence[Prompt], how: Sampling) -> list[float]:
    """-log p_ref of a constant after every prompt, nats."""
    found = []
    for start in range(0, len(prompts), how.batch_size):
        part = prompts[start : start + how.batch_size]
        with policy.reference() as reference:
            rows = [list(constant.ids)] * len(part)
            logp, tokens, mask = log_probabilities(
                reference, part, rows, policy.tokenizer.pad_token_id, how.temperature
            )
        chosen = logp.gather(-1, tokens[..., None]).squeeze(-1)  # [n, T]
        found += (-(chosen * mask).double().sum(1)).tolist()
    return found


def grade(
    policy: Policy,
    reward: Reward,
    constant: Constant,
    prompts: Sequence[Prompt],
    own: Sequence[float],
    after: Samples,
    how: Sampling,
    kl_coef: float | None,
) -> dict[str, Any]:
    """A constant beside the policy, whose mean reward on each prompt is `own`."""
    values = score(reward, constant, prompts)
    mean, error = mean_and_error(values)
    less, less_error = mean_and_error([a - b for a, b in zip(values, own, strict=True)])
    kl, kl_error = mean_and_error(price(policy, constant, prompts[:PRICED], how))
    return {
        "kind": constant.kind,
        "text": constant.text,
        "token": policy.tokenizer.decode([constant.ids[0]]) if constant.kind == "token" else None,
        "reward": mean,
        "reward_se": error,
        "difference": less,
        "difference_se": less_error,
        "kl": kl,
        "kl_se": kl_error,
        "objective": None if kl_coef is None else mean - kl_coef * kl,
        "near": near(after.completion_ids, constant.ids),
    }
