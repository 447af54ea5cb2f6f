"""A rollout as tensors: prompts, completions and what is known of them."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from saerl_cli.rl.rollouts.prefix import Recorded


@dataclass
class Sequences:
    """Prompts with their completions."""

    prompt_ids: Tensor
    """[B, P], padded on the left."""
    prompt_mask: Tensor
    """[B, P]."""
    completion_ids: Tensor
    """[B, T], padded on the right."""
    mask: Tensor
    """[B, T], 1 on tokens of the completion."""

    def rows(self, rows: Tensor) -> Self:
        """Select some rows."""
        return type(self)(**{name: kept[rows] for name, kept in vars(self).items()})

    def joined(self) -> tuple[Tensor, Tensor]:
        """Give token ids and mask of prompt and completion together, both [B, P + T]."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.mask], 1)


@dataclass
class Rollout(Sequences):
    """And what they teach."""

    logp: Tensor
    """[B, T], log-probabilities under the policy that sampled, nats."""
    logp_ref: Tensor
    """[B, T], under the reference."""
    values: Tensor
    """[B, T], of the state before each token; 0 without a critic."""
    advantages: Tensor
    """[B, T], or [B, 1] where all tokens of a completion have the same."""
    returns: Tensor
    """[B, T], what values are to become."""


@dataclass
class MicroBatch:
    """Rows of a rollout that are scored, and learned from, together."""

    rollout: Rollout
    frozen: Recorded
    """Outputs of what training leaves alone, recorded when the rows were first scored."""


@dataclass
class Scores:
    """What a model's pass over sequences says of their completions."""

    logp: Tensor
    """[B, T], nats."""
    entropy: Any
    """[B, T], of the distribution each token was drawn from, nats; None of the frozen copy of adapter=full."""
    values: Any
    """[B, T], of the state before each token; None without a critic."""
