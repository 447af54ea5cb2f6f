"""What a policy does on fresh samples, beside its reference: reward, KL, held-out loss, length, variety, attributes."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.policy import Policy
from saerl_cli.rl.rollouts.sampling import compact, left_padded, right_padded, sample, token_positions
from saerl_cli.run import shards
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup


@dataclass
class Samples:
    """Completions of a list of prompts and what was measured on them, one entry a completion."""

    prompts: list[Prompt]
    completion_ids: list[list[int]]
    """With the end token, where one came."""
    texts: list[str]
    scores: dict[str, list[float]]
    """Every part of the reward, and "reward"."""
    kl: list[float] = field(default_factory=list)
    """log pi - log pi_ref summed over the completion (k1), nats."""
    kl_exact: list[float] = field(default_factory=list)
    """KL(pi || pi_ref) of every next-token distribution along the completion, summed, nats."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]


# --- sampling and scoring --------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    eos_token_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    group: ProcessGroup = ONE_PROCESS,
) -> list[list[int]]:
    """Sample one completion a prompt, up to and including its first end token.

    The samples are a function of the arguments, and each of its own place in the list: the random state of the
    process is neither used nor moved. The processes of a group share the batches, and all get all completions.
    """
    device = model.device
    uniforms = torch.rand(
        len(prompts), max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )

    def completions(part: slice) -> list[list[int]]:
        ids, mask = left_padded([p.input_ids for p in prompts[part]], tokenizer.pad_token_id)
        settings = (max_new_tokens, eos_token_ids, temperature, uniforms[part])
        return sample(model, ids.to(device), mask.to(device), *settings)

    with compact(model), shards.whole_for_sampling(model):
        return list(chain.from_iterable(group.map_batches(len(prompts), batch_size, completions)))


