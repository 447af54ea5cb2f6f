"""Proof of restriction: everything that training must leave alone is bit-identical afterwards."""

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from saerl_cli.models import tensors_sha256
from saerl_cli.run.directory import Run
from saerl_cli.run.shards import whole


def frozen_hashes(trainer: Any) -> dict[str, str]:
    """Name -> hash of every tensor that a `PPOTrainer` must leave alone: base, SAEs, reference."""
    moving = {name for name, _ in trainer.trainable()}
    return {name: tensors_sha256([("", whole(t))]) for name, t in all_tensors(trainer) if name not in moving}


def all_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the policy and of its frozen copy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    yield from model.named_parameters()
    yield from model.named_buffers()
    if trainer.ref_model is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            yield f"reference.{name}", tensor


def refuse_moved(before: dict[str, str], after: dict[str, str], run: Run) -> None:
    """Record in run.json whether everything frozen is bit-identical.

    Raises:
        ValueError: it is not; the message names the first tensor that moved.
    """
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    digest = hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(after.items())).encode())
    run.update(frozen_unchanged=not moved, frozen_sha256=digest.hexdigest(), frozen_tensors=len(after))
    if moved:
        raise ValueError(
            f"{len(moved)} of {len(before)} frozen tensors moved during training, the first is {moved[0]};"
            " the run proves nothing and nothing is exported"
        )
