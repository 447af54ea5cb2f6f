"""Random directions in the place of an SAE's features: the control of adapter=random_dictionary."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saerl_cli.activations import capture, special_ids, text_mask
from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.models import Loaded, Site, resolve_sites
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder
from saerl_cli.run.processes import process_group
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.controls import SAMPLE_TOKENS, random_like
from saerl_cli.sae.files import load_sae, save_sae
from saerl_cli.sae.metrics import first_rows


def draw(adapter: AdapterConfig, saes: Mapping[str, Path], loaded: Loaded, rows: Tensor, run: Run) -> dict[str, Path]:
    """Draw random directions into RUN/sae unless an earlier attempt did; site -> folder.

    Args:
        adapter: the settings.
        saes: site -> folder of the SAEs to imitate; empty where the settings give the shapes.
        loaded: the model.
        rows: held-out token ids, [n, context], by which they are centred and calibrated.
        run: its directory.
    """
    folder = run.path / "sae"
    if run.writes and not folder.is_dir():
        with atomic_folder(folder) as temporary:
            for sae in random_dictionary(adapter, saes, loaded, rows).values():
                save_sae(sae, temporary / str(sae.site))
    process_group().barrier()
    return {path.name: path for path in sorted(folder.iterdir())}


def random_dictionary(
    adapter: AdapterConfig, folders: Mapping[str, Path], loaded: Loaded, rows: Tensor
) -> dict[str, SAE]:
    """Site -> random unit directions of the shapes of SAEs; as many of them fire (`saerl_cli.sae.controls`)."""
    saes = {site: load_sae(path) for site, path in folders.items()}
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
