"""The settings of sparsity, bounds and trainable features as what acts on a model's coefficients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from saerl_cli.adapter import site_layers
from saerl_cli.adapter.coefficients.sparsity import Sparsity
from saerl_cli.config.adapter import AdapterConfig, L1Scale
from saerl_cli.models import Loaded, resolve_sites
from saerl_cli.rl.adapters.directions import text_activations
from saerl_cli.rl.adapters.selection import free_features
from saerl_cli.run.directory import Run
from saerl_cli.run.files import write_safetensors
from saerl_cli.run.processes import process_group
from saerl_cli.sae.files import load_sae


def sparsity_of(
    adapter: AdapterConfig, saes: Mapping[str, Path], model: Any, loaded: Loaded, rows: Tensor, run: Run
) -> Sparsity | None:
    """Make what the settings of sparsity, bounds and features do to coefficients; None where they do nothing.

    Args:
        adapter: the settings.
        saes: folders by site.
        model: with the coefficients.
        loaded: the language model below it.
        rows: [n, context] held-out token ids, from which effects are measured.
        run: which keeps them.

    Raises:
        ValueError: as `free_features`, or `top_k` is too large.
    """
    if not saes:
        return None
    sizes = {site: layer.sae.d_sae for site, layer in site_layers(model).items()}
    chosen = free_features(adapter, sizes)
    free = {site: member_mask(features, sizes[site]) for site, features in (chosen or {}).items()}
    effect = effects(saes, model, loaded, rows, run) if adapter.sparsity.l1_scale is L1Scale.effect else None
    return Sparsity(model, adapter.sparsity, free, effect)


def member_mask(features: set[int], size: int) -> Tensor:
    """Which of `size` features are among `features`, [size] bool."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[sorted(features)] = True
    return mask


def effects(saes: Mapping[str, Path], model: Any, loaded: Loaded, rows: Tensor, run: Run) -> Mapping[str, Tensor]:
    """Site -> |W_dec_i| * E[f_i], [d_sae], on held-out text of the untouched model.

    Measured once and kept in RUN/effect.safetensors, so that a resumed run and all processes use the same numbers.
    """
    path = run.path / "effect.safetensors"
    if run.writes and not path.is_file():
        with model.disable_adapter():
            activations = text_activations(loaded, resolve_sites(list(saes), loaded.model), rows)
        opened = {site: load_sae(folder) for site, folder in saes.items()}
        with torch.no_grad():
            found = {s: sae.encode(activations[s]).mean(0) * sae.W_dec.norm(dim=1) for s, sae in opened.items()}
        write_safetensors(path, found)
    process_group().barrier()
    return load_file(path)
