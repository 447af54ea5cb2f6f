"""What is done to a reward before an algorithm sees it: a gain and a bias, and a clip. Reports stay raw."""

import math
from typing import Any

from torch import Tensor

from saerl_cli.config.reward import Normalise


class Normaliser:
    """Scores less a mean, divided by a standard deviation, then clipped.

    Args:
        kind: where mean and standard deviation come from: 0 and 1 (none), `calibrate`, or all scores seen so far.
        clip: largest absolute value; None leaves scores as they are.
    """

    def __init__(self, kind: Normalise = Normalise.none, clip: float | None = None):
        self.kind, self.clip = kind, clip
        self.mean, self.std = 0.0, 1.0
        self.count, self.squares = 0, 0.0  # running: scores seen, sum of their squared distances from the mean
        self.metrics: dict[str, float] = {}

    def calibrate(self, mean: float, std: float) -> None:
        """Fix the mean and standard deviation, measured on completions of the untouched model."""
        self.mean, self.std = mean, std

    def learn(self, scores: Tensor) -> None:
        """Take the scores of a phase into the running mean and standard deviation (Chan et al. 1979); [n]."""
        if self.kind is not Normalise.running:
            return
        new, n = scores.double(), len(scores)
        mean = new.mean().item()
        total, apart = self.count + n, mean - self.mean
        self.squares += (new - mean).square().sum().item() + apart * apart * self.count * n / total
        self.mean, self.count = self.mean + apart * n / total, total
        self.std = math.sqrt(self.squares / total) or 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """The scores as the algorithm gets them, [n]; `metrics` then says how they look."""
        if self.kind is Normalise.none and self.clip is None:
            return scores
        changed = ((scores.double() - self.mean) / self.std).to(scores)
        self.metrics = {"reward_normalised": changed.mean().item()}
        if self.clip is not None:
            self.metrics["reward_clipped"] = (changed.abs() > self.clip).double().mean().item()
            changed = changed.clamp(-self.clip, self.clip)
        return changed

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {"mean": self.mean, "std": self.std, "count": self.count, "squares": self.squares}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.mean, self.std = state["mean"], state["std"]
        self.count, self.squares = state["count"], state["squares"]
