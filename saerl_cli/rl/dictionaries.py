"""The SAEs that coefficients are put on, the random ones of the control, and what restrains the coefficients."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from saerl_cli.activations import capture, special_ids, text_mask
from saerl_cli.adapter import site_layers
from saerl_cli.adapter.restraint import Restraint
from saerl_cli.config.adapter import COEFFICIENTS, AdapterConfig, AdapterKind, L1Scale
from saerl_cli.models import Loaded, Site, resolve_sites
from saerl_cli.rl.check import chosen_saes
from saerl_cli.rl.chosen import free_features
from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder, write_safetensors
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.controls import SAMPLE_TOKENS, random_like
from saerl_cli.sae.files import load_sae, save_sae
from saerl_cli.sae.metrics import first_rows

if TYPE_CHECKING:
    from saerl_cli.rl.build import Parts


def dictionaries(adapter: AdapterConfig, loaded: Loaded, rows: Tensor, run: Run) -> dict[str, Path]:
    """Site -> SAE folder; random directions are drawn into RUN/sae unless an earlier attempt did.

    Args:
        adapter: the settings.
        loaded: the model.
        rows: held-out token ids, [n, context], by which random directions are centred and calibrated.
        run: its directory.

    Raises:
        ValueError: a site that the model lacks.
    """
    if adapter.kind is AdapterKind.sparse_coeffs:
        return chosen_saes(adapter)
    if adapter.kind is not AdapterKind.random_dictionary:
        return {}
    folder = run.path / "sae"
    if run.writes and not folder.is_dir():
        with atomic_folder(folder) as temporary:
            for sae in random_dictionary(adapter, loaded, rows).values():
                save_sae(sae, temporary / str(sae.site))
    shards.meet()
    PartialState().wait_for_everyone()
    return {path.name: path for path in sorted(folder.iterdir())}


def random_dictionary(adapter: AdapterConfig, loaded: Loaded, rows: Tensor) -> dict[str, SAE]:
    """Site -> random unit directions of the shapes of trained SAEs; as many of them fire (`saerl_cli.sae.controls`)."""
    saes = {site: load_sae(path) for site, path in chosen_saes(adapter).items()} if adapter.saes else {}
    sites = resolve_sites(list(saes) or adapter.sites or [], loaded.model)
    if not saes:
        saes = {site.name: SAE(site.width, adapter.d_sae or 0, "topk", adapter.k) for site in sites}
    activations = text_activations(loaded, sites, rows)
    generator = torch.Generator().manual_seed(adapter.seed or 0)
    found = {}
    for site in sites:
        found[site.name] = sae = random_like(saes[site.name].cpu(), activations[site.name], generator)
        sae.site = site.name
        sae.metadata = {"saerl": {"module": site.module, "model_name": loaded.name, "model_sha256": loaded.sha256}}
    return found


def text_activations(loaded: Loaded, sites: list[Site], rows: Tensor) -> dict[str, Tensor]:
    """Site -> activations [tokens, d_in] of the untouched model on the first of `rows`, float32 on the CPU."""
    special = special_ids(loaded.tokenizer)
    rows = first_rows(rows, special, SAMPLE_TOKENS)
    text = text_mask(rows, special)
    captured = capture(loaded.model, sites, rows.to(loaded.model.device))
    return {site.name: captured[site.name].cpu()[text].float() for site in sites}


def restraint(parts: "Parts", model: Any) -> Restraint | None:
    """What the settings of sparsity, bounds and features do to the coefficients of `model`; None where they do nothing.

    Raises:
        ValueError: as `free_features`, or `top_k` is too large.
    """
    adapter = parts.config.adapter
    if adapter.kind not in COEFFICIENTS:
        return None
    sizes = {site: layer.sae.d_sae for site, layer in site_layers(model).items()}
    chosen = free_features(adapter, sizes)
    free = {site: member_mask(features, sizes[site]) for site, features in (chosen or {}).items()}
    effect = effects(parts, model) if adapter.sparsity.l1_scale is L1Scale.effect else None
    return Restraint(model, adapter.sparsity, free, effect)


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
    shards.meet()
    PartialState().wait_for_everyone()
    return load_file(path)
