"""Coefficients of SAE features inside a forward pass.

With the frozen SAE of a site, its pre-activations `pre`, activations `f` and decoder `W_dec`, and delta = c - 1:

    error_preserving   h' = h + (delta * f(h)) W_dec
    reconstruct        h' = ((1 + delta) * f(h)) W_dec + b_dec
    pre_activation     h' = h + (f' - f(h)) W_dec,  f' = act((1 + delta) * pre(h) + d)

    h, h': [..., d_in];  pre, f, f': [..., d_sae];  delta, d: [d_sae], float32, 0 at the start;  W_dec: [d_sae, d_in]

With gates (`saerl_cli.adapter.gates`) delta is multiplied by a number in [0, 1] for every feature.

At delta = d = 0 the first and the last are the base model to the bit; `reconstruct` (Newhouse and Bashkansky, 2023) is
the model with the SAE's reconstruction in it. The SAE keeps its dtype on a stream of another one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from saerl_cli.adapter.codes import Codes, scaled
from saerl_cli.adapter.gates import INITIAL, gate
from saerl_cli.sae.autoencoder import SAE


def splice(
    sae: SAE, h: Tensor, kind: str, delta: Tensor, shift: Tensor | None = None, codes: Codes | None = None
) -> Tensor:
    """Apply the formulas above: h', [..., d_in]; differentiable in h, delta and shift.

    Args:
        sae: the frozen SAE of the site.
        h: activations, [..., d_in].
        kind: `error_preserving`, `reconstruct` or `pre_activation`.
        delta: coefficients less 1, [d_sae].
        shift: the bias d, [d_sae] (pre_activation).
        codes: the active features of h where they are known already (not for pre_activation).
    """
    # Lower precision would make scoring (under autocast) and generation (outside it) two different policies.
    with torch.autocast(h.device.type, enabled=False):
        x = h.to(sae.W_dec.dtype)
        if kind == "pre_activation":
            assert shift is not None
            spliced = x + _moved(sae, x, delta, shift)
        elif kind == "reconstruct":
            spliced = scaled(sae, x.flatten(0, -2), 1 + delta, codes).view_as(x) + sae.b_dec
        else:
            spliced = x + scaled(sae, x.flatten(0, -2), delta, codes).view_as(x)
        return spliced.to(h.dtype)


def _moved(sae: SAE, x: Tensor, delta: Tensor, shift: Tensor) -> Tensor:
    """`(f' - f(x)) W_dec`: [..., d_in] -> [..., d_in]."""
    pre = sae.pre_activations(x)  # [..., d_sae]
    moved = (1 + delta) * pre + shift
    if sae.k is None:
        return (sae.activate(moved) - sae.activate(pre)) @ sae.W_dec
    before, after = pre.topk(sae.k, sorted=False), moved.topk(sae.k, sorted=False)  # other features may be chosen
    # Decoded apart: two equal sums cancel to the bit, one sum over both would not.
    return _decode_sparse(sae, after.values.relu(), after.indices) - _decode_sparse(
        sae, before.values.relu(), before.indices
    )


def _decode_sparse(sae: SAE, values: Tensor, indices: Tensor) -> Tensor:
    """Sum of k decoder rows a token, the others untouched: [..., k] twice -> [..., d_in]."""
    rows = functional.embedding_bag(
        indices.flatten(0, -2), sae.W_dec, per_sample_weights=values.flatten(0, -2), mode="sum"
    )
    return rows.view(*indices.shape[:-1], sae.d_in)


def on_activation(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a module's output, or to the first item of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class Coefficients(nn.Module):
    """One number per feature, [d_sae].

    A module and no bare parameter: its parameter's name then contains `.<adapter>.`, by which TRL copies an adapter
    into its reference `ref`.
    """

    def __init__(self, d_sae: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_sae, device=device, dtype=torch.float32))


class Transparent(nn.Module):
    """A module around another one, whose public attributes it lends: some models read them off their layers."""

    inner: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inner or name.startswith("_"):
                raise
            return getattr(super().__getattr__(self.inner), name)


class SparseCoeffLayer(Transparent, BaseTunerLayer):
    """A module of the base model with coefficients on the features of its output.

    Attributes:
        base_layer: the wrapped module.
        sae: its SAE, frozen. Parameters, not buffers, which DDP would send around at every step.
        path: the module's path in the base model.
        site: the name of the site.
        gate_noise: logistic noise of the gates, [d_sae], in training mode; None: gates are as in evaluation. No
            buffer, which DDP would send around at every step.
        codes: the active features of the wrapped module's next output, when someone has kept them.
        fixed: what stands for SAE, delta and d while the active adapters' coefficients do not change (`fix`).
    """

    inner = "base_layer"
    adapter_layer_names = ("sparse_coeffs_delta", "sparse_coeffs_bias", "sparse_coeffs_gate")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, sae: SAE, kind: str, path: str, site: str, sae_sha256: str):
        super().__init__()
        self.base_layer = base_layer
        self.sae = sae
        self.kind, self.path, self.site, self.sae_sha256 = kind, path, site, sae_sha256
        self.sparse_coeffs_delta = nn.ModuleDict()
        self.sparse_coeffs_bias = nn.ModuleDict()
        self.sparse_coeffs_gate = nn.ModuleDict()
        self.gate_noise: Tensor | None = None
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []
        self.codes: Codes | None = None
        self.fixed: Needed | None = None

    def update_layer(self, adapter_name: str, trainable: bool, gates: bool = False) -> None:
        """Add an adapter with all coefficients untouched."""
        has = {"delta": True, "bias": self.kind == "pre_activation", "gate": gates}
        for name in (name for name, wanted in has.items() if wanted):
            coefficients = Coefficients(self.sae.d_sae, self.sae.W_dec.device).requires_grad_(trainable)
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the active adapters' splice in it."""
        output = self.base_layer(*args, **kwargs)
        total = None if self.disable_adapters else self.total(self.active_adapters)
        if total is None:
            return output
        sae, delta, shift = self.fixed or (self.sae, *total)
        return on_activation(output, lambda h: splice(sae, self._checked(h), self.kind, delta, shift, self.codes))

    def fix(self) -> None:
        """Until `fixed` is emptied, compute with the features that the active adapters' coefficients need."""
        total = self.total(self.active_adapters)
        needed = None if total is None else needed_features(self.sae, self.kind, *total)
        # A copy of nearly all of an SAE would cost memory and save nothing.
        self.fixed = needed if needed and needed[0].d_sae <= self.sae.d_sae / 2 else None

    def _checked(self, h: Tensor) -> Tensor:
        if h.shape[-1] != self.sae.d_in:
            raise ValueError(f"{self.site} has width {h.shape[-1]}, but its SAE has d_in={self.sae.d_in}")
        return h

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a splice is nonlinear, so no weights equal it."""
        raise NotImplementedError(
            "SAE coefficients cannot be merged into weights, so no vLLM; merge_and_unload() fixes them in place"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """What PEFT's `unload()` and `merge_and_unload()` put in this layer's place."""
        total = self.total(check_adapters_to_merge(self, adapter_names)) if merge else None
        if total is None:
            return self.base_layer
        if safe_merge and not all(part.isfinite().all() for part in total if part is not None):
            raise ValueError(f"coefficients of {self.site} are NaN or infinite")
        return fixed_splice(self.base_layer, self.sae, self.kind, *total)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Keep coefficients in float32; PEFT would cast them to the base weights' dtype."""
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                getattr(self, name)[adapter_name].to(device or self.sae.W_dec.device, torch.float32)


