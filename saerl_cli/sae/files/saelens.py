"""SAE folders in the format of SAELens 6: `cfg.json` and `sae_weights.safetensors`. It is the one we train into.

Our provenance is `cfg.json: metadata.saerl` (site, target, module, model_name, model_sha256, revision, training
settings); unknown metadata survives SAELens. Only `load_sae` and `save_sae` import torch: the rest runs in checks
before a run.
"""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.run.files import atomic_folder, read_json, sha256_file, write_json, write_safetensors
from saerl_cli.sae.files.weights import (
    SaeInfo,
    build_sae,
    finite_tensors,
    gated_as_jumprelu,
    inspect_tensors,
    refuse_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the version whose format this is; readers translate files that claim less than 6.0.0

ARCHITECTURES = {
    "standard": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "topk_transcoder": "topk",
}
"""Names in `cfg.json` that are read -> ours. SAELens has no `topk_transcoder`: it is our name, and it refuses it."""

HOOKS = {
    "mlp_in": "blocks.{}.ln2.hook_normalized",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_hidden": "blocks.{}.mlp.hook_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
"""Position of a site -> TransformerLens's name for it, by which SAELens finds it."""

OLD_METADATA = ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path")


def hook_name(site: str) -> str:
    """TransformerLens's name for a site, `mlp_out.3` -> `blocks.3.hook_mlp_out`; another one stays as it is."""
    position, _, layer = site.partition(".")
    return HOOKS.get(position, site).format(layer)


def is_folder(path: Path) -> bool:
    """Whether a folder is one of this format, sound or not."""
    return (path / CONFIG_FILE).is_file() and not (path / "sae.safetensors").is_file()


def check_folder(folder: Path) -> SaeInfo:
    """What is in a folder, without torch; `ValueError` as in `check_sae`."""
    config = check_sae(folder)
    kind, d_out = ARCHITECTURES[config["architecture"]], config["d_out"] if is_transcoder(config) else None
    site, target = site_of(config) or folder.name, provenance(config).get("target")
    return SaeInfo(site, kind, config["d_in"], config["d_sae"], d_out, target)


def place(sae: "SAE", name: str | None = None) -> str:
    """Where `saerl export` puts an SAE: under its site, or the name that tells it from others of its site."""
    return name or sae.site or "sae"


def refuse_unwritable(info: SaeInfo) -> None:
    """Nothing is: every SAE of this package has a place in this format."""


def recipe(folder: Path) -> str:
    """How SAELens loads a folder."""
    return f"""\
from sae_lens import SAE
sae = SAE.load_from_disk("{folder}")
features = sae.encode(activations)"""


def save_sae(sae: "SAE", folder: Path | str, firing_rate: "Tensor | None" = None) -> Path:
    """Write `sae` as a SAELens folder, complete or not at all; an existing folder is replaced.

    SAELens loads what is written, a topk transcoder excepted: it has no such architecture. `load_sae` reads that too.

    Args:
        sae: the autoencoder or transcoder; `sae.metadata` becomes `cfg.json: metadata`.
        folder: the folder to write.
        firing_rate: share of tokens on which each feature fires, [d_sae]; SAELens's `sparsity.safetensors`.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    tensors = finite_weights(sae)
    config: dict[str, Any] = {
        "architecture": _architecture(sae),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not sae.transcoder,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata_of(sae),
    }
    if sae.transcoder:
        config["d_out"] = sae.d_out
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


def finite_weights(sae: "SAE") -> "dict[str, Tensor]":
    """The parameters of `sae` as they are written, float32 on the CPU; `ValueError` when one is NaN or infinite."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in sae.named_parameters()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} of the SAE at {sae.site} is NaN or infinite: not saved")
    return tensors


def _architecture(sae: "SAE") -> str:
    if not sae.transcoder:
        return sae.architecture
    return "transcoder" if sae.architecture == "standard" else f"{sae.architecture}_transcoder"


def metadata_of(sae: "SAE") -> dict[str, Any]:
    """`sae.metadata` as JSON, with what SAELens and our checks look for."""
    metadata = plain(sae.metadata)
    places = {name: value for name, value in (("site", sae.site), ("target", sae.target)) if value is not None}
    hooks = {"site": "hook_name", "target": "hook_name_out"}
    known = {hooks[name]: hook_name(site) for name, site in places.items()}
    metadata = {**known, **metadata, "sae_lens_version": SAELENS_VERSION}
    metadata["saerl"] = {**(metadata.get("saerl") or {}), **places}
    return metadata


def plain(value: Any) -> Any:
    """Settings as JSON has them: enumerations by value, paths and unknown things as text, keys as text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(plain(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_sae_config(folder: Path | str) -> dict[str, Any]:
    """`cfg.json` of an SAE folder in today's form, checked for what `load_sae` can represent.

    Raises:
        ValueError: no such folder or file, or an SAE of a kind that this package does not read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no SAE folder at {folder}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is not an SAE folder: it has no {CONFIG_FILE}")
    if (folder / "sae.safetensors").is_file():
        raise ValueError(f"{folder} is a sparsify folder; convert it with `saerl export {folder} --to saelens`")
    try:
        config = _todays(read_json(path))
        architecture, sizes = config["architecture"], [config[name] for name in ("d_in", "d_sae")]
        if is_transcoder(config):
            sizes.append(config["d_out"])
        refuse_metadata(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from None
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path} is malformed: d_in, d_sae and d_out are numbers >= 1, got {sizes}")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if ARCHITECTURES[architecture] == "topk":
        k = config.get("k")
        if not isinstance(k, int):
            raise ValueError(f"{path}: architecture {architecture} needs an integer k")
        if not 1 <= k <= config["d_sae"]:
            raise ValueError(f"{path}: k must be between 1 and d_sae={config['d_sae']}, got {k}")
    for key in ("normalize_activations", "reshape_activations"):
        if (config.get(key) or "none") != "none":
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported; fold it into the weights first")
    return config


def _todays(config: dict[str, Any]) -> dict[str, Any]:
    """A `cfg.json` from before SAELens 6, where everything lay at the top, in today's form; today's as it is."""
    if "metadata" in config or "d_sae" not in config:
        return config
    config = {"architecture": "standard", **config}
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise ValueError(f"its activation function {activation!r} is not supported")
    if "hook_point" in config:
        config["hook_name"] = config["hook_point"]
    return config | {"metadata": {name: config[name] for name in OLD_METADATA if name in config}}


def is_transcoder(config: dict[str, Any]) -> bool:
    """Whether a `cfg.json` is that of a transcoder, which predicts another site than it reads."""
    return config["architecture"].endswith("transcoder")


def refuse_transcoder(config: dict[str, Any], folder: Path | str, site: str) -> None:
    """`ValueError` for a transcoder where the SAE of a site is needed."""
    if is_transcoder(config):
        raise ValueError(f"{folder} is a transcoder, which predicts another site than {site}; give an SAE")


def sae_sha256(folder: Path | str) -> str:
    """Hash of the weights file, by which adapters and runs name an SAE."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}")
    return sha256_file(path)


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """`metadata.saerl` of a `cfg.json`; empty for an SAE that another tool trained."""
    return (config.get("metadata") or {}).get("saerl") or {}


def refuse_metadata(config: dict[str, Any]) -> None:
    """`TypeError` or `ValueError` for metadata that are not as `provenance` takes them to be."""
    for name in ("site", "target", "module"):
        place = {**provenance(config)}.get(name)
        if not isinstance(place, str | None) or ".." in str(place).split("/") or str(place).startswith("/"):
            raise ValueError(f"{place!r} is no {name}")


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
    trained_on = provenance(config).get("model_sha256")
    if model_sha256 is not None and trained_on is not None and trained_on != model_sha256:
        name = provenance(config).get("model_name", "another model")
        raise ValueError(
            f"the SAE {folder} was trained on other weights ({name}, sha256 {trained_on[:12]}) than this model's"
            f" ({model_sha256[:12]}); train one on this model with `saerl train-sae`"
        )
    if width is not None and config["d_in"] != width:
        raise ValueError(f"the SAE {folder} has d_in={config['d_in']}, but the site has width {width}")
    path = Path(folder) / WEIGHTS_FILE
    found = inspect_tensors(path)
    sizes = f"d_in={config['d_in']}, d_sae={config['d_sae']}"
    refuse_tensors(
        path, found, _shapes(config, found), f"{sizes}, d_out={config['d_out']}" if is_transcoder(config) else sizes
    )
    return config


def _shapes(config: dict[str, Any], found: Any) -> dict[str, list[int]]:
    """Shape of every tensor that the weights file should hold, given the names it does hold."""
    d_in, d_sae = config["d_in"], config["d_sae"]
    d_out = config["d_out"] if is_transcoder(config) else d_in
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_out], "b_dec": [d_out]}
    per_feature = ["b_gate", "b_mag", "r_mag"] if config["architecture"] == "gated" else ["b_enc"]
    if config["architecture"].startswith("jumprelu"):
        per_feature.append("log_threshold" if "log_threshold" in found else "threshold")  # the first until SAELens 4
    if "scaling_factor" in found:
        per_feature.append("scaling_factor")
    return shapes | {name: [d_sae] for name in per_feature}


def load_sae(folder: Path | str) -> "SAE":
    """The SAE of a folder, on the CPU, frozen; SAELens options are folded into its weights.

    A `gated` SAE becomes the `jumprelu` that it equals. Decoder rows get norm 1 where that changes nothing else
    (`saerl_cli.sae.files.weights.build_sae`).

    Raises:
        ValueError: what `check_sae` refuses.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = check_sae(folder)
    tensors = finite_tensors(folder / WEIGHTS_FILE, load_file(folder / WEIGHTS_FILE))
    factor = tensors.pop("scaling_factor", None)  # of decoders finetuned by SAELens 2 to 5
    if factor is not None and not ((factor - 1).abs() < 1e-6).all():
        raise ValueError(f"{folder}: scaling_factor is not supported; fold it into W_dec first")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    sae = build_sae(
        gated_as_jumprelu(tensors) if config["architecture"] == "gated" else tensors,
        ARCHITECTURES[config["architecture"]],
        config["k"] if ARCHITECTURES[config["architecture"]] == "topk" else None,
        transcoder=is_transcoder(config),
        centred=config.get("apply_b_dec_to_input", True),
        rescaled=config.get("rescale_acts_by_decoder_norm", False),
    )
    sae.metadata = config.get("metadata") or {}
    sae.site = site_of(config) or folder.name
    sae.target = provenance(config).get("target")
    return sae


def site_of(config: dict[str, Any]) -> str | None:
    """The site that a `cfg.json` names, by our name or by TransformerLens's; None when it names none of ours."""
    site = provenance(config).get("site")
    hook = str((config.get("metadata") or {}).get("hook_name"))
    layer = hook.split(".")[1] if hook.count(".") else ""
    by_hook = {pattern.format(layer): f"{position}.{layer}" for position, pattern in HOOKS.items()}
    return site or by_hook.get(hook)


def find_saes(path: Path | str) -> dict[str, Path]:
    """Site name -> SAE folder, for a run of `saerl train-sae`, its `sae` folder, a folder of SAEs, or one SAE.

    `RUN/POINT` names the SAEs of one point of a run's `sweep`, for instance `runs/sweep/l1_2`.

    Raises:
        ValueError: nothing there, or two SAEs of one site.
    """
    path = Path(path)
    if not path.is_dir():
        folders = [folder for folder in saes_in(path.parent / "sae") if point_of(folder) == path.name]
        if not folders:
            raise ValueError(f"no SAEs at {path}: no such folder{points_in(path.parent)}")
    elif (path / CONFIG_FILE).is_file():
        folders = [path]
    else:
        folders = saes_in(path / "sae" if (path / "sae").is_dir() else path)
    if not folders:
        raise ValueError(
            f"no SAEs in {path}: expected a run directory of `saerl train-sae` or a folder with {CONFIG_FILE}"
        )
    saes: dict[str, Path] = {}
    for folder in folders:
        site = site_of(read_sae_config(folder)) or folder.name
        if site in saes:
            raise ValueError(f"{saes[site]} and {folder} are both SAEs of {site}; name one of them{points_in(path)}")
        saes[site] = folder
    return saes


def saes_in(root: Path) -> list[Path]:
    """The SAE folders in a folder."""
    children = root.iterdir() if root.is_dir() else ()
    return sorted(child for child in children if child.name[0] != "." and (child / CONFIG_FILE).is_file())


def points_in(run: Path) -> str:
    """What a message says of the points of a run's sweep; empty where it has none."""
    points = dict.fromkeys(filter(None, map(point_of, saes_in(run / "sae"))))
    return f", as {run}/POINT: {', '.join(points)}" if points else ""


def point_of(folder: Path) -> str:
    """The point of a sweep in an SAE folder's name, SITE-POINT; empty without one."""
    return folder.name.partition("-")[2]
