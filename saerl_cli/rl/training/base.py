"""What every trainer here shares: it works in phases, its numbers are finite, its checkpoints resume to the bit.

The private names of TRL and transformers that it overrides or reads are held by `tests/test_rl_seams.py`.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from saerl_cli.adapter.coefficients.sparsity import Sparsity
from saerl_cli.rl.rollouts.scoring import is_value_parameter
from saerl_cli.rl.training import checkpoint
from saerl_cli.run import shards
from saerl_cli.run.files import atomic_folder
from saerl_cli.run.seeds import derived_seed

# TRL 1.16 uses names that transformers 5.23 renames
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_(en|dis)able)?` is deprecated")

Base = Trainer if TYPE_CHECKING else object
"""What `PhasedTrainer` is mixed into."""


class Diverged(ValueError):
    """A loss, reward or parameter that is not finite; the message names the phase."""


class EpochOrder(Sampler[int]):
    """A permutation that is a function of seed and epoch, so that a resumed run sees the same rows.

    Args:
        rows: of the data set.
        batch: rows that are taken together; what fills no whole batch is left out.
        seed: of the run.
        epoch: gives the current one.
        group: how often each row of a batch stands in it, one after the other.
        repeats: how often a batch is taken.
    """

    def __init__(self, rows: int, batch: int, seed: int, epoch: Callable[[], int], group: int = 1, repeats: int = 1):
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, epoch
        self.group, self.repeats = group, repeats

    def __len__(self) -> int:
        return self.rows // self.batch * self.batch * self.group * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch()))
        order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows - self.batch + 1, self.batch):
            for _ in range(self.repeats):
                for row in order[start : start + self.batch]:
                    yield from [row] * self.group


class PhasedTrainer(Base):
    """Mixed in before a trainer of TRL.

    Args:
        args, kwargs: of that trainer.
        on_phase: called after every phase with its statistics, before a checkpoint is written.
        open_checkpoint: gives the folder to fill for an optimiser step and makes it appear whole or not at all; by
            default `output_dir/checkpoint-N`.

    Raises:
        Diverged: a reward, loss, gradient or parameter is not finite (during `train`).
    """

    args: Any
    model: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    ref_model: Any
    is_distributed_loading_by_transformers: bool
    _metrics: Any

    def __init__(
        self,
        *args: Any,
        on_phase: Callable[[dict[str, float]], None] | None = None,
        open_checkpoint: Callable[[int], AbstractContextManager[Path]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        config = getattr(self.model, "peft_config", {}).get("default")
        if getattr(config, "splice", None) == "reconstruct":  # delta = 0 is then not the model without adapter
            self.model.add_adapter("ref", config)
            self.model.set_adapter("default")
        self.on_phase = on_phase or (lambda metrics: None)
        self.open_checkpoint = open_checkpoint or (
            lambda step: atomic_folder(Path(self.args.output_dir or ".") / f"checkpoint-{step}", replace=True)
        )
        self.seconds = 0.0  # spent in phases, over all sittings
        self.sparsity: Sparsity | None = None  # of an adapter of coefficients
        self.phase_start = time.perf_counter()
        self.grad_norms: list[list[float]] = []  # of every optimiser step of the phase: the policy's, the critic's

    # --- data, and where the run stands -----------------------------------------------------------------------------

    @property
    def phase(self) -> int:
        """Phases completed."""
        return self.state.global_step // self.args.steps_per_phase

    @property
    def order(self) -> Sampler:
        """In which order rows of the data set are taken."""
        raise NotImplementedError("a trainer says in which order it takes its rows")

    @property
    def rows_at_once(self) -> int:
        """Rows that a process takes at a time."""
        return self.args.per_device_train_batch_size

    def get_train_dataloader(self) -> DataLoader:
        """Load `rows_at_once` rows a process at a time, in `order`."""
        rows: Any = self.train_dataset
        loader = DataLoader(rows, self.rows_at_once, sampler=self.order, collate_fn=self.data_collator, drop_last=True)
        return self.accelerator.prepare(loader)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training moves: the policy's and the value head's."""
        model = self.accelerator.unwrap_model(self.model)
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def refuse_unless_finite(self, what: str, *tensors: Tensor, ended: bool = False) -> None:
        """Stop the run when a number is NaN or infinite, naming the phase, which may just have `ended`."""
        if not all(bool(torch.isfinite(shards.own(tensor)).all()) for tensor in tensors):
            raise Diverged(
                f"phase {self.phase + (not ended)} (optimiser step {self.state.global_step}): {what} is not finite;"
                " lower the learning rate or look at the reward, the last checkpoint is kept"
            )

    # --- an optimiser step --------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with one group for the policy and, where there is one, one for the critic."""
        if self.optimizer is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            policy = [p for n, p in named if not is_value_parameter(n)]
            critic = [p for n, p in named if is_value_parameter(n)]
            groups = [{"params": policy, "weight_decay": self.args.weight_decay}]
            if critic:
                groups.append({"params": critic, "lr": self.args.value_learning_rate, "weight_decay": 0.0})
            self.optimizer = kind(groups, **options)
            if self.sparsity is not None:
                self.optimizer.register_step_post_hook(self.restrain)
        return self.optimizer

    def restrain(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called by the optimiser after each of its steps."""
        assert self.sparsity is not None
        if all(p.grad is None for p in optimizer.param_groups[0]["params"]):  # an update that leaves the policy out
            return
        self.sparsity.after_step(optimizer.param_groups[0]["lr"], (self.state.global_step + 1) / self.args.max_steps)

    def checked(self, loss: Tensor) -> Tensor:
        """Add the penalty on open gates, once an optimiser step, to a loss, which must be finite."""
        self.refuse_unless_finite("the loss", loss.detach())
        penalty = self.sparsity.penalty() if self.sparsity is not None and self.model.training else None
        if penalty is None:
            return loss
        return loss + (penalty / self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else penalty)

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Of a model that is split over processes: what each trains whole, adapter and critic, is the same in all."""
        for parameter in self.replicated():
            distributed.broadcast(parameter.data, 0)

    def replicated(self) -> list[nn.Parameter]:
        """The trained parameters that DDP would look after; it is not used for a model that is split."""
        split = self.is_distributed_loading_by_transformers
        return [p for _, p in self.trainable() if not shards.is_part(p)] if split else []

    def average_gradients(self) -> None:
        """Their gradients' mean over all processes, as DDP takes it."""
        gradients = [p.grad for p in self.replicated() if p.grad is not None]
        if gradients:
            mean = nn.utils.parameters_to_vector(gradients) / distributed.get_world_size()
            distributed.all_reduce(mean)
            nn.utils.vector_to_parameters(mean, gradients)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip each group by its own norm: a joint one would let the critic's gradient shrink the policy's step."""
        self.average_gradients()
        self.accelerator.unscale_gradients()
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [shards.clip(group, self.args.max_grad_norm) for group in groups]
        if self.accelerator.scaler is None:  # fp16 scaling skips steps with infinite gradients by itself
            self.refuse_unless_finite("a gradient", *norms)
        self.grad_norms.append([norm.item() for norm in norms])
        return norms[0]

    # --- a phase ends -------------------------------------------------------------------------------------------------

    def phase_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """The statistics of the phase that just ended.

        Args:
            logs: the Trainer's own: loss and learning rate.
        """
        seconds = time.perf_counter() - self.phase_start
        self.seconds += seconds
        norms = np.array(self.grad_norms or [[0.0]]).mean(0).tolist()
        names = ("grad_norm", "grad_norm_value")
        return {
            "phase": self.phase,
            **dict(zip(names, norms, strict=False)),
            "updates": len(self.grad_norms),
            "lr": logs["learning_rate"],
            "seconds": seconds,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """End of a phase: gather its statistics, call `on_phase`."""
        if self.model.training and "grad_norm" in logs:
            metrics = self.phase_metrics(logs)
            self.refuse_unless_finite("a trained parameter", *(p.detach() for _, p in self.trainable()), ended=True)
            self.grad_norms = []
            self._metrics["train"].clear()  # TRL's own, of which ours are a superset
            logs = {**logs, **metrics}
            self.on_phase(metrics)
        super().log(logs, start_time)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def geometry(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "steps_per_phase": args.steps_per_phase,
            "max_steps": args.max_steps,
            "seed": args.seed,
        }

    def adaptive_state(self) -> dict[str, Any]:
        """Plain data beside parameters and optimiser that the rest of the run depends on, or reports."""
        return {"seconds": self.seconds}

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        self.seconds = state["seconds"]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = {
            "adaptive": self.adaptive_state(),
            "geometry": self.geometry(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        found = checkpoint.contents(self.trainable(), self.optimizer, state, self.args.should_save)
        if self.args.should_save:
            with self.open_checkpoint(self.state.global_step) as folder:
                checkpoint.save(folder, found)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, now = checkpoint.read_state(folder)["geometry"], self.geometry()
        for name, value in now.items():
            if saved[name] != value:
                raise ValueError(f"the checkpoint {folder} was made with {name}={saved[name]}, this run has {value}")
        checkpoint.load_weights(folder, self.trainable())

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        state = checkpoint.read_state(folder)
        checkpoint.load_optimizer(folder, self.optimizer)
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.load_adaptive_state(state["adaptive"])

    def load_finished(self, folder: Path) -> None:
        """Take over the checkpoint of a run that has nothing left to train."""
        self._load_from_checkpoint(str(folder))
        state = checkpoint.read_state(folder)
        self.load_adaptive_state(state["adaptive"])
        self.state.global_step = self.args.max_steps

    def _send_telemetry(self) -> None:
        """TRL reports which trainers are used; this one does not."""
