"""The settings of sparsity, bounds and trainable features as what acts on a model's coefficients."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from saerl_cli.adapter import site_layers
from saerl_cli.adapter.coefficients.sparsity import Sparsity
from saerl_cli.config.adapter import L1Scale
from saerl_cli.models import resolve_sites
from saerl_cli.rl.adapters.directions import text_activations
from saerl_cli.rl.adapters.selection import free_features
from saerl_cli.run.files import write_safetensors
from saerl_cli.run.processes import process_group
from saerl_cli.sae.files import load_sae

if TYPE_CHECKING:
    from saerl_cli.rl.build import Parts


def sparsity_of(parts: "Parts", model: Any) -> Sparsity | None:
    """What the settings of sparsity, bounds and features do to the coefficients of `model`; None where they do nothing.

    Raises:
        ValueError: as `free_features`, or `top_k` is too large.
    """
    if not parts.saes:
        return None
    adapter = parts.config.adapter
    sizes = {site: layer.sae.d_sae for site, layer in site_layers(model).items()}
    chosen = free_features(adapter, sizes)
    free = {site: member_mask(features, sizes[site]) for site, features in (chosen or {}).items()}
    effect = effects(parts, model) if adapter.sparsity.l1_scale is L1Scale.effect else None
    return Sparsity(model, adapter.sparsity, free, effect)


def member_mask(features: set[int], size: int) -> Tensor:
    """Which of `size` features are among `features`, [size] bool."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[sorted(features)] = True
    return mask


def effects(parts: "Parts", model: Any) -> Mapping[str, Tensor]:
    """Site -> |W_dec_i| * E[f_i], [d_sae], on held-out text of the untouched model.

    Measured once and kept in RUN/effect.safetensors, so that a resumed run and all processes use the same numbers.
    """
    path = parts.run.path / "effect.safetensors"
    if parts.run.writes and not path.is_file():
        with model.disable_adapter():
            sites = resolve_sites(list(parts.saes), parts.loaded.model)
            activations = text_activations(parts.loaded, sites, parts.heldout_rows)
        saes = {site: load_sae(folder) for site, folder in parts.saes.items()}
        with torch.no_grad():
            found = {s: sae.encode(activations[s]).mean(0) * sae.W_dec.norm(dim=1) for s, sae in saes.items()}
        write_safetensors(path, found)
    process_group().barrier()
    return load_file(path)