class FixedSplice(Transparent):
    """The same splice with fixed coefficients and no trace of PEFT: what `merge_and_unload` leaves behind."""

    inner = "base"

    def __init__(self, base: nn.Module, sae: SAE, kind: str, delta: Tensor, shift: Tensor | None):
        super().__init__()
        self.delta: Tensor
        self.shift: Tensor | None
        self.register_buffer("delta", delta.detach().clone())
        self.register_buffer("shift", None if shift is None else shift.detach().clone())
        self.base, self.sae, self.kind = base, sae, kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the splice in it."""
        output = self.base(*args, **kwargs)
        return on_activation(output, lambda h: splice(self.sae, h, self.kind, self.delta, self.shift))


Needed = tuple[SAE, Tensor, Tensor | None]
"""An SAE with some of its features, and their delta and d."""


def needed_features(sae: SAE, kind: str, delta: Tensor, shift: Tensor | None) -> Needed:
    """An SAE with no more features than a splice with these coefficients needs, and the coefficients of those.

    Features of a ReLU or JumpReLU SAE are independent, so only those with a coefficient remain. A topk SAE needs its
    whole encoder to know which are chosen, `reconstruct` all features.
    """
    delta, shift = delta.detach(), None if shift is None else shift.detach()
    if sae.k is not None or kind == "reconstruct":
        return sae, delta, shift
    changed = delta != 0 if shift is None else (delta != 0) | (shift != 0)
    kept = changed.nonzero().flatten()
    return only(sae, kept), delta[kept], None if shift is None else shift[kept]


def only(sae: SAE, features: Tensor) -> SAE:
    """A ReLU or JumpReLU SAE with some of its features, [n] indices; what they write is as in the whole one."""
    small = SAE(sae.d_in, len(features), sae.architecture).to(sae.W_dec)
    rows = {"W_enc": sae.W_enc[:, features], "b_enc": sae.b_enc[features], "W_dec": sae.W_dec[features]}
    rows |= {"b_dec": sae.b_dec} | ({} if sae.threshold is None else {"threshold": sae.threshold[features]})
    small.load_state_dict(rows)
    small.site, small.metadata = sae.site, sae.metadata
    return small


def fixed_splice(base: nn.Module, sae: SAE, kind: str, delta: Tensor, shift: Tensor | None) -> nn.Module:
    """A module with fixed coefficients, with no more of the SAE than it needs; `base` itself when that is nothing."""
    sae, delta, shift = needed_features(sae, kind, delta, shift)
    return FixedSplice(base, sae, kind, delta, shift) if sae.d_sae else base
