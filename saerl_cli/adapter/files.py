"""Adapter folders: PEFT's two files, with the policy and nothing else in them."""

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saerl_cli.adapter.coefficients.config import PEFT_TYPE, SparseCoeffConfig
from saerl_cli.adapter.coefficients.gates import gate
from saerl_cli.adapter.coefficients.model import SparseCoeffModel
from saerl_cli.adapter.tuner import base_path
from saerl_cli.run.files import atomic_folder, read_json, write_safetensors, write_text
from saerl_cli.run.shards import is_part
from saerl_cli.sae.files import check_sae

README = """\
Coefficients of sparse-autoencoder features: a PEFT adapter of the kind SPARSE_COEFFS, which the package saerl defines.

    import saerl_cli.adapter  # makes the kind known to PEFT
    from peft import PeftModel

    policy = PeftModel.from_pretrained(base_model, "this folder")

The autoencoders are not in here. `adapter_config.json` says where they were (`saes`, `relative_saes`) and by which hash
they are recognised (`sae_sha256`); they are also found in `../sae/SITE` and `sae/SITE`.
"""


PLAIN_README = """\
A PEFT adapter of the kind {kind}{ours}.

{imports}    from peft import PeftModel

    policy = PeftModel.from_pretrained(base_model, "this folder")
"""


def save_adapter(model: Any, folder: Path | str, adapter_name: str = "default") -> Path:
    """Write the policy alone: what the adapter trains and its configuration, complete or not at all.

    A checkpoint may hold more: a value head in `modules_to_save`, a reference adapter. Neither is part of the policy.
    Gates are multiplied into the coefficients, so that a closed gate is an exact zero.

    Args:
        model: a `PeftModel` of any method.
        folder: the folder to write; an existing one is replaced.
        adapter_name: which adapter.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    folder = Path(folder)
    config = copy.deepcopy(model.peft_config[adapter_name])
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
    own = {key: value for key, value in model.state_dict().items() if not is_part(value)}  # PEFT would gather the rest
    state = get_peft_model_state_dict(model, own, adapter_name, save_embedding_layers=False)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items() if prefix in key}
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} is NaN or infinite: not saved")
    config.modules_to_save, config.inference_mode = None, True
    if config.peft_type == PEFT_TYPE:
        config.gates, state = False, without_gates(state)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder, replace=True) as temporary:
        config.save_pretrained(str(temporary))  # a sibling of `folder`, so paths relative to it are the same
        write_safetensors(temporary / SAFETENSORS_WEIGHTS_NAME, state, {"format": "pt"})
        write_text(temporary / "README.md", readme(config.peft_type))
    return folder


def without_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Coefficients with their gates, as in evaluation mode, multiplied in."""
    kept = {key: value for key, value in state.items() if ".sparse_coeffs_gate." not in key}
    for key in state.keys() - kept.keys():
        delta = key.replace("sparse_coeffs_gate", "sparse_coeffs_delta")
        kept[delta] = kept[delta] * gate(state[key])  # not in place: these are the model's own tensors
    return kept


def readme(kind: Any) -> str:
    """README.md of an adapter folder."""
    if kind == PEFT_TYPE:
        return README
    ours = is_ours(kind)
    return PLAIN_README.format(
        kind=getattr(kind, "value", kind),
        ours=", which the package saerl defines" if ours else "",
        imports="    import saerl_cli.adapter  # makes the kind known to PEFT\n" if ours else "",
    )


def is_ours(kind: Any) -> bool:
    """Whether a PEFT method is defined here, so that loading it takes `import saerl_cli.adapter`."""
    return PEFT_TYPE_TO_TUNER_MAPPING[kind].__module__.startswith(f"{__package__}.")


def check_adapter(folder: Path | str) -> SparseCoeffConfig:
    """Refuse an adapter that cannot be loaded, without a model; returns its configuration.

    Raises:
        ValueError: no such folder, another kind of adapter, damaged files, NaN, an SAE that is missing or another one.
    """
    config, state = read_adapter(Path(folder))
    for path in config.saes or {}:
        sizes = check_sae(config.find_sae(path), config.model_sha256)
        for key, value in state.items():
            if module_of(key) == path and value.shape != (sizes["d_sae"],):
                raise ValueError(
                    f"{folder}: {key} has shape {tuple(value.shape)}, but its SAE has {sizes['d_sae']} features"
                )
    return config


def load_adapter(
    model: Any, folder: Path | str, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """`PeftModel.from_pretrained`, of coefficients after `check_adapter`.

    Args:
        model: the base model; it is wrapped in place.
        folder: an adapter folder of any method.
        adapter_name: name for it in the model.
        is_trainable: whether its coefficients get gradients.

    Raises:
        ValueError: the folder, its SAEs or the model do not fit together.
    """
    if peft_type(Path(folder)) == PEFT_TYPE:
        check_adapter(folder)
    return PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable)


def read_deltas(folder: Path | str) -> dict[str, Tensor]:
    """Site name -> delta, [d_sae], of a saved adapter; needs neither the model nor the SAEs.

    Raises:
        ValueError: no such folder, another kind of adapter, damaged files, NaN.
    """
    config, state = read_adapter(Path(folder))
    sites = config.sites or {}
    return {
        sites.get(module_of(key), module_of(key)): value for key, value in state.items() if "sparse_coeffs_delta" in key
    }


def peft_type(folder: Path) -> Any:
    """The method of an adapter folder.

    Raises:
        ValueError: it is no adapter folder.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"no adapter in {folder}: {name} is missing")
    values = read_json(folder / CONFIG_NAME)
    return values.get("peft_type") if isinstance(values, dict) else None


def read_adapter(folder: Path) -> tuple[SparseCoeffConfig, dict[str, Tensor]]:
    """Configuration of an adapter folder and its coefficients, by their keys in the file; `ValueError` as above."""
    kind = peft_type(folder)
    if kind != PEFT_TYPE:
        raise ValueError(f"{folder} is no adapter of SAE coefficients: its peft_type is {kind!r}, not {PEFT_TYPE!r}")
    config = SparseCoeffConfig.from_pretrained(str(folder))
    try:
        state = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is corrupted ({error})") from None
    state = {key: value for key, value in state.items() if _is_coefficient(key)}
    missing = set(config.saes or {}) - {module_of(key) for key in state}
    if missing:
        raise ValueError(f"{folder} has no coefficients for {min(missing)}")
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{folder}: {key} has NaN or infinite coefficients")
    return config, state


def _is_coefficient(key: str) -> bool:
    return f".{SparseCoeffModel.prefix}" in key


def module_of(key: str) -> str:
    """Module path of a key of the file: `base_model.model.<path>.sparse_coeffs_delta.weight`."""
    path = key.partition(f".{SparseCoeffModel.prefix}")[0].removeprefix("base_model.model.")
    return base_path(path)
