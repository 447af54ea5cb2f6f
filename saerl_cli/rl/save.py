"""A trained policy on disk."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from saerl_cli.adapter import save_adapter
from saerl_cli.models import without_weights
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.rl.build import RlhfSetup
from saerl_cli.rl.rollouts.scoring import without_critic
from saerl_cli.rl.training.base import PhasedTrainer
from saerl_cli.run import shards
from saerl_cli.run.files import atomic_folder


def save_policy(trainer: PhasedTrainer, setup: RlhfSetup) -> None:
    """Write RUN/adapter (a PEFT folder of what was trained) or RUN/model (weights and tokenizer), whole or absent."""
    model, run = trainer.accelerator.unwrap_model(trainer.model), setup.run
    if adapter_of(setup.config.adapter).whole_model:
        state = shards.on_cpu(without_critic(model.state_dict()).items(), run.writes)
        if run.writes:
            with atomic_folder(run.path / "model", replace=True) as folder:
                save_weights(model, state, folder)
                setup.loaded.tokenizer.save_pretrained(folder)
    elif run.writes:
        save_adapter(model, run.path / "adapter")


def save_weights(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write a model's folder from whole weights; a split one's own method would ask the other processes."""
    saved = model
    if shards.is_split(model):
        config = copy.deepcopy(model.config)
        del config.distributed_config
        saved = without_weights(config)
        saved.generation_config = model.generation_config
        saved._weight_conversions = model._weight_conversions  # names in the file are those of the file it came from
    saved.save_pretrained(folder, state_dict=state)
