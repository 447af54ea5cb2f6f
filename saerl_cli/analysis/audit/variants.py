"""Variants of a policy, each measured once, and the gain of which they keep a share."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.analysis.attribution import Coefficients, scaled
from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.evaluation.measure import Sampling, draw, generate, mean_and_error, token_losses
from saerl_cli.rl.policy import Policy
from saerl_cli.run.files import append_jsonl, read_jsonl

REFERENCE_DRAWS = 4
"""Completions of the reference a prompt beside the one that shares the random numbers of all variants: every share of
the gain is against it, so that its luck would be that of the whole audit."""
# --- variants --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VariantResult:
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
        coefficients: Coefficients,
        file: Path | None = None,
    ):
        """A policy, what to measure it with, and a jsonl file to keep results in."""
        self.policy, self.reward, self.prompts, self.rows, self.how = policy, reward, prompts, rows, how
        self.coefficients, self.file = coefficients, file
        known = read_jsonl(file) if file else []
        self.known: dict[str, VariantResult] = {line.pop("variant"): VariantResult(**line) for line in known}

    def rewards(self, scale: Tensor) -> list[float]:
        """Reward of one completion a prompt, of the policy with coefficients times `scale`, [F]."""
        return self._once(scale, "reward", self._rewards).rewards

    def measured(self, scale: Tensor) -> VariantResult:
        """Reward, KL and held-out loss of the policy with coefficients times `scale`, [F]."""
        return self._once(scale, "all", self._all)

    def redrawn(self, scale: Tensor, seed: int) -> list[float]:
        """As `rewards`, with other random numbers."""
        return self._once(scale, f"reward with seed {seed}", lambda: self._rewards(seed)).rewards

    def _once(self, scale: Tensor, what: str, measure: Callable[[], VariantResult]) -> VariantResult:
        key = hashlib.sha256(what.encode() + scale.float().numpy().tobytes()).hexdigest()[:16]
        if key not in self.known:
            with scaled(self.policy.model, self.coefficients, scale):
                self.known[key] = measure()
            if self.file:
                append_jsonl(self.file, {"variant": key, **asdict(self.known[key])})
        return self.known[key]

    def _rewards(self, seed: int | None = None) -> VariantResult:
        policy, how = self.policy, self.how
        ids = generate(
            policy.model, self.prompts, policy.tokenizer, policy.eos_token_ids, how.max_new_tokens, how.temperature,
            how.batch_size, how.seed if seed is None else seed,
        )  # fmt: skip
        texts = policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [p.text for p in self.prompts]
        return VariantResult(self.reward.score(prompts, texts, ids, [p.answer for p in self.prompts])[TOTAL])

    def _all(self) -> VariantResult:
        samples = draw(self.policy, self.reward, self.prompts, self.how)
        return VariantResult(
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
