"""Vectors at the outputs of modules, merged into weights where the architecture has a place for them."""

from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.adapter.activation_vector.layer import FixedVector
from saerl_cli.adapter.tuner import base_path
from saerl_cli.models import aliases

WRITERS = {
    "gpt_neox": {
        "mlp_out": "mlp.dense_4h_to_h",
        "attn_out": "attention.dense",
        "resid_post": "mlp.dense_4h_to_h",  # the block's output is a sum, and this is one of its terms
        "mlp_hidden": "mlp.dense_4h_to_h",
    }
}
"""Architecture -> position of a site -> the layer's linear map that writes it, or reads it (mlp_hidden)."""


@torch.no_grad()
def into_weights(model: Any) -> Any:
    """The same function with vectors in biases and columns, up to rounding; those without a place stay as they are."""
    fixed = {name: module for name, module in model.named_modules() if isinstance(module, FixedVector)}
    for name, module in sorted(fixed.items(), key=lambda pair: -pair[0].count(".")):
        if merged(model, base_path(name, FixedVector.inner), module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    return model


def merged(model: Any, path: str, fixed: FixedVector) -> bool:
    """Put one vector into the weights; whether there was a place."""
    bias = getattr(fixed.base, "bias", None)
    if fixed.kind == "shift" and isinstance(bias, nn.Parameter):
        add(bias, fixed.vector)
        return True
    site = {site.module: site for site in aliases(model.config).values()}.get(path)
    writer = WRITERS.get(model.config.model_type, {}).get(site.position) if site else None
    if site is None or writer is None or (fixed.kind == "scale") != (site.position == "mlp_hidden"):
        return False
    linear = model.get_submodule(aliases(model.config)[f"resid_post.{site.layer}"].module).get_submodule(writer)
    if fixed.kind == "scale":
        linear.weight.copy_(linear.weight.float() * (1 + fixed.vector))  # [d, hidden]: a column a neuron
        return True
    if linear.bias is None:
        return False
    add(linear.bias, fixed.vector)
    return True


def add(bias: nn.Parameter, vector: Tensor) -> None:
    """`bias += vector`, rounded once."""
    bias.copy_(bias.float() + vector)
