"""What several processes share."""

from dataclasses import dataclass

from saerl_cli.config.groups import LaunchConfig


@dataclass(frozen=True)
class Sharing:
    """Among how many processes a thing is split; 1 where each holds the whole."""

    weights: int
    """The language model."""
    states: int
    """Gradients and the optimiser's state of trained weights."""


def sharing(launch: LaunchConfig) -> Sharing:
    """Of a launch (`launch.sharding`, where there is such a setting)."""
    kind = str(getattr(getattr(launch, "sharding", None), "value", "none"))
    whole, split = 1, launch.num_processes
    weights = split if kind in ("fsdp2", "deepspeed_zero3") else whole
    return Sharing(weights, split if weights > 1 or kind == "deepspeed_zero2" else whole)
