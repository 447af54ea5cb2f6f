"""The tensors of an SAE file: looked at without torch, and put together into an `SAE` whatever their conventions.

Written for all formats, in the names of SAELens: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_out],
`b_dec` [d_out], `threshold` [d_sae].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

UNIT = 1e-6  # a decoder row whose norm is further from 1 is not taken for one that was saved with norm 1


@dataclass(frozen=True)
class SaeInfo:
    """What is known of an SAE before its weights are read."""

    site: str
    """Where its input comes from; the folder's name, where nothing says."""
    architecture: str
    """`standard`, `topk` or `jumprelu`, which it is once it is read."""
    d_in: int
    """Width of its input."""
    d_sae: int
    """Number of features."""
    d_out: int | None = None
    """Width of what a transcoder predicts; None for an autoencoder."""
    target: str | None = None
    """The site that a transcoder predicts, where known."""


def info_of(sae: "SAE") -> SaeInfo:
    """The same of an SAE in memory."""
    d_out = sae.d_out if sae.transcoder else None
    return SaeInfo(sae.site or "sae", sae.architecture, sae.d_in, sae.d_sae, d_out, sae.target)


def inspect_tensors(path: Path) -> dict[str, tuple[list[int], bool]]:
    """Shape and finiteness of every tensor of a safetensors file, without torch.

    Raises:
        ValueError: no such file, or no safetensors file.
    """
    import numpy
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                # numpy has no bfloat16; `finite_tensors` looks at those.
                finite = view.get_dtype() == "BF16" or bool(numpy.isfinite(file.get_tensor(name)).all())
                found[name] = (list(view.get_shape()), finite)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is corrupted or no safetensors file ({error})") from None
    return found


def refuse_tensors(
    path: Path, found: Mapping[str, tuple[list[int], bool]], expected: Mapping[str, list[int]], sizes: str
) -> None:
    """`ValueError` where tensors are missing, unknown, of another shape than `expected`, NaN or infinite.

    Args:
        path: the file of the tensors.
        found: what `inspect_tensors` says.
        expected: name -> shape.
        sizes: where those shapes come from, for instance `d_in=4, d_sae=8`.
    """
    folder = path.parent
    for name, (shape, finite) in found.items():
        if name not in expected:
            raise ValueError(f"{folder}: {path.name} holds {name}, which is no part of an SAE that can be read")
        if shape != expected[name]:
            raise ValueError(f"{folder}: {name} has shape {shape}, which contradicts {sizes}")
        if not finite:
            raise ValueError(f"{folder}: {name} contains NaN or infinite values")
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: {path.name} lacks {', '.join(missing)}")


def finite_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors of the file `path` in float32; `ValueError` when one is NaN or infinite."""
    converted = {name: value.detach().float() for name, value in tensors.items()}
    for name, value in converted.items():
        if not value.isfinite().all():
            raise ValueError(f"{path.parent}: {name} contains NaN or infinite values")
    return converted


def build_sae(
    tensors: "Mapping[str, Tensor]",
    architecture: str,
    k: int | None = None,
    transcoder: bool = False,
    centred: bool = True,
    rescaled: bool = False,
) -> "SAE":
    """The `SAE` that computes the same x^ and fires on the same tokens as the tensors of another convention.

    Decoder rows get norm 1: f_i is multiplied by what row i is divided by. Not those of a topk SAE, where norms would
    change which features are chosen, unless they already take part in the choice (`rescaled`).

    Args:
        tensors: float32, in the names of this module; `threshold` for jumprelu.
        architecture: `standard`, `topk` or `jumprelu`.
        k: active features a token (topk).
        transcoder: nothing is subtracted from x, and x^ is not of x.
        centred: the encoder acts on x - b_dec, and not on x (autoencoders).
        rescaled: the features of a topk SAE are chosen by pre-activation times decoder norm.

    Raises:
        ValueError: k is out of range or does not belong.
    """
    from saerl_cli.sae.autoencoder import SAE

    weights = dict(tensors)
    if not centred and not transcoder:  # x W + b = (x - b_dec) W + (b + b_dec W)
        weights["b_enc"] = weights["b_enc"] + _product(weights["b_dec"], weights["W_enc"])
    if rescaled or architecture != "topk":
        weights = unit_rows(weights)
    d_in, d_sae = weights["W_enc"].shape
    sae = SAE(d_in, d_sae, architecture, k, weights["W_dec"].shape[1] if transcoder else None)
    sae.load_state_dict(weights)
    return sae


def unit_rows(weights: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The same SAE with decoder rows of norm 1; a row of zeros stays one, since no scale makes it a direction."""
    import torch

    norm = torch.linalg.vector_norm(weights["W_dec"], dim=-1, dtype=torch.float64)
    norm = torch.where(norm == 0, 1.0, norm)
    if ((norm - 1).abs() <= UNIT).all():
        return dict(weights)
    scale = norm.float()
    scaled = {name: value * scale for name, value in weights.items() if name in ("W_enc", "b_enc", "threshold")}
    return {**weights, **scaled, "W_dec": weights["W_dec"] / scale[:, None]}


def gated_as_jumprelu(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The JumpReLU SAE that a gated one equals (Rajamanoharan et al. 2024a, section 3.2).

    With u = x W_enc, a feature fires where u + b_gate > 0 and is relu(e^r u + b_mag) there. In terms of
    pre = e^r u + b_mag it fires where pre > b_mag - e^r b_gate, and is not 0 only where pre > 0.

    Args:
        tensors: `W_enc`, `W_dec`, `b_dec`, and `r_mag`, `b_gate`, `b_mag`, each [d_sae].
    """
    scale = tensors["r_mag"].exp()
    return {
        "W_enc": tensors["W_enc"] * scale,
        "b_enc": tensors["b_mag"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "threshold": (tensors["b_mag"] - scale * tensors["b_gate"]).clamp(min=0),
    }


def uncentred_bias(sae: "SAE") -> "Tensor":
    """The bias of an encoder that acts on x itself, [d_sae]: `b_enc - b_dec W_enc`."""
    return sae.b_enc if sae.transcoder else sae.b_enc - _product(sae.b_dec, sae.W_enc)


def _product(row: "Tensor", matrix: "Tensor") -> "Tensor":
    """A row times a matrix, summed up in float64: what is folded should cost no precision."""
    return (row.double() @ matrix.double()).float()
