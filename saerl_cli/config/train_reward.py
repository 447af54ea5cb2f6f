"""Settings of `saerl train-reward`."""

from dataclasses import dataclass, field
from enum import Enum

from saerl_cli.config.groups import LaunchConfig, ModelConfig, refuse_unless
from saerl_cli.config.pairs import PairsConfig
from saerl_cli.config.settings import check_settings, setting


class TooLong(Enum):
    """What becomes of a pair that does not fit."""

    cut = "cut"
    """The prompt is cut from the left; a pair whose reply alone does not fit is left out."""
    drop = "drop"
    """The pair is left out."""


@dataclass
class TrainRewardConfig:
    """Train a reward model on preference pairs; RUN/model serves as `reward=hf reward.parts.model.path=RUN/model`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model it starts from; it gets a new score head."""
    pairs: PairsConfig = field(default_factory=PairsConfig)
    """What it learns from."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""
    epochs: int = setting(1, ">= 1")
    """Passes over the training pairs."""
    batch_size: int = setting(16, ">= 1")
    """Pairs an optimiser step, over all processes."""
    micro_batch: int | None = None
    """Pairs a process has in one forward and backward pass; all of its share when empty."""
    lr: float = setting(1e-4, "> 0")
    """Peak learning rate of AdamW; falls linearly to 0."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    center: float = setting(0.01, ">= 0")
    """Weight of the squared sum of the two scores, which keeps scores near 0 (arXiv 2312.09244, eq. 2); 0 is off."""
    max_length: int | None = setting(None, ">= 2")
    """Tokens of prompt, reply and end token; the model's context when empty."""
    too_long: TooLong = TooLong.cut
    """What becomes of longer pairs; how many is in summary.json."""
    checkpoint_every: int = setting(100, ">= 1")
    """Optimiser steps between two checkpoints."""
    seed: int = 0
    """Seed of the score head and of the order of pairs."""

    def __post_init__(self) -> None:
        refuse_unless(
            self.launch.shards == 1,
            "train-reward works on whole models; write launch.sharding=none, for instance launch=gpu",
        )
        check_settings(self)
        processes = self.launch.num_processes
        refuse_unless(
            self.batch_size % processes == 0,
            f"batch_size={self.batch_size} must be a multiple of launch.num_processes={processes}",
        )
        share = self.batch_size // processes
        refuse_unless(
            share % (self.micro_batch or share) == 0, f"micro_batch={self.micro_batch} must divide {share} pairs"
        )
