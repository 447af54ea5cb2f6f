"""Which features caused the reward: variants of a policy, keep-only curves, controls, interactions, agreement.

A variant is the policy with each of its coefficients scaled, mostly by 0 or 1. All variants answer the same prompts
with the same random numbers, so that differences are taken prompt by prompt; standard errors are over prompts.

RUN/audit.json (`saerl audit`) holds, with `X_se` the standard error of X:

    version         1
    policy, adapter, splice, seed, prompts          what was audited, with so many prompts
    features        {total, moved}                  coefficients, and those not exactly untouched
    gain            {reward_reference (over several draws), reward, gain (`Gain.over`), kl, loss_reference, loss,
                    loss_increase, …_se}
    completeness    {attributed, attributed_se, difference, difference_se}   sum of all attributions, and minus the gain
    reverts         a list, {site, feature, delta, attribution, attribution_se, share, effect, reward, kl, loss: change
                    when the feature is reverted, with _se; fires_on, attribute, f1, kind}
    curves          {keep, remove, keep_by_effect, keep_random, keep_matched: a list of {n, gain, share, share_se}}:
                    what is left of the gain; keep the first n, remove the first n, ...; controls also have `spread`,
                    the standard deviation over draws, matched ones `effect_ratio`, their effect over that of the kept
    needed          {"50", "90", "99": {n, low, high, without, random, matched, matched_effect} or null}: the fewest
                    first features, of those numbers tried, that carry so many per cent of the gain; the same for the
                    ends of 95 % intervals (high may be null); the share left without them, and with as many control
                    features (matched_effect: their effect over that of the first)
    pairs           a list, {first, second, joint: change when both are reverted, interaction: minus the sum of the two
                    alone; kept_joint, kept_interaction: the same when they are all that is kept, against the reference}
    peers           a list, {policy, seed, delta: Spearman correlation over all features; sites: {SITE: {delta, top: k,
                    top_overlap, top_expected: of the k largest |delta|}}; where the peer has been audited too,
                    attribution: Spearman correlation, attribution_top: overlap of the 100 largest}
    side_effects    {full, needed_90: {gain, kl, loss_increase, kl_per_gain, loss_per_gain, length, distinct_2: changes;
                    with a planted model attributes: {name: change of its share of all words}, rewarded_change, ratio:
                    summed |change| of other attributes over that of the rewarded, ratio_by_chance: with the reference
                    sampled twice}}
    shares          {by_kind, by_place, by_direction, by_role, by_attribute: {name: {features, attribution, share,
                    effect_share}}}: summed attribution; by the tokens features fire on, whether on or before rewarded
                    tokens, whether they write towards or away from them, and by the attribute they detect
    attributions    {SITE: [attribution of every feature]}, to four digits

The unit of rewards is that of the reward; KL is in nats a completion, loss in nats a token.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.analysis.attribution import Moved, scaled
from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.evaluation.measure import Sampling, draw, generate, mean_and_error, token_losses
from saerl_cli.rl.policy import Policy
from saerl_cli.run.files import append_jsonl, read_jsonl

VERSION = 1
REFERENCE_DRAWS = 4
"""Completions of the reference a prompt beside the one that shares the random numbers of all variants: every share of
the gain is against it, so that its luck would be that of the whole audit."""
SHARES = (0.5, 0.9, 0.99)
"""Shares of the gain whose number of features is asked for."""

# --- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A variant on every prompt."""

    rewards: list[float]
    kl: list[float] | None = None
    """Exact KL from the reference along the variant's own completions, nats."""
    losses: list[float] | None = None
    """Loss of every row of held-out text, summed over its tokens, nats."""
    completion_ids: list[list[int]] | None = None
    """What it wrote."""


