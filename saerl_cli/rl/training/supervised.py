"""Trainers on given sequences: TRL's own SFT and DPO, in phases and exact."""

import copy
import math
import time
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler
from transformers import set_seed
from trl.trainer.dpo_trainer import DPOTrainer as TRLDPOTrainer
from trl.trainer.sft_trainer import SFTTrainer as TRLSFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from saerl_cli.rl.training.base import EpochOrder, PhasedTrainer
from saerl_cli.run.seeds import derived_seed


class SupervisedTrainer(PhasedTrainer):
    """Mixed in before SFTTrainer or DPOTrainer. Rows of `train_dataset` are tokens already.

    Raises:
        ValueError: fewer rows than an optimiser step takes.
    """

    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        disable_dropout_in_model(self.model)
        self.begun = False  # whether the phase has
        if len(self.train_dataset) < self.rows_of_a_step:
            raise ValueError(
                f"there are {len(self.train_dataset)} sequences or pairs, but one optimiser step takes"
                f" {self.rows_of_a_step}; lower algo.batch_size or give more text"
            )

    @property
    def rows_of_a_step(self) -> int:
        """Sequences or pairs of an optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def order(self) -> Sampler:
        """Every row once an epoch, without those that fill no whole optimiser step."""
        rows, seed = len(self.train_dataset), self.args.seed
        return EpochOrder(rows, self.rows_of_a_step, seed, lambda: int(self.state.epoch or 0))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Learn from a micro-batch; the first of a phase seeds everything random in it."""
        if not self.begun:
            self.begun, self.phase_start = True, time.perf_counter()
            set_seed(derived_seed(self.args.seed, self.phase, self.accelerator.process_index))
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss, which must be finite."""
        loss: Any = super().compute_loss(*args, **kwargs)
        return self.checked(loss)

    def phase_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """Give the means over the phase, TRL's own among them."""
        self.begun = False
        own = {name: math.fsum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        own.pop("num_tokens", None)  # of this sitting alone
        metrics = super().phase_metrics(logs)
        samples = self.rows_of_a_step * self.args.steps_per_phase
        return {"loss": logs["loss"], **own, **metrics, "samples_per_second": samples / metrics["seconds"]}

    def geometry(self) -> dict[str, Any]:
        """And the rows of an optimiser step."""
        return super().geometry() | {"batch_size": self.rows_of_a_step, "rows": len(self.train_dataset)}


class SFTTrainer(SupervisedTrainer, TRLSFTTrainer):
    """Maximum likelihood.

    Args:
        args, kwargs: as for TRL's.
        frozen: of `adapter=full` the reference that the policy is measured against; by default a copy.
    """

    def __init__(self, *args: Any, frozen: Any = None, **kwargs: Any):
        if frozen is None and not kwargs.get("peft_config"):
            frozen = copy.deepcopy(kwargs["model"]).requires_grad_(False).eval()
        super().__init__(*args, **kwargs)
        self.ref_model = frozen


class DPOTrainer(SupervisedTrainer, TRLDPOTrainer):
    """Direct preference optimisation; the reference is the adapter off, or a frozen copy for `adapter=full`."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Take rows as they are: tokens already, each side following its prompt as a completion would."""
        return dataset
