"""What a restart between two phases needs, as JSON and safetensors.

CHECKPOINT/
  weights.safetensors     every trainable parameter: the policy's and the value head's
  optimizer.safetensors   AdamW's moments
  state.json              optimiser and scheduler settings, adaptive KL coefficient, time spent, geometry of a phase
  trainer_state.json      the Trainer's own counters

No random state is stored: a phase seeds every generator from the run's seed, its own number and the process's rank.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saerl_cli.run import shards

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class Contents:
    """What a checkpoint holds."""

    weights: dict[str, Tensor]
    """Trained parameters by name."""
    moments: dict[str, Tensor]
    """The optimiser's, by number of the parameter and name."""
    state: dict[str, Any]
    """Plain numbers, strings, lists and dictionaries."""


def contents(
    parameters: Iterable[tuple[str, Tensor]], optimizer: Any, state: dict[str, Any], wanted: bool = True
) -> Contents:
    """Gather what a checkpoint holds; every process must ask, as parameters may be split over them.

    Args:
        parameters: trainable ones by name.
        optimizer: a torch optimiser, or Accelerate's wrapper of one.
        state: what else belongs to it.
        wanted: whether this process writes it; the others get no tensors.
    """
    saved = optimizer.state_dict()
    moments = ((f"{i}.{key}", tensor) for i, entry in saved["state"].items() for key, tensor in entry.items())
    weights = shards.on_cpu(parameters, wanted)
    return Contents(weights, shards.on_cpu(moments, wanted), state | {"param_groups": saved["param_groups"]})


def save(folder: Path, found: Contents) -> None:
    """Write a checkpoint into an existing folder, which the caller has made aside and renames."""
    save_file(found.weights, folder / WEIGHTS)
    save_file(found.moments, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(found.state, allow_nan=False, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `save` was given."""
    return json.loads((folder / STATE).read_text())


def load_weights(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the saved values into the trainable parameters.

    Raises:
        ValueError: other names or shapes than those trained now, or values that are not finite.
    """
    copy_values(f"the checkpoint {folder}", load_file(folder / WEIGHTS), dict(parameters))


def copy_values(source: str, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Copy saved values into parameters.

    Args:
        source: what messages call the file.
        saved: values by name.
        wanted: the parameters by name.

    Raises:
        ValueError: the names or shapes are not the same, or a value is not finite; nothing is copied then.
    """
    if saved.keys() != wanted.keys():
        differing = sorted(saved.keys() ^ wanted.keys())[0]
        raise ValueError(f"{source} belongs to another run: {differing} is not in both")
    for name, parameter in wanted.items():
        if saved[name].shape != parameter.shape:
            raise ValueError(
                f"{source} belongs to another run: {name} has shape {list(saved[name].shape)} there,"
                f" {list(parameter.shape)} here"
            )
        if not torch.isfinite(saved[name]).all():
            raise ValueError(f"{source} is unusable: {name} is not finite")
    for name, parameter in wanted.items():
        parameter.data.copy_(shards.split_as(saved[name], parameter))


def load_optimizer(folder: Path, optimizer: Any) -> None:
    """Restore the optimiser's moments and settings."""
    state = shards.optimizer_state(load_file(folder / OPTIMIZER), optimizer)
    optimizer.load_state_dict({"state": state, "param_groups": read_state(folder)["param_groups"]})
