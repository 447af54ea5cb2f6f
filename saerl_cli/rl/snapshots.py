"""The policy along the way of a run: RUN/policies/step-N.safetensors, the policy's trainable parameters alone.

Neither value head nor optimiser: a snapshot is measured, not resumed. Step 0 is the base model, the last step is
RUN/adapter or RUN/model.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.rl.runs import snapshot_files
from saerl_cli.run import shards
from saerl_cli.run.files import write_safetensors

ADAPTER_SNAPSHOTS = 8
"""Kept where nothing is asked for and only an adapter is trained."""


def phases_kept(config: RlhfConfig) -> set[int]:
    """Phases after which the policy is kept, evenly between the first and the last; neither 0 nor the last."""
    count, phases = config.snapshots, config.algo.phases
    if count is None:
        count = 0 if adapter_of(config.adapter).whole_model else ADAPTER_SNAPSHOTS
    return {i * phases // (count + 1) for i in range(1, count + 1)} - {0, phases}


def save(run_path: Path, step: int, parameters: Iterable[tuple[str, Tensor]], writes: bool = True) -> None:
    """Write a snapshot, whole or not at all; every process must ask, as parameters may be split over them.

    Args:
        run_path: the run directory.
        step: optimiser steps so far.
        parameters: the trainable ones by name; a value head's are left out.
        writes: whether this process writes it.
    """
    from saerl_cli.rl.rollouts.scoring import is_value_parameter

    values = shards.on_cpu(((name, p) for name, p in parameters if not is_value_parameter(name)), writes)
    if not writes:
        return
    file = run_path / "policies" / f"step-{step}.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_safetensors(file, values, {"format": "pt"})


def drop_after(run_path: Path, step: int) -> None:
    """Delete snapshots of later steps than the one a run resumes from."""
    for later, file in snapshot_files(run_path):
        if later > step:
            file.unlink()


def load(model: Any, file: Path) -> None:
    """Put a snapshot's values into a policy that `load_policy` gave for the same run.

    Raises:
        ValueError: the file is of another run, damaged or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from saerl_cli.rl.training.checkpoint import copy_values

    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupted ({error})") from None
    parameters = dict(model.named_parameters())
    copy_values(str(file), saved, {name: parameters[name] for name in saved if name in parameters})
