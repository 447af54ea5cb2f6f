"""SAE folders of `dictionary_learning` 0.1: `ae.pt`, a state dict, and `config.json`.

What its classes compute (x: activations, f: features), by which they are read and written:

    AutoEncoder        f = relu((x - bias) encoder.weight^T + encoder.bias), rows scaled to norm 1 by its loader
    AutoEncoderNew     the same without subtracting the bias
    AutoEncoderTopK    the k largest of those f
    BatchTopKSAE       those f above `threshold`, one number for all features; -1 while it has not been set
    Matryoshka...      BatchTopKSAE with the tensors named as in JumpReluAutoEncoder
    JumpReluAutoEncoder  pre = x W_enc + b_enc without subtracting b_dec; pre where pre > threshold
    GatedAutoEncoder   as in SAELens, with r_mag, gate_bias, mag_bias

It has no transcoders. Tensor files are read with `weights_only=True`: nothing is unpickled.
"""

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.run.files import atomic_folder, read_json, write_json
from saerl_cli.sae.files.saelens import finite_weights, metadata_of, provenance, refuse_metadata
from saerl_cli.sae.files.weights import (
    SaeInfo,
    build_sae,
    finite_tensors,
    gated_as_jumprelu,
    info_of,
    refuse_tensors,
    uncentred_bias,
    unit_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"

CLASSES = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "jumprelu",
}
"""Its classes that are read -> what they are read as."""

WRITTEN = {
    "standard": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}
"""Our architectures -> the class, and the trainer by which its tools tell it."""

NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
"""Names of its tensors -> those of `weights`; other names are the same. Weights of linear layers are transposed."""

POSITIONS = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attention_out": "attn_out"}


def is_folder(path: Path) -> bool:
    """Whether a folder is one of this format, sound or not."""
    return (path / WEIGHTS_FILE).is_file()


def check_folder(folder: Path) -> SaeInfo:
    """What is in a folder, without torch: the tensors themselves are looked at by `load_sae`.

    Raises:
        ValueError: the settings are missing or malformed, of a class that cannot be read, or the file is cut short.
    """
    config = _read_config(folder)
    if not zipfile.is_zipfile(folder / WEIGHTS_FILE):
        raise ValueError(f"{folder / WEIGHTS_FILE} is corrupted or was not written by torch.save")
    trainer = config["trainer"]
    kind = CLASSES[trainer["dict_class"]]
    return SaeInfo(_site(folder, config), kind, trainer["activation_dim"], trainer["dict_size"])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has {WEIGHTS_FILE} but no {CONFIG_FILE} to say what it holds")
    try:
        config = read_json(path)
        trainer = config["trainer"]
        kind, sizes = trainer["dict_class"], [trainer[name] for name in ("activation_dim", "dict_size")]
        refuse_metadata(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from None
    if kind not in CLASSES:
        raise ValueError(f"{path}: dict_class {kind!r} is not supported; supported: {', '.join(CLASSES)}")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path} is malformed: activation_dim and dict_size are numbers >= 1, got {sizes}")
    k = trainer.get("k")
    if CLASSES[kind] == "topk" and not (isinstance(k, int) and 1 <= k <= sizes[1]):
        raise ValueError(f"{path}: {kind} needs k between 1 and dict_size={sizes[1]}, got {k}")
    return config


def _site(folder: Path, config: dict[str, Any]) -> str:
    """Our site, or what its trainers write: `mlp_out_layer_3`; else the folder above `trainer_0`."""
    named = re.fullmatch(r"(\w+)_layer_(\d+)", str(config["trainer"].get("submodule_name")))
    if named and named[1] in POSITIONS:
        named = f"{POSITIONS[named[1]]}.{named[2]}"
    else:
        named = folder.parent.name if folder.name.startswith("trainer_") else folder.name
    return provenance(config).get("site") or named


def load_sae(folder: Path) -> "SAE":
    """The SAE of a folder, on the CPU, frozen; BatchTopK, Matryoshka and gated ones as the JumpReLU that they equal.

    Raises:
        ValueError: what `check_folder` refuses, tensors that are missing, unknown, of other shapes, NaN or infinite, a
            file that holds more than tensors, or a threshold that was never set.
    """
    info, config = check_folder(folder), _read_config(folder)
    kind, k = config["trainer"]["dict_class"], config["trainer"].get("k")
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    stored_k = tensors.pop("k", None)
    if info.architecture == "topk" and stored_k is not None and int(stored_k) != k:
        raise ValueError(f"{folder}: {CONFIG_FILE} says k={k}, but {WEIGHTS_FILE} says k={int(stored_k)}")
    tensors.pop("group_sizes", None)
    if info.architecture == "topk":
        tensors.pop("threshold", None)  # an alternative to k that its `encode` does not use by default
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        tensors["threshold"] = _one_a_feature(folder, tensors.get("threshold"), info.d_sae)
    found = {name: (list(value.shape), bool(value.isfinite().all())) for name, value in tensors.items()}
    sizes = f"activation_dim={info.d_in}, dict_size={info.d_sae}"
    refuse_tensors(folder / WEIGHTS_FILE, found, _shapes(info, kind), sizes)
    tensors = finite_tensors(folder / WEIGHTS_FILE, tensors)
    sae = build_sae(
        gated_as_jumprelu(tensors) if kind == "GatedAutoEncoder" else tensors,
        info.architecture,
        k if info.architecture == "topk" else None,
        centred=kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
    )
    sae.site = info.site
    model = config["trainer"].get("lm_name")
    sae.metadata = config.get("metadata") or ({"model_name": model} if model else {})
    return sae


