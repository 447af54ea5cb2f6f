"""A module of the base model with coefficients on the features of its output (formulas: `splice`)."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.adapter.coefficients.active_features import ActiveFeatures
from saerl_cli.adapter.coefficients.gates import INITIAL, gate
from saerl_cli.adapter.coefficients.splice import Needed, fixed_splice, needed_features, splice
from saerl_cli.adapter.tuner import Coefficients, SiteLayer
from saerl_cli.sae.autoencoder import SAE


class SparseCoeffLayer(SiteLayer):
    """A module of the base model with coefficients on the features of its output.

    Attributes:
        sae: its SAE, frozen. Parameters, not buffers, which DDP would send around at every step.
        path: the module's path in the base model.
        gate_noise: logistic noise of the gates, [d_sae], in training mode; None: gates are as in evaluation. No
            buffer, which DDP would send around at every step.
        active: the active features of the wrapped module's next output, when someone has kept them.
        fixed: what stands for SAE, delta and d while the active adapters' coefficients do not change (`fix`).
    """

    adapter_layer_names = ("sparse_coeffs_delta", "sparse_coeffs_bias", "sparse_coeffs_gate")

    def __init__(self, base_layer: nn.Module, sae: SAE, kind: str, path: str, site: str, sae_sha256: str):
        super().__init__(base_layer, site)
        self.sae = sae
        self.kind, self.path, self.sae_sha256 = kind, path, sae_sha256
        self.gate_noise: Tensor | None = None
        self.active: ActiveFeatures | None = None
        self.fixed: Needed | None = None

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self.sae.W_dec.device

    def update_layer(self, adapter_name: str, trainable: bool, gates: bool = False) -> None:
        """Add an adapter with all coefficients untouched."""
        has = {"delta": True, "bias": self.kind == "pre_activation", "gate": gates}
        for name in (name for name, wanted in has.items() if wanted):
            coefficients = Coefficients(self.sae.d_sae, self.device).requires_grad_(trainable)
            getattr(self, f"sparse_coeffs_{name}")[adapter_name] = coefficients
        if gates:
            nn.init.constant_(self.sparse_coeffs_gate[adapter_name].weight, INITIAL)  # pyright: ignore[reportArgumentType]

    def delta(self, adapter_name: str) -> Tensor:
        """An adapter's delta as it acts, gated where there are gates: [d_sae]."""
        held: Any = self.sparse_coeffs_delta
        gates: Any = self.sparse_coeffs_gate
        delta = held[adapter_name].weight
        if adapter_name not in gates:
            return delta
        return delta * gate(gates[adapter_name].weight, self.gate_noise if self.training else None)

    def total(self, adapter_names: Sequence[str]) -> tuple[Tensor, Tensor | None] | None:
        """Sum up several adapters: their coefficients multiply, their biases add; (delta, d), each [d_sae].

        None where none of them has this site.
        """
        scales = [self.delta(adapter) for adapter in adapter_names if adapter in self.sparse_coeffs_delta]
        if not scales:
            return None
        held: Any = self.sparse_coeffs_bias
        shifts = [held[adapter].weight for adapter in adapter_names if adapter in held]
        delta = functools.reduce(lambda a, b: a + b + a * b, scales)  # (1 + a)(1 + b) - 1
        return delta, functools.reduce(torch.add, shifts) if shifts else None

    def change(self, h: Tensor, total: Any) -> Tensor:
        """The splice, with the features that are needed where they are known."""
        if h.shape[-1] != self.sae.d_in:
            raise ValueError(f"{self.site} has width {h.shape[-1]}, but its SAE has d_in={self.sae.d_in}")
        sae, delta, shift = self.fixed or (self.sae, *total)
        return splice(sae, h, self.kind, delta, shift, self.active)

    def fixed_module(self, total: Any) -> nn.Module:
        """The same splice without PEFT."""
        return fixed_splice(self.base_layer, self.sae, self.kind, *total)

    def fix(self) -> None:
        """Until `fixed` is emptied, compute with the features that the active adapters' coefficients need."""
        total = self.total(self.active_adapters)
        needed = None if total is None else needed_features(self.sae, self.kind, *total)
        # A copy of nearly all of an SAE would cost memory and save nothing.
        self.fixed = needed if needed and needed[0].d_sae <= self.sae.d_sae / 2 else None
