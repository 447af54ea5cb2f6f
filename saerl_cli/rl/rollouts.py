"""Trainers that write completions: which prompts, with which random numbers, and what the completions scored."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import set_seed
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from saerl_cli.rl.exact import ExactTrainer, derived_seed
from saerl_cli.rl.normalise import Normaliser

Base = GRPOTrainer if TYPE_CHECKING else object
"""What the classes here are mixed into."""


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that is a function of seed and epoch, so that a resumed run sees the same prompts.

    The stock one seeds its generator once, and a resumed run would replay the order of epoch 0.
    """

    def __init__(self, stock: RepeatSampler, epoch: Callable[[], int]):
        self.__dict__.update(stock.__dict__)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(derived_seed(self.seed or 0, self.epoch()))
        yield from super().__iter__()


class RolloutTrainer(ExactTrainer, Base):
    """Mixed in before GRPOTrainer or RLOOTrainer.

    Rows of `train_dataset` hold a `prompt` and optionally its `input_ids`, which are then used as they are.

    Raises:
        ValueError: fewer prompts than a generation batch needs.
    """

    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        needed = (self.args.generation_batch_size or 0) // self.args.num_generations
        if len(self.train_dataset) < needed:  # TRL would end the run at step 0 without a word
            raise ValueError(f"there are {len(self.train_dataset)} prompts, but one phase takes {needed}")
        self.phase_start = time.perf_counter()
        self.prompt_ids: dict[str, list[int]] = {}
        self.raw_rewards = torch.zeros(0)  # of the last generation: [processes * B, parts]
        self.normaliser = Normaliser()

    # --- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        stock: Any = super()._get_train_sampler(dataset)
        return EpochSampler(stock, lambda: int(self.state.epoch or 0))

    def _tokenize_prompts(self, prompts: list) -> tuple:
        if self.prompt_ids:
            return [self.prompt_ids[prompt] for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    # --- a phase begins ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        if self.model.training:  # everything random in a phase follows from this
            self.phase_start = time.perf_counter()
            set_seed(derived_seed(self.args.seed, self.phase, self.accelerator.process_index))
            if self.restraint is not None:  # the same in every process
                self.restraint.begin_phase(derived_seed(self.args.seed, self.phase, 1_000_033))
        self.prompt_ids = {row["prompt"]: row["input_ids"] for row in inputs if "input_ids" in row}
        return super()._generate_and_score_completions(inputs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            self.raw_rewards = super()._calculate_rewards(*args, **kwargs)  # gathered: [processes * B, parts]
        except ValueError as error:
            raise ValueError(f"phase {self.phase + 1}: {error}") from error
        self.refuse_unless_finite("a reward", self.raw_rewards)
        if self.model.training:
            self.normaliser.learn(self.total_scores())
        return self.raw_rewards

    def total_scores(self) -> Tensor:
        """The weighted sum of the reward's parts, as it stands; [processes * B]."""
        return self.raw_rewards @ self.reward_weights.to(self.raw_rewards)

    def local_scores(self, size: int) -> Tensor:
        """The weighted sum of the reward's parts for this process's completions, normalised and clipped; [B]."""
        start = self.accelerator.process_index * size
        return self.normaliser(self.total_scores())[start : start + size]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def adaptive_state(self) -> dict[str, Any]:
        """And the mean and standard deviation of scores."""
        return super().adaptive_state() | {"normaliser": self.normaliser.state()}

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        super().load_adaptive_state(state)
        self.normaliser.load(state["normaliser"])
