"""SAE folders in the format of SAELens 6: `cfg.json` and `sae_weights.safetensors`.

Our provenance is `cfg.json: metadata.saerl` (site, module, model_name, model_sha256, revision, training settings);
unknown metadata survives SAELens. Only `load_sae` and `save_sae` import torch: the rest runs in checks before a run.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.run.files import atomic_folder, read_json, sha256_file, write_json, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the version whose format this is; readers translate files that claim less than 6.0.0


def save_sae(sae: "SAE", folder: Path | str, firing_rate: "Tensor | None" = None) -> Path:
    """Write `sae` as a SAELens folder, complete or not at all; an existing folder is replaced.

    Args:
        sae: the autoencoder; `sae.metadata` becomes `cfg.json: metadata`.
        folder: the folder to write.
        firing_rate: share of tokens on which each feature fires, [d_sae]; SAELens's `sparsity.safetensors`.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.named_parameters()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} of the SAE at {sae.site} is NaN or infinite: not saved")
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **sae.metadata},
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=True) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        write_safetensors(temporary / WEIGHTS_FILE, tensors, {})
        if firing_rate is not None:
            sparsity = (firing_rate.double() + 1e-10).log10().float().cpu()
            write_safetensors(temporary / "sparsity.safetensors", {"sparsity": sparsity}, {})
    return folder


def read_sae_config(folder: Path | str) -> dict[str, Any]:
    """`cfg.json` of an SAE folder, checked for what `load_sae` can represent.

    Raises:
        ValueError: no such folder or file, or an SAE of a kind that this package does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no SAE folder at {folder}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an SAE folder: it has no {CONFIG_FILE}")
    try:
        config = read_json(path)
        sizes = config["architecture"], int(config["d_in"]), int(config["d_sae"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from None
    if sizes[0] not in ("standard", "topk"):
        raise ValueError(f"{path}: architecture {sizes[0]!r} is not supported; supported: standard, topk")
    if sizes[0] == "topk" and not isinstance(config.get("k"), int):
        raise ValueError(f"{path}: architecture topk needs an integer k")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; fold it into the weights first")
    return config


def sae_sha256(folder: Path | str) -> str:
    """Hash of the weights file, by which adapters and runs name an SAE."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}")
    return sha256_file(path)


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """`metadata.saerl` of a `cfg.json`; empty for an SAE that another tool trained."""
    return (config.get("metadata") or {}).get("saerl") or {}


def check_sae(folder: Path | str, model_sha256: str | None = None, width: int | None = None) -> dict[str, Any]:
    """Refuse an SAE that cannot be used, without importing torch; returns its `cfg.json`.

    Args:
        folder: an SAE folder.
        model_sha256: hash of the model's weights, where known; an SAE that records another one is refused.
        width: d_in of the site, where known.

    Raises:
        ValueError: missing, corrupted or non-finite weights, another model, another width.
    """
    config = read_sae_config(folder)
    d_in, d_sae = config["d_in"], config["d_sae"]
    trained_on = provenance(config).get("model_sha256")
    if model_sha256 is not None and trained_on is not None and trained_on != model_sha256:
        name = provenance(config).get("model_name", "another model")
        raise ValueError(
            f"the SAE {folder} was trained on other weights ({name}, sha256 {trained_on[:12]}) than this model's"
            f" ({model_sha256[:12]}); train one on this model with `saerl train-sae`"
        )
    if width is not None and d_in != width:
        raise ValueError(f"the SAE {folder} has d_in={d_in}, but the site has width {width}")
    expected = {"W_enc": [d_in, d_sae], "b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    for name, (shape, finite) in _inspect(Path(folder) / WEIGHTS_FILE).items():
        if name in expected and shape != expected.pop(name):
            raise ValueError(f"{folder}: {name} has shape {shape}, which contradicts d_in={d_in}, d_sae={d_sae}")
        if not finite:
            raise ValueError(f"{folder}: {name} contains NaN or infinite values")
    if expected:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} lacks {', '.join(expected)}")
    return config


def _inspect(path: Path) -> dict[str, tuple[list[int], bool]]:
    """Shape and finiteness of every tensor of a safetensors file, without torch."""
    import numpy
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                # numpy has no bfloat16; load_sae looks at those.
                finite = view.get_dtype() == "BF16" or bool(numpy.isfinite(file.get_tensor(name)).all())
                found[name] = (list(view.get_shape()), finite)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is corrupted or no safetensors file ({error})") from None
    return found


def load_sae(folder: Path | str) -> "SAE":
    """The SAE of a folder, on the CPU, frozen; SAELens options are folded into its weights.

    Raises:
        ValueError: what `check_sae` refuses.
    """
    from safetensors.torch import load_file

    from saerl_cli.sae.autoencoder import SAE

    config = check_sae(folder)
    tensors = {name: value.float() for name, value in load_file(Path(folder) / WEIGHTS_FILE).items()}
    if not all(value.isfinite().all() for value in tensors.values()):
        raise ValueError(f"{folder}: {WEIGHTS_FILE} contains NaN or infinite values")
    if not config.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    if config.get("rescale_acts_by_decoder_norm", False):  # selection on pre * |W_dec|: see saerl_cli.sae.train
        norm = tensors["W_dec"].norm(dim=-1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm, tensors["b_enc"] * norm
        tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    sae = SAE(config["d_in"], config["d_sae"], config["architecture"], config.get("k"))
    sae.load_state_dict({name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    sae.metadata = config.get("metadata") or {}
    sae.site = provenance(config).get("site") or Path(folder).name
    return sae


def find_saes(path: Path | str) -> dict[str, Path]:
    """Site name -> SAE folder, for a run of `saerl train-sae`, its `sae` folder, a folder of SAEs, or one SAE.

    Raises:
        ValueError: nothing there, or two SAEs of one site.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no SAEs at {path}: no such folder")
    if (path / CONFIG_FILE).is_file():
        folders = [path]
    else:
        root = path / "sae" if (path / "sae").is_dir() else path
        folders = sorted(child for child in root.iterdir() if child.name[0] != "." and (child / CONFIG_FILE).is_file())
    if not folders:
        raise ValueError(
            f"no SAEs in {path}: expected a run directory of `saerl train-sae` or a folder with {CONFIG_FILE}"
        )
    saes: dict[str, Path] = {}
    for folder in folders:
        site = provenance(read_sae_config(folder)).get("site") or folder.name
        if site in saes:
            raise ValueError(f"{saes[site]} and {folder} are both SAEs of {site}; name one of them")
        saes[site] = folder
    return saes