class Variants:
    """Measures variants of a policy, each once: what a file holds already is not measured again."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        prompts: Sequence[Prompt],
        rows: Tensor,
        how: Sampling,
        coefficients: Moved,
        file: Path | None = None,
    ):
        """A policy, what to measure it with, and a jsonl file to keep results in."""
        self.policy, self.reward, self.prompts, self.rows, self.how = policy, reward, prompts, rows, how
        self.coefficients, self.file = coefficients, file
        known = read_jsonl(file) if file else []
        self.known: dict[str, Measured] = {line.pop("variant"): Measured(**line) for line in known}

    def rewards(self, scale: Tensor) -> list[float]:
        """Reward of one completion a prompt, of the policy with coefficients times `scale`, [F]."""
        return self._once(scale, "reward", self._rewards).rewards

    def measured(self, scale: Tensor) -> Measured:
        """Reward, KL and held-out loss of the policy with coefficients times `scale`, [F]."""
        return self._once(scale, "all", self._all)

    def redrawn(self, scale: Tensor, seed: int) -> list[float]:
        """As `rewards`, with other random numbers."""
        return self._once(scale, f"reward with seed {seed}", lambda: self._rewards(seed)).rewards

    def _once(self, scale: Tensor, what: str, measure: Callable[[], Measured]) -> Measured:
        key = hashlib.sha256(what.encode() + scale.float().numpy().tobytes()).hexdigest()[:16]
        if key not in self.known:
            with scaled(self.policy.model, self.coefficients, scale):
                self.known[key] = measure()
            if self.file:
                append_jsonl(self.file, {"variant": key, **asdict(self.known[key])})
        return self.known[key]

    def _rewards(self, seed: int | None = None) -> Measured:
        policy, how = self.policy, self.how
        ids = generate(
            policy.model, self.prompts, policy.tokenizer, policy.eos_token_ids, how.max_new_tokens, how.temperature,
            how.batch_size, how.seed if seed is None else seed,
        )  # fmt: skip
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [p.text for p in self.prompts]
        return Measured(self.reward.score(prompts, texts, ids, [p.answer for p in self.prompts])[TOTAL])

    def _all(self) -> Measured:
        samples = draw(self.policy, self.reward, self.prompts, self.how)
        return Measured(
            samples.scores[TOTAL], samples.kl_exact, row_losses(self.policy.model, self.rows), samples.completion_ids
        )


@torch.no_grad()
def row_losses(model: Any, rows: Tensor, batch_size: int = 16) -> list[float]:
    """Summed loss of every row of packed held-out text, nats."""
    return [
        loss for part in rows.split(batch_size) for loss in token_losses(model, part, rows[0, 0])[0].sum(1).tolist()
    ]


# --- means of differences --------------------------------------------------------------------------------------------


def difference(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Mean of x - y, paired, and its standard error."""
    return mean_and_error([a - b for a, b in zip(x, y, strict=True)])


