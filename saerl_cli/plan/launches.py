"""What the processes of a launch hold of a language model."""

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.plan.shapes import Shape


def weights(shape: Shape, size: int, launch: LaunchConfig, models: int = 1) -> dict[str, float]:
    """Bytes of models' weights in one process: all, or its part and what a pass has whole at a time.

    Args:
        shape: of each.
        size: bytes of a number.
        launch: `launch.shards` parts.
        models: how many.
    """
    whole = float(shape.parameters * size)
    if launch.shards == 1:
        return {"language model": models * whole}
    return {"language model": models * whole / launch.shards, "gathered weights": float(gathered(shape) * size)}


def gathered(shape: Shape) -> int:
    """Parameters that a pass through a split model has whole at a time: embedding, head, last norm and one block."""
    return shape.parameters - (shape.layers - 1) * shape.block


def for_sampling(shape: Shape, size: int, launch: LaunchConfig) -> dict[str, float]:
    """Bytes of what `launch.gather_for_sampling` gathers beside that."""
    if launch.shards == 1 or not launch.gather_for_sampling:
        return {}
    return {"the other blocks": float((shape.parameters - gathered(shape)) * size)}
