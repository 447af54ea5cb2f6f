"""What keeps coefficients few and small while they are trained: the settings of `SparsityConfig` at work.

After an optimiser step with learning rate lr, in this order, over the coefficients of all sites:

    l1         delta <- sign(delta) * max(|delta| - lr * l1 * s, 0), the proximal step of l1 * sum s |delta|: its zeros
               are exact, where a penalty under Adam has none; s is 1, or a feature's effect
    top_k      all but the largest |delta| <- 0
    bounds     delta clamped to [min_coeff - 1, max_delta] and to >= -max_delta

Everything is a function of the step and of what a checkpoint holds, so that a resumed run is the same run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saerl_cli.adapter.coefficients.deltas import site_layers
from saerl_cli.adapter.coefficients.gates import expected_open, logistic_noise
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.config.adapter import SparsityConfig, refuse_top_k


class Sparsity:
    """Acts on the coefficients of a model, which it does not own.

    Args:
        model: a model with coefficients.
        sparsity: the settings.
        free: site -> whether a feature may be trained, [d_sae] bool; all may where it says nothing. The others get no
            gradient.
        effect: site -> factor of a feature's l1, [d_sae]; 1 when None.
        adapter_name: which adapter.

    Raises:
        ValueError: `top_k` exceeds the number of coefficients that may be trained.
    """

    def __init__(
        self,
        model: Any,
        sparsity: SparsityConfig,
        free: Mapping[str, Tensor] | None = None,
        effect: Mapping[str, Tensor] | None = None,
        adapter_name: str = "default",
    ):
        self.sparsity, self.name = sparsity, adapter_name
        self.layers: dict[str, SparseCoeffLayer] = site_layers(model)
        self.free = {site: mask.to(self._delta(site).device) for site, mask in (free or {}).items()}
        self.effect = {site: scale.to(self._delta(site)) for site, scale in (effect or {}).items()}
        self.trainable = sum(
            int(self.free[site].sum()) if site in self.free else len(self._delta(site)) for site in self.layers
        )
        refuse_top_k(sparsity, self.trainable)
        for site, mask in self.free.items():
            for held in self._parameters(site):
                # Not requires_grad, which PEFT turns on for whole tensors; AdamW leaves what has no gradient at 0.
                held.register_hook(mask.to(held).mul)

    def _delta(self, site: str) -> Tensor:
        return self._weight(site, "delta")

    def _weight(self, site: str, kind: str) -> Tensor:
        return getattr(self.layers[site], f"sparse_coeffs_{kind}")[self.name].weight

    def _parameters(self, site: str) -> list[Tensor]:
        layer = self.layers[site]
        return [
            held[self.name].weight for name in layer.adapter_layer_names if self.name in (held := getattr(layer, name))
        ]

    # --- after an optimiser step --------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_step(self, lr: float, progress: float) -> None:
        """Project the coefficients; `lr` is that of the step, `progress` the share of training done, in (0, 1]."""
        sparsity = self.sparsity
        for site in self.layers if sparsity.l1 else ():
            delta = self._delta(site)
            threshold = lr * sparsity.l1 * self.effect.get(site, torch.ones((), device=delta.device))
            delta.copy_(delta.sign() * (delta.abs() - threshold).relu())
        if sparsity.top_k is not None:
            self._keep_largest(allowed(sparsity.top_k, self.trainable, sparsity.top_k_anneal, progress))
        low = None if sparsity.min_coeff is None else sparsity.min_coeff - 1
        high = sparsity.max_delta
        for site in self.layers:
            if high is not None:
                self._delta(site).clamp_(-high, high)
            if low is not None:
                self._delta(site).clamp_(min=low)

    def _keep_largest(self, count: int) -> None:
        values = [self._delta(site) for site in self.layers]
        sizes = torch.cat([delta.abs().cpu() for delta in values])
        if int((sizes != 0).sum()) <= count:
            return
        keep = torch.zeros(len(sizes), dtype=torch.bool)
        keep[sizes.topk(count).indices] = True
        for delta, mask in zip(values, keep.split([len(delta) for delta in values]), strict=True):
            delta.mul_(mask.to(delta))

    # --- gates --------------------------------------------------------------------------------------------------------

    def begin_phase(self, seed: int) -> None:
        """Draw the gates' noise, which holds until the next phase: what samples is what is scored."""
        if self.sparsity.hard_concrete is None:
            return
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.gate_noise = logistic_noise(layer.sae.d_sae, generator).to(layer.sae.W_dec.device)

    def penalty(self) -> Tensor | None:
        """What is added to the loss of an optimiser step: weight times the expected number of open gates, a number."""
        if not self.sparsity.hard_concrete:
            return None
        total = [(expected_open(self._weight(site, "gate")) * self.free.get(site, 1)).sum() for site in self.layers]
        return self.sparsity.hard_concrete * torch.stack(total).sum()


def allowed(top_k: int, everything: int, share: float, progress: float) -> int:
    """Coefficients allowed away from untouched: from `everything` to `top_k` along a cubic, then `top_k`.

    The schedule of gradual pruning (Zhu and Gupta 2017), which removes most while many are left.

    Args:
        top_k: allowed in the end.
        everything: that there are.
        share: of training, after which it is `top_k`.
        progress: share of training done.
    """
    left = max(0.0, 1 - progress / share) if share > 0 else 0.0
    return top_k + round((everything - top_k) * left**3)
