"""The settings of an adapter: which modules it acts on, and which SAEs it is bound to."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from saerl_cli.adapter.tuner import SiteConfig
from saerl_cli.models import Loaded, resolve_sites
from saerl_cli.sae.files import check_sae, find_saes, provenance, read_sae_config, refuse_transcoder, sae_sha256

PEFT_TYPE: Any = "SPARSE_COEFFS"  # PEFT's own types are string enums, so a plain string is as good a key
SPLICES = ("error_preserving", "reconstruct", "pre_activation")


@dataclass
class SparseCoeffConfig(SiteConfig):
    """Configuration of `SparseCoeffModel`: one trainable coefficient per SAE feature.

    The adapter's file holds coefficients only. Its SAEs are bound by content: each is looked for where it was, then
    relative to the adapter's folder, then in `../sae/SITE` and `sae/SITE` beside it, and must have the recorded hash.

    Args:
        target_modules, exclude_modules, modules_to_save: as in `SiteConfig`; all keys of `saes` when left out.
        saes: module path -> SAE folder (SAELens format).
        sae_sha256: module path -> hash of the SAE's weights file; read from the folders when left out.
        sites: module path -> name of the site, such as `mlp_out.3`; filled in when left out.
        splice: how the coefficients enter the forward pass (formulas: `saerl_cli.adapter.coefficients.splice`).
        gates: train a hard-concrete gate beside every coefficient; a saved policy has none (`save_adapter`).
        model_sha256: hash of the base model's weight files (`saerl_cli.models.folder_sha256`); the one that the SAEs
            record when left out.
        relative_saes: `saes` relative to the folder of this file; written when saving.
    """

    saes: dict[str, str] | None = field(default=None)
    sae_sha256: dict[str, str] | None = field(default=None)
    sites: dict[str, str] | None = field(default=None)
    splice: str = field(default="error_preserving")
    gates: bool = field(default=False)
    model_sha256: str | None = field(default=None)
    relative_saes: dict[str, str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._folder: Path | None = None  # where it was read from
        if self.splice not in SPLICES:
            raise ValueError(f"unknown splice {self.splice!r}; there are {', '.join(SPLICES)}")
        self.saes = {module: os.path.abspath(folder) for module, folder in (self.saes or {}).items()}
        if self.target_modules is None and self.saes:
            self.target_modules = sorted(self.saes)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, with the SAE folders also relative to it, so that both can move together."""
        self.relative_saes = {
            module: os.path.relpath(path, save_directory) for module, path in (self.saes or {}).items()
        }
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read `adapter_config.json` of a folder or Hub repository.

        Raises:
            ValueError: no such file, or the coefficients beside it are corrupted.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            config._folder = folder
            refuse_corrupted(folder / SAFETENSORS_WEIGHTS_NAME)
        return config

    def find_sae(self, module: str) -> Path:
        """The folder of the SAE that this adapter is bound to at `module`.

        Raises:
            ValueError: it is nowhere, or what is there has another hash.
        """
        site, wanted = (self.sites or {}).get(module, module), (self.sae_sha256 or {}).get(module)
        looked = list(dict.fromkeys(self._candidates(module, site)))
        found = {folder: sae_sha256(folder) for folder in looked if folder.is_dir()}
        for folder, sha256 in found.items():
            if wanted is None or sha256 == wanted:
                return folder
        if found:
            folder, sha256 = next(iter(found.items()))
            raise ValueError(
                f"the SAE of {site} in {folder} is not the one this adapter was trained with:"
                f" its sha256 is {sha256[:12]}…, not {str(wanted)[:12]}…"
            )
        places = ", ".join(map(str, looked)) or "no folder is recorded"
        raise ValueError(f"no SAE for {site}; put the folder of its SAE in one of these places: {places}")

    def _candidates(self, module: str, site: str) -> list[Path]:
        folders = [Path(self.saes[module])] if self.saes and module in self.saes else []
        if self._folder is not None:
            relative = (self.relative_saes or {}).get(module)
            near = [*([relative] if relative else []), f"../sae/{site}", f"sae/{site}"]
            folders += [Path(os.path.abspath(self._folder / path)) for path in near]
        return folders


def sparse_coeffs(
    model: Any,
    saes: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
    splice: str = "error_preserving",
    model_sha256: str | None = None,
    **kwargs: Any,
) -> SparseCoeffConfig:
    """The configuration that puts trained SAEs into a model, with everything checked that can be.

    Args:
        model: the model, alone or as `load_model` gives it, its config, or its `saerl_cli.models.describe`.
        saes: site or module path -> SAE folder; or a run of `saerl train-sae`, a folder of SAEs, or one SAE.
        splice: `error_preserving`, `reconstruct` or `pre_activation`.
        model_sha256: hash of the model's weight files, where known; SAEs of other weights are refused.
        kwargs: further fields, for instance `modules_to_save`.

    Raises:
        ValueError: no SAE, an SAE that is damaged, of another model or of another width, a site that the model lacks.
    """
    if isinstance(model, Loaded):
        model, model_sha256 = model.model, model_sha256 or model.sha256
    folders = saes if isinstance(saes, Mapping) else find_saes(Path(saes))
    if not folders:
        raise ValueError("no SAE given: saes is empty")
    modules, hashes, names = {}, {}, {}
    for name, folder in folders.items():
        (site,) = resolve_sites([name], model)
        if site.module in modules:
            raise ValueError(f"two SAEs for {site.name} ({modules[site.module]} and {folder}); name one of them")
        record = check_sae(Path(folder), model_sha256=model_sha256, width=site.width)
        refuse_transcoder(record, str(folder), site.name)
        modules[site.module], hashes[site.module] = str(folder), sae_sha256(Path(folder))
        names[site.module] = site.name
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "saes": modules,
        "sae_sha256": hashes,
        "sites": names,
        "splice": splice,
        "model_sha256": model_sha256 or trained_on(modules.values()),
    }
    return SparseCoeffConfig(**fields | kwargs)


def trained_on(folders: Iterable[str]) -> str | None:
    """Hash of the model that SAEs were trained on; None when they do not say.

    Raises:
        ValueError: they name different models.
    """
    recorded = {str(folder): provenance(read_sae_config(folder)).get("model_sha256") for folder in folders}
    hashes = {sha256 for sha256 in recorded.values() if sha256 is not None}
    if len(hashes) > 1:
        raise ValueError(f"these SAEs were trained on different models: {', '.join(recorded)}")
    return hashes.pop() if hashes else None


def refuse_corrupted(path: Path) -> None:
    """`ValueError` naming a file that is there and no safetensors file."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupted or no safetensors file ({error})") from None
