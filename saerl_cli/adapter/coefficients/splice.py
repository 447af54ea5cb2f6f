"""Coefficients of SAE features inside a forward pass.

With the frozen SAE of a site, its pre-activations `pre`, activations `f` and decoder `W_dec`, and delta = c - 1:

    error_preserving   h' = h + (delta * f(h)) W_dec
    reconstruct        h' = ((1 + delta) * f(h)) W_dec + b_dec
    pre_activation     h' = h + (f' - f(h)) W_dec,  f' = act((1 + delta) * pre(h) + d)

    h, h': [..., d_in];  pre, f, f': [..., d_sae];  delta, d: [d_sae], float32, 0 at the start;  W_dec: [d_sae, d_in]

With gates (`saerl_cli.adapter.coefficients.gates`) delta is multiplied by a number in [0, 1] for every feature.

At delta = d = 0 the first and the last are the base model to the bit; `reconstruct` (Newhouse and Bashkansky, 2023) is
the model with the SAE's reconstruction in it. The SAE keeps its dtype on a stream of another one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saerl_cli.adapter.coefficients.active_features import ActiveFeatures, scaled
from saerl_cli.adapter.tuner import Transparent, on_activation
from saerl_cli.sae.autoencoder import SAE


def splice(
    sae: SAE, h: Tensor, kind: str, delta: Tensor, shift: Tensor | None = None, active: ActiveFeatures | None = None
) -> Tensor:
    """Apply the formulas above: h', [..., d_in]; differentiable in h, delta and shift.

    Args:
        sae: the frozen SAE of the site.
        h: activations, [..., d_in].
        kind: `error_preserving`, `reconstruct` or `pre_activation`.
        delta: coefficients less 1, [d_sae].
        shift: the bias d, [d_sae] (pre_activation).
        active: the active features of h where they are known already (not for pre_activation).
    """
    # Lower precision would make scoring (under autocast) and generation (outside it) two different policies.
    with torch.autocast(h.device.type, enabled=False):
        x = h.to(sae.W_dec.dtype)
        if kind == "pre_activation":
            assert shift is not None
            spliced = x + _moved(sae, x, delta, shift)
        elif kind == "reconstruct":
            spliced = scaled(sae, x.flatten(0, -2), 1 + delta, active).view_as(x) + sae.b_dec
        else:
            spliced = x + scaled(sae, x.flatten(0, -2), delta, active).view_as(x)
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
