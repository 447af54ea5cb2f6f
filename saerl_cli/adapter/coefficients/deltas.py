"""What the coefficients of a model are."""

from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.adapter.coefficients.gates import gate
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.config.adapter import MOVED


def site_layers(model: nn.Module) -> dict[str, SparseCoeffLayer]:
    """Site name -> its layer, in the order of the model."""
    return {module.site: module for module in model.modules() if isinstance(module, SparseCoeffLayer)}


def deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Site name -> a copy of delta = c - 1, [d_sae], on the CPU; with gates, as they are in evaluation mode."""
    found = _copies(model, "sparse_coeffs_delta", adapter_name)
    gates = _copies(model, "sparse_coeffs_gate", adapter_name)
    return {site: delta * gate(gates[site]) if site in gates else delta for site, delta in found.items()}


def moved(delta: Tensor) -> Tensor:
    """Tell which coefficients have moved (`MOVED` says when), bool like delta."""
    return delta.abs() > MOVED


def effects(delta: Tensor, mean: Tensor, decoder: Tensor) -> Tensor:
    """Rank features by what their coefficients write: |delta_i| E[f_i] |W_dec_i|, [d_sae].

    The mean norm of what coefficient i adds to the stream on held-out text of the untouched model: the one order of
    features in every list. By |delta| alone features come first that hardly ever fire, or write next to nothing.

    Args:
        delta: [d_sae].
        mean: activations, averaged over tokens, [d_sae].
        decoder: [d_sae, d_in].
    """
    return delta.to(mean).abs() * mean * decoder.to(mean).norm(dim=-1)


def biases(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Site name -> a copy of the bias d, [d_sae], on the CPU; empty but for the splice `pre_activation`."""
    return _copies(model, "sparse_coeffs_bias", adapter_name)


def delta_statistics(
    model: nn.Module, eps: float = MOVED, top: int = 10, adapter_name: str = "default"
) -> dict[str, Any]:
    """How far coefficients have moved, as plain data for a log.

    Args:
        model: a model with coefficients.
        eps: a coefficient with |delta| > eps counts as changed.
        top: features listed a site, the most moved first.
        adapter_name: which adapter.

    Returns:
        `coefficients`, `nonzero` (those not exactly untouched), `changed`, `flipped` (delta < -1: the effect has
        changed its sign), `largest` |delta|, and
        `sites: {site: {the same, "l1": sum of |delta|, "top": [{"feature", "delta"}]}}`.
    """
    sites = {site: _statistics(delta, eps, top) for site, delta in deltas(model, adapter_name).items()}
    totals: dict[str, Any] = {
        key: sum(site[key] for site in sites.values()) for key in ("coefficients", "nonzero", "changed", "flipped")
    }
    return totals | {"largest": max((site["largest"] for site in sites.values()), default=0.0), "sites": sites}


def _statistics(delta: Tensor, eps: float, top: int) -> dict[str, Any]:
    size = delta.abs()
    largest = size.topk(min(top, len(delta))).indices
    return {
        "coefficients": len(delta),
        "nonzero": int((size != 0).sum()),
        "changed": int((size > eps).sum()),
        "flipped": int((delta < -1).sum()),
        "largest": float(size.max()),
        "l1": float(size.sum(dtype=torch.float64)),
        "top": [{"feature": int(i), "delta": float(delta[i])} for i in largest if size[i] > eps],
    }


def _copies(model: nn.Module, kind: str, adapter_name: str) -> dict[str, Tensor]:
    return {
        site: getattr(layer, kind)[adapter_name].weight.detach().float().cpu().clone()
        for site, layer in site_layers(model).items()
        if adapter_name in getattr(layer, kind)
    }