def log_probabilities(
    model: Any, prompts: Sequence[Prompt], completions: Sequence[list[int]], pad: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The next-token distributions along completions.

    Returns:
        log-probabilities [n, T, vocabulary] (float32, on the model's device), the completions' token ids [n, T] and
        their mask [n, T].
    """
    ids, mask = left_padded([p.input_ids for p in prompts], pad)  # [n, P]
    tokens, kept = right_padded(completions, pad)  # [n, T]
    width = tokens.shape[1]
    device = model.device
    ids, mask = torch.cat([ids, tokens], 1).to(device), torch.cat([mask, kept], 1).to(device)
    logits = (
        model(input_ids=ids, attention_mask=mask, position_ids=token_positions(mask)).logits[:, -width - 1 : -1].float()
    )
    return (logits / temperature).log_softmax(-1), tokens.to(device), kept.to(device)


@torch.no_grad()
def sequence_kl(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    temperature: float,
    batch_size: int,
    group: ProcessGroup = ONE_PROCESS,
) -> tuple[list[float], list[float]]:
    """KL of the policy from its reference along given completions, in nats a completion.

    Returns:
        For every completion: `sum_t log pi(y_t) - log pi_ref(y_t)` (k1, an unbiased estimate when the policy wrote
        them), and `sum_t KL(pi(.|y_<t) || pi_ref(.|y_<t))` over the whole vocabulary.
    """
    pad = policy.tokenizer.pad_token_id

    def divergence(part: slice) -> Tensor:
        arguments = (prompts[part], completions[part], pad, temperature)
        logp, tokens, mask = log_probabilities(policy.model, *arguments)
        with policy.reference() as reference:
            logp_ref, _, _ = log_probabilities(reference, *arguments)
        difference = logp - logp_ref  # [n, T, vocabulary]
        chosen = difference.gather(-1, tokens[..., None]).squeeze(-1)  # [n, T]
        k1 = (chosen * mask).double().sum(1)
        exact = ((logp.exp() * difference).sum(-1) * mask).double().sum(1)
        return torch.stack([k1, exact]).cpu()  # [2, n]

    k1, exact = torch.cat(group.map_batches(len(prompts), batch_size, divergence), dim=1).tolist()
    return k1, exact


@torch.no_grad()
def heldout_loss(model: Any, rows: Tensor, batch_size: int = 16, group: ProcessGroup = ONE_PROCESS) -> float:
    """Mean negative log-likelihood of held-out text, nats per token; the ends of documents count, filling does not.

    Args:
        model: a causal language model.
        rows: [n, context] packed token ids, each row beginning with the separator of documents.
        batch_size: rows in one forward pass.
        group: the processes that share the batches; all get the same number.
    """
    separator = rows[0, 0].item()

    def nats(part: slice) -> tuple[float, int]:
        loss, text = token_losses(model, rows[part], separator)
        return loss.sum().item(), int(text.sum())

    losses, counts = zip(*group.map_batches(len(rows), batch_size, nats), strict=True)
    return sum(losses) / max(sum(counts), 1)


def token_losses(model: Any, rows: Tensor, separator: Any) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every token but the first of packed rows, float64 and 0 for filling, and what is none.

    Args:
        model: a causal language model.
        rows: [n, context] token ids.
        separator: of documents; one after another is filling.

    Returns:
        [n, context - 1] twice, on the model's device.
    """
    ids = rows.to(model.device)
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)  # [n, context - 1, vocabulary]
    text = (ids[:, :-1] != separator) | (ids[:, 1:] != separator)
    return -logp.gather(-1, ids[:, 1:, None]).squeeze(-1).double() * text, text


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn for a measurement."""

    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int
    group: ProcessGroup = ONE_PROCESS
    """The processes that share the batches. The samples are the same however many there are."""


def draw(policy: Policy, reward: Reward, prompts: Sequence[Prompt], how: Sampling, reference: bool = False) -> Samples:
    """Completions of the policy, or of its reference, with their scores; those of the policy with their KL too."""
    tokenizer = policy.tokenizer

    def completions_of(model: Any) -> list[list[int]]:
        settings = (how.max_new_tokens, how.temperature, how.batch_size, how.seed, how.group)
        return generate(model, prompts, tokenizer, policy.eos_token_ids, *settings)

    if reference:
        with policy.reference() as model:
            ids = completions_of(model)
    else:
        ids = completions_of(policy.model)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)

    def score(part: slice) -> dict[str, list[float]]:
        given = prompts[part]
        return reward.score([p.text for p in given], texts[part], ids[part], [p.answer for p in given])

    alone = how.group.world_size == 1
    parts = [score(slice(None))] if alone else how.group.map_batches(len(ids), how.batch_size, score)
    scores = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    samples = Samples(list(prompts), ids, texts, scores)
    if not reference:
        samples.kl, samples.kl_exact = sequence_kl(policy, prompts, ids, how.temperature, how.batch_size, how.group)
    return samples


def cycled(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, beginning again when there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((x - mean) ** 2 for x in values) / max(1, n - 1)
    return mean, math.sqrt(variance / n)


def describe(samples: Samples, eos_token_ids: Iterable[int], attributes: bool = False) -> dict[str, Any]:
    """Length, endings, variety and, in the planted language, the attributes of completions.

    Returns:
        length: mean tokens; ended: share with an end token; distinct_1, distinct_2: distinct over all n-grams of
        tokens; commonest: share of the completion that is written most often; token_entropy: of the distribution of
        tokens over all completions, nats; parts: mean of every part of the reward; attributes: per name,
        `per_completion` (tokens carrying it) and `share` (of all words).
    """
    ends = set(eos_token_ids)
    n = len(samples.texts)
    result: dict[str, Any] = {
        "length": sum(samples.lengths) / n,
        "ended": sum(bool(ids) and ids[-1] in ends for ids in samples.completion_ids) / n,
        "distinct_1": distinct(samples.completion_ids, 1),
        "distinct_2": distinct(samples.completion_ids, 2),
        "commonest": max(Counter(map(tuple, samples.completion_ids)).values()) / n,
        "token_entropy": token_entropy(samples.completion_ids),
        "parts": {name: sum(values) / n for name, values in samples.scores.items() if name != TOTAL},
    }
    return result | ({"attributes": attribute_shares(samples)} if attributes else {})


def distinct(rows: Iterable[Sequence[int]], n: int) -> float:
    """Distinct n-grams as a share of all."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def token_entropy(rows: Iterable[Sequence[int]]) -> float:
    """Entropy of the tokens of all rows taken together, nats."""
    counts = Counter(token for row in rows for token in row)
    total = counts.total()
    return -math.fsum(c / total * math.log(c / total) for c in counts.values())


def attribute_shares(samples: Samples) -> dict[str, dict[str, float]]:
    """How often the words of completions carry each attribute of the planted language."""
    from saerl_cli.planted.language import ATTRIBUTES, labels_of, split_words

    counts, words = dict.fromkeys(ATTRIBUTES, 0), 0
    for prompt, text in zip(samples.prompts, samples.texts, strict=True):
        before = split_words(prompt.text)
        for labels in labels_of([*before, *split_words(text)])[len(before) :]:
            words += 1
            for label in labels:
                counts[label] += 1
    n = len(samples.texts)
    return {name: {"per_completion": c / n, "share": c / max(1, words)} for name, c in counts.items()}


def measure(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], heldout: Tensor, how: Sampling, attributes: bool = False
) -> tuple[dict[str, Any], Samples, Samples]:
    """Fresh samples from policy and reference on the same prompts, and what they show.

    Args:
        policy: the policy and its reference.
        reward: scores completions.
        prompts: one completion each, from either model.
        heldout: [n, context] token ids for the language-modelling loss.
        how: sampling settings; the two models draw with the same seed.
        attributes: count the attributes of the planted language.

    Returns:
        The numbers, keys ending in _before (reference) and _after (policy); and the two sets of samples.
    """
    before = draw(policy, reward, prompts, how, reference=True)
    after = draw(policy, reward, prompts, how)
    with policy.reference() as reference:
        loss_before = heldout_loss(reference, heldout, group=how.group)
    reward_before, error_before = mean_and_error(before.scores[TOTAL])
    reward_after, error_after = mean_and_error(after.scores[TOTAL])
    kl, kl_error = mean_and_error(after.kl)
    kl_exact, kl_exact_error = mean_and_error(after.kl_exact)
    numbers: dict[str, Any] = {
        "reward_before": reward_before,
        "reward_before_se": error_before,
        "reward_after": reward_after,
        "reward_se": error_after,
        "kl": kl,
        "kl_se": kl_error,
        "kl_exact": kl_exact,
        "kl_exact_se": kl_exact_error,
        "nll_heldout_before": loss_before,
        "nll_heldout_after": heldout_loss(policy.model, heldout, group=how.group),
    }
    for name, samples in (("before", before), ("after", after)):
        described = describe(samples, policy.eos_token_ids, attributes)
        numbers |= {f"{key}_{name}": value for key, value in described.items()}
    return numbers, before, after
