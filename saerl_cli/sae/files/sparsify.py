"""SAE folders of sparsify (`eai-sparsify` 1.3): `cfg.json` and `sae.safetensors`, one folder a hookpoint.

A hookpoint is a module's path below the model's head: `layers.3.mlp` is `gpt_neox.layers.3.mlp`, our `mlp_out.3`. An
SAE keeps the k largest of relu((x - b_dec) encoder.weight^T + encoder.bias); a transcoder subtracts nothing and
predicts the module's output from its input, so both have the same width. It has topk alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.models import FAMILIES, NEOX
from saerl_cli.run.files import atomic_folder, read_json, write_json, write_safetensors
from saerl_cli.sae.files.saelens import finite_weights, metadata_of, provenance, refuse_metadata
from saerl_cli.sae.files.weights import SaeInfo, build_sae, finite_tensors, info_of, inspect_tensors, refuse_tensors

if TYPE_CHECKING:
    from saerl_cli.sae.autoencoder import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
UNREADABLE = {"skip_connection": False, "signed": False, "activation": "topk"}
"""Settings that change what is computed -> the only value that can be read."""


def is_folder(path: Path) -> bool:
    """Whether a folder is one of this format, sound or not."""
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def check_folder(folder: Path) -> SaeInfo:
    """What is in a folder, without torch.

    Raises:
        ValueError: settings that are malformed or cannot be read; tensors that are missing, unknown, of other shapes,
            NaN or infinite.
    """
    config = _read_config(folder)
    d_in, d_sae, path = config["d_in"], config["num_latents"], folder / WEIGHTS_FILE
    shapes = {"encoder.weight": [d_sae, d_in], "encoder.bias": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    refuse_tensors(path, inspect_tensors(path), shapes, f"d_in={d_in}, num_latents={d_sae}")
    site, target = _sites(folder, config)
    return SaeInfo(site, "topk", d_in, d_sae, d_in if config["transcode"] else None, target)


def _read_config(folder: Path) -> dict[str, Any]:
    """`cfg.json` with every setting in it that is needed."""
    path = folder / CONFIG_FILE
    try:
        config = {"transcode": False, **UNREADABLE, **read_json(path)}
        config["num_latents"] = config.get("num_latents") or config["d_in"] * config["expansion_factor"]
        sizes = [config[name] for name in ("d_in", "num_latents", "k")]
        refuse_metadata(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from None
    for name, value in UNREADABLE.items():
        if config[name] != value:
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported, only {value!r}")
    if not all(isinstance(size, int) and size > 0 for size in sizes) or config["k"] > config["num_latents"]:
        raise ValueError(
            f"{path} is malformed: d_in, num_latents and k are numbers >= 1, k <= num_latents; got {sizes}"
        )
    return config


def _sites(folder: Path, config: dict[str, Any]) -> tuple[str, str | None]:
    """Site and, for a transcoder, target: ours where recorded, else what the hookpoint says."""
    ours = provenance(config)
    if ours.get("site"):
        return ours["site"], ours.get("target")
    name = folder.parent.name if folder.name.startswith("seed") else folder.name
    site = _site_of(name) or name
    position = site.partition(".")[0]
    return _around_mlp(site) if config["transcode"] and position == "mlp_out" else (site, None)


def _site_of(hookpoint: str) -> str | None:
    """`layers.3.mlp` -> `mlp_out.3`, for the architectures that have named sites."""
    layer = next((part for part in hookpoint.split(".") if part.isdigit()), "")
    for modules in FAMILIES.values():
        for position, module in modules.items():
            if _below_head(module.format(layer)) == hookpoint:
                return f"{position}.{layer}"
    return None


def _below_head(module: str) -> str:
    """`gpt_neox.layers.3.mlp` -> `layers.3.mlp`."""
    return module.partition(".")[2] or module


def load_sae(folder: Path) -> "SAE":
    """The SAE or transcoder of a folder, on the CPU, frozen; decoder rows keep their norms.

    Raises:
        ValueError: what `check_folder` refuses.
    """
    from safetensors.torch import load_file

    info, config = check_folder(folder), _read_config(folder)
    tensors = finite_tensors(folder / WEIGHTS_FILE, load_file(folder / WEIGHTS_FILE))
    tensors["W_enc"], tensors["b_enc"] = tensors.pop("encoder.weight").T.contiguous(), tensors.pop("encoder.bias")
    sae = build_sae(tensors, "topk", config["k"], transcoder=config["transcode"])
    sae.site, sae.target = info.site, info.target
    sae.metadata = config.get("metadata") or {}
    return sae


# --- writing ---------------------------------------------------------------------------------------------------------


def place(sae: "SAE", name: str | None = None) -> str:
    """Where `saerl export` puts an SAE: its hookpoint, by which sparsify and delphi find the module.

    Args:
        sae: the SAE.
        name: what tells it from others of its site, if there are any.
    """
    site = sae.target or sae.site or "sae"
    position, _, layer = site.partition(".")
    module = None if sae.target else provenance({"metadata": sae.metadata}).get("module")
    if module is None and position in NEOX:
        module = NEOX[position].format(layer)
    hookpoint = _below_head(module) if module else site
    return hookpoint if name is None else f"{hookpoint}/{name}"


def refuse_unwritable(info: SaeInfo) -> None:
    """`ValueError` for another architecture than topk, and for transcoders that are not of one module."""
    if info.architecture != "topk":
        raise ValueError(
            f"the SAE at {info.site} is {info.architecture}, and sparsify has topk alone: no k says what its"
            " thresholds do; use --to saelens or --to dictionary_learning"
        )
    if info.target is not None and (info.site, info.target) != _around_mlp(info.target):
        raise ValueError(
            f"the transcoder from {info.site} to {info.target} cannot be written: those of sparsify predict a module's"
            " output from its input, as from mlp_in.3 to mlp_out.3"
        )
    if info.d_out not in (None, info.d_in):
        raise ValueError(
            f"the transcoder at {info.site} cannot be written: its widths are {info.d_in} and {info.d_out}, and in"
            " sparsify they are equal"
        )


def _around_mlp(target: str) -> tuple[str, str]:
    """Input and output of the MLP whose output is `target`."""
    layer = target.partition(".")[2]
    return f"mlp_in.{layer}", f"mlp_out.{layer}"


def recipe(folder: Path) -> str:
    """How sparsify loads a folder."""
    return f"""\
from sparsify import SparseCoder
sae = SparseCoder.load_from_disk("{folder}")
values, indices, _ = sae.encode(activations)"""


def save_sae(sae: "SAE", folder: Path) -> None:
    """Write a folder that sparsify's `SparseCoder.load_from_disk` reads; an existing folder is replaced.

    Raises:
        ValueError: what `refuse_unwritable` refuses, or a weight that is NaN or infinite.
    """
    refuse_unwritable(info_of(sae))
    weights = finite_weights(sae)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": sae.transcoder,
        "d_in": sae.d_in,
        "metadata": metadata_of(sae),  # sparsify drops what it does not know
    }
    tensors = {"W_dec": weights["W_dec"], "b_dec": weights["b_dec"], "encoder.bias": weights["b_enc"]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=True) as temporary:
        write_json(temporary / CONFIG_FILE, config)
        write_safetensors(temporary / WEIGHTS_FILE, tensors | {"encoder.weight": weights["W_enc"].T.contiguous()}, {})
