"""One trainable vector at the output of a module: a PEFT method for the simplest baselines.

shift   h' = h + v          a steering vector; at modules with a bias, that bias (BitFit, Ben Zaken et al. 2021)
scale   h' = h * (1 + v)    a coefficient on every neuron of the output

h, h': [..., width];  v: [width], float32, 0 at the start, where both are the base model to the bit
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.adapter.tuner import Coefficients, SiteLayer, Transparent, on_activation


def apply_vector(h: Tensor, kind: str, vector: Tensor) -> Tensor:
    """The formulas above, in float32: [..., width] and [width] to [..., width]."""
    with torch.autocast(h.device.type, enabled=False):
        x = h.float()
        return (x + vector if kind == "shift" else x * (1 + vector)).to(h.dtype)


class VectorLayer(SiteLayer):
    """A module of the base model with a vector at its output."""

    adapter_layer_names = ("activation_vector_v",)

    def __init__(self, base_layer: nn.Module, kind: str, width: int, site: str, device: torch.device):
        super().__init__(base_layer, site)
        self.kind, self.width, self.device = kind, width, device

    def update_layer(self, adapter_name: str, trainable: bool) -> None:
        """Add an adapter that changes nothing yet."""
        self.activation_vector_v[adapter_name] = Coefficients(self.width, self.device).requires_grad_(trainable)

    def total(self, adapter_names: Any) -> tuple[Tensor] | None:
        """Several adapters as one: shifts add, factors multiply; [width]."""
        held: Any = self.activation_vector_v
        vectors = [held[name].weight for name in adapter_names if name in held]
        if not vectors:
            return None
        if self.kind == "shift":
            return (functools.reduce(torch.add, vectors),)
        return (functools.reduce(lambda a, b: a + b + a * b, vectors),)  # (1 + a)(1 + b) - 1

    def change(self, h: Tensor, total: Any) -> Tensor:
        """The formulas above."""
        return apply_vector(h, self.kind, *total)

    def fixed_module(self, total: Any) -> nn.Module:
        """The same without PEFT."""
        return FixedVector(self.base_layer, self.kind, *total)


class FixedVector(Transparent):
    """The same with a fixed vector and no trace of PEFT."""

    inner = "base"

    def __init__(self, base: nn.Module, kind: str, vector: Tensor):
        super().__init__()
        self.vector: Tensor
        self.register_buffer("vector", vector.detach().clone())
        self.base, self.kind = base, kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the vector in it."""
        return on_activation(self.base(*args, **kwargs), lambda h: apply_vector(h, self.kind, self.vector))