def _read_tensors(path: Path) -> "dict[str, Tensor]":
    """The state dict of a file, in the names of `weights`."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, pickle's and zip's
        raise ValueError(
            f"{path} is corrupted, or holds more than tensors, which could run code and is not read"
            f" ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict: it should hold tensors by name")
    return {
        NAMES.get(name) or str(name): value.T.contiguous()
        if str(name).endswith(".weight") and value.ndim == 2
        else value
        for name, value in state.items()
    }


def _one_a_feature(folder: Path, threshold: "Tensor | None", d_sae: int) -> "Tensor":
    """The threshold that all features share, [d_sae]."""
    if threshold is None or threshold.numel() != 1 or float(threshold) < 0:
        said = "has no threshold" if threshold is None else f"has threshold {threshold.flatten()[:3].tolist()}"
        raise ValueError(
            f"{folder}: {WEIGHTS_FILE} {said}: it was never set, which takes more training steps than its"
            " threshold_start_step; without it the SAE has no rule for single tokens"
        )
    return threshold.reshape(1).repeat(d_sae)


def _shapes(info: SaeInfo, kind: str) -> dict[str, list[int]]:
    shapes = {"W_enc": [info.d_in, info.d_sae], "W_dec": [info.d_sae, info.d_in], "b_dec": [info.d_in]}
    gated = kind == "GatedAutoEncoder"
    per_feature = ["b_gate", "b_mag", "r_mag"] if gated else ["b_enc"]
    if info.architecture == "jumprelu" and not gated:
        per_feature.append("threshold")
    return shapes | {name: [info.d_sae] for name in per_feature}


# --- writing ---------------------------------------------------------------------------------------------------------


def place(sae: "SAE", name: str | None = None) -> str:
    """Where `saerl export` puts an SAE: as a trainer of its site, or of the name that tells it from others there."""
    return f"{name or sae.site or 'sae'}/trainer_0"


def refuse_unwritable(info: SaeInfo) -> None:
    """`ValueError` for a transcoder."""
    if info.d_out is not None:
        raise ValueError(f"the transcoder at {info.site} cannot be written: dictionary_learning has autoencoders only")


def recipe(folder: Path) -> str:
    """How dictionary_learning loads a folder."""
    return f"""\
from dictionary_learning.utils import load_dictionary
ae, config = load_dictionary("{folder}", "cpu")
features = ae.encode(activations)"""


def save_sae(sae: "SAE", folder: Path) -> None:
    """Write a folder that `load_dictionary` reads, complete or not at all; an existing folder is replaced.

    Raises:
        ValueError: a transcoder, a weight that is NaN or infinite, or a standard SAE with a feature without direction.
    """
    import torch

    refuse_unwritable(info_of(sae))
    state = _state(sae)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=True) as temporary:
        torch.save(state, temporary / WEIGHTS_FILE)
        write_json(temporary / CONFIG_FILE, _config(sae))


def _state(sae: "SAE") -> "dict[str, Tensor]":
    """The tensors of `sae` in the names and conventions of its class."""
    import torch

    weights = finite_weights(sae)
    if sae.architecture == "jumprelu":
        return weights | {"b_enc": uncentred_bias(sae).detach().float().cpu()}
    if sae.architecture == "standard":
        if not weights["W_dec"].any(dim=-1).all():
            raise ValueError(
                f"the SAE at {sae.site} has a decoder row of zeros, by whose norm dictionary_learning would divide"
            )
        weights = unit_rows(weights)  # its loader would do it, and then compare at a coarse tolerance
    linear = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
    }
    if sae.k is None:
        return linear | {"bias": weights["b_dec"]}
    unset = torch.tensor(-1.0)
    return linear | {"b_dec": weights["b_dec"], "k": torch.tensor(sae.k, dtype=torch.int), "threshold": unset}


def _config(sae: "SAE") -> dict[str, Any]:
    """`config.json`: what its loader and its tools read, and our metadata, which they leave alone."""
    metadata = metadata_of(sae)
    layer = (sae.site or "").rpartition(".")[2]
    dict_class, trainer_class = WRITTEN[sae.architecture]
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": int(layer) if layer.isdigit() else None,
        "lm_name": metadata.get("model_name"),
        "submodule_name": sae.site,
        "wandb_name": "saerl",
        "device": "cpu",
    }
    if sae.k is not None:
        trainer["k"] = sae.k
    buffer = {"d_submodule": sae.d_in, "io": "out", "ctx_len": metadata.get("context_size"), "device": "cpu"}
    return {"trainer": trainer, "buffer": buffer, "metadata": metadata}