def ratio(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Mean of x divided by the mean of y, paired, and its standard error (delta method); 0 over 0 is 0."""
    top, bottom = math.fsum(x) / len(x), math.fsum(y) / len(y)
    if bottom == 0:
        return 0.0, 0.0
    share = top / bottom
    _, error = mean_and_error([a - share * b for a, b in zip(x, y, strict=True)])
    return share, error / abs(bottom)


def interaction(neither: Sequence[float], i: Sequence[float], j: Sequence[float], both: Sequence[float]) -> list[float]:
    """Prompt by prompt, the change by reverting both features minus the sum of the changes by reverting each."""
    return [(b - n) - (x - n) - (y - n) for n, x, y, b in zip(neither, i, j, both, strict=True)]


# --- curves ----------------------------------------------------------------------------------------------------------


def grid(total: int) -> list[int]:
    """Numbers of features at which a curve is measured: two a doubling, from 1 to all."""
    steps = {round(2 ** (k / 2)) for k in range(2 * max(1, total).bit_length())}
    return sorted({n for n in steps if n < total} | {total})


def coarse_grid(total: int) -> list[int]:
    """Numbers of features at which controls are measured: powers of 8 below all."""
    return [8**k for k in range(1, total.bit_length()) if 8**k < total]


def only(order: Sequence[int], n: int, total: int) -> Tensor:
    """The scale that keeps the first n of an order, [total]."""
    scale = torch.zeros(total)
    scale[list(order[:n])] = 1.0
    return scale


@dataclass(frozen=True)
class Gain:
    """The gain of the policy over its reference, prompt by prompt, of which variants keep a share."""

    reference: list[float]
    """Rewards of the reference with the random numbers of all variants."""
    policy: list[float]
    expected: list[float]
    """Mean reward of the reference on each prompt, over several draws, that one included."""

    @property
    def full(self) -> list[float]:
        """Prompt by prompt."""
        return self.over(self.policy)

    def over(self, rewards: Sequence[float]) -> list[float]:
        """Prompt by prompt, the gain of a variant over the reference: x - m - b (r - m).

        The luck of the reference's own draw, r - m with mean 0, is a control variate with b = Cov(x - m, r - m) /
        Var(r - m): a variant near the reference shares that luck (b = 1), one far from it does not (b = 0). Plain
        differences x - r would charge every variant with the luck of one and the same draw.
        """
        luck = [r - m for r, m in zip(self.reference, self.expected, strict=True)]
        plain = [x - m for x, m in zip(rewards, self.expected, strict=True)]
        n = len(luck)
        centre, middle = math.fsum(luck) / n, math.fsum(plain) / n
        spread = math.fsum((e - centre) ** 2 for e in luck)
        together = math.fsum((e - centre) * (y - middle) for e, y in zip(luck, plain, strict=True))
        b = together / spread if spread else 0.0
        return [y - b * e for y, e in zip(plain, luck, strict=True)]

    def kept(self, rewards: Sequence[float]) -> dict[str, float]:
        """Gain of a variant over the reference, and as a share of the policy's."""
        own = self.over(rewards)
        gain, gain_se = mean_and_error(own)
        share, share_se = ratio(own, self.full)
        return {"gain": gain, "gain_se": gain_se, "share": share, "share_se": share_se}


def curve(
    variants: Variants, gain: Gain, order: Sequence[int], numbers: Iterable[int], keep: bool = True
) -> list[dict]:
    """What is left of the gain when only the first n of an order are kept; with `keep` off, when they are removed."""
    total = len(order)
    points = []
    for n in numbers:
        scale = only(order, n, total)
        points.append({"n": n, **gain.kept(variants.rewards(scale if keep else 1 - scale))})
    return points


def control(
    variants: Variants, gain: Gain, choose: Callable[[int, int], list[int] | None], numbers: Iterable[int], draws: int
) -> list[dict]:
    """What is left of the gain when n features of a control are kept: mean over draws.

    Args:
        variants: measures.
        gain: of the policy.
        choose: (n, draw) -> the features kept; None where there are not enough.
        numbers: each n.
        draws: sets drawn for each n.
    """
    points, total = [], len(variants.coefficients)
    for n in numbers:
        sets = [kept for number in range(draws) if (kept := choose(n, number)) is not None]
        if not sets:
            continue
        rewards = [variants.rewards(only(kept, n, total)) for kept in sets]
        points.append({"n": n, **averaged(gain, rewards)})
    return points


def averaged(gain: Gain, rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """Gain and share of the mean over draws; errors are those over prompts and over draws together."""
    each = [gain.kept(row) for row in rewards]
    point = gain.kept([math.fsum(column) / len(column) for column in zip(*rewards, strict=True)])
    for key in ("gain", "share"):
        _, error = mean_and_error([entry[key] for entry in each])
        point[f"{key}_se"] = math.hypot(point[f"{key}_se"], error)
    _, error = mean_and_error([entry["share"] for entry in each])
    return point | {"spread": error * math.sqrt(len(each))}


def needed(points: Sequence[dict], share: float) -> dict[str, Any] | None:
    """The fewest features of a keep-only curve that carry a share of the gain; None where none does.

    Returns:
        n; low and high: the same for the upper and lower end of each point's 95 % interval (high may be None).
    """

    def first(shift: float) -> int | None:
        return next((p["n"] for p in points if p["share"] + shift * p["share_se"] >= share), None)

    n = first(0.0)
    return None if n is None else {"n": n, "low": first(1.96), "high": first(-1.96)}


# --- controls --------------------------------------------------------------------------------------------------------


def random_order(total: int, seed: int) -> list[int]:
    """All features in random order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


def matched(size: Sequence[float], kept: Sequence[int], seed: int, near: int = 5) -> list[int] | None:
    """As many features outside a set as it has, of like size: for each one at random of the `near` closest left.

    Args:
        size: of every feature, >= 0; compared on a logarithmic scale.
        kept: the set.
        seed: of the draw.
        near: candidates for each.

    Returns:
        None where there are fewer features outside than inside.
    """
    from bisect import bisect_left
    from random import Random

    inside, random = set(kept), Random(seed)
    left = sorted((math.log(size[i] + 1e-12), i) for i in range(len(size)) if i not in inside)
    if len(left) < len(kept):
        return None
    found = []
    for i in kept:
        wanted = math.log(size[i] + 1e-12)
        at = bisect_left(left, (wanted, -1))
        window = range(max(0, at - near), min(len(left), at + near))
        closest = sorted(window, key=lambda place: (abs(left[place][0] - wanted), place))[:near]
        found.append(left.pop(closest[random.randrange(len(closest))])[1])
    return found


# --- agreement between runs ------------------------------------------------------------------------------------------


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values their mean rank: [n] -> [n], float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)  # sorted
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Rank correlation of two vectors; None where one of them is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = float((a.norm() * b.norm()).item())
    return float((a @ b).item()) / scale if scale > 0 else None


def top_overlap(x: Tensor, y: Tensor, k: int) -> float:
    """Share of the k features with the largest |x| that are among the k with the largest |y|."""
    first, second = (set(v.abs().topk(min(k, len(v))).indices.tolist()) for v in (x, y))
    return len(first & second) / max(1, len(first))


# --- sums of attributions --------------------------------------------------------------------------------------------


def sums_by(names: Sequence[str], attributions: Tensor, effect: Tensor) -> dict[str, dict[str, float]]:
    """Summed attribution of the features of each name, and its share of all; errors over prompts.

    Args:
        names: of every feature.
        attributions: [prompts, F].
        effect: [F], of which `effect_share` is the share: what chance would give.
    """
    whole = attributions.double().sum(1).tolist()
    found = {}
    for name in dict.fromkeys(sorted(names)):
        here = torch.tensor([i for i, other in enumerate(names) if other == name])
        part = attributions[:, here].double().sum(1).tolist()
        total, total_se = mean_and_error(part)
        share, share_se = ratio(part, whole)
        found[name] = {"features": len(here), "attribution": total, "attribution_se": total_se}
        found[name] |= {"share": share, "share_se": share_se}
        found[name]["effect_share"] = float(effect[here].double().sum() / effect.double().sum().clamp_min(1e-30))
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["attribution"]))
