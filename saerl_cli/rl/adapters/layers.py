"""Adapters of a model's own layers and sites: their checks without torch and their PEFT configurations."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.groups import Dtype, ModelConfig, ModelKind
from saerl_cli.models import locate, resolve_sites
from saerl_cli.planted.cache import planted_folder

if TYPE_CHECKING:
    from peft import IA3Config, LoraConfig, PeftConfig
    from torch import nn

    from saerl_cli.models import Loaded

ALPHA = 32.0
"""LoRA's scale is alpha / rank, so that one learning rate fits all ranks (Schulman et al. 2025)."""
NO_BIASES = (
    "this model ({}) has no biases, so adapter=bias_only has nothing to train;"
    " adapter=steering_vector adds one vector a layer"
)

# --- checks before work ----------------------------------------------------------------------------------------------


def check_precision(adapter: AdapterConfig, model: ModelConfig, description: Any) -> None:
    """Refuse to train weights that are held in a low precision."""
    if model.dtype is not Dtype.float32:
        raise ValueError(
            f"adapter=full trains the weights, which model.dtype={model.dtype.value} rounds away; write"
            " model.dtype=float32 launch.mixed_precision=bf16"
        )


def check_sites(adapter: AdapterConfig, model: ModelConfig, description: Any, *, default: list[str]) -> None:
    """Refuse sites that are not there."""
    resolve_sites(adapter.sites or default, description)


def check_layers(adapter: AdapterConfig, model: ModelConfig, description: Any) -> None:
    """Refuse targets that are no layer of the model, where its weights can be looked at."""
    names = weight_names(model)
    layers = sorted({name.split(".")[-2] for name in names if name.endswith(".weight") and name.count(".") > 1})
    for target in adapter.targets or []:
        if names and target not in layers:
            raise ValueError(
                f"adapter.targets: no layer of this model is called {target}; there are {', '.join(layers)}"
            )


def check_biases(adapter: AdapterConfig, model: ModelConfig, description: Any) -> None:
    """Refuse a model without biases, where its weights can be looked at."""
    names = weight_names(model)
    if names and not any(name.endswith(".bias") for name in names):
        raise ValueError(NO_BIASES.format(description.model_type))


def weight_names(model: ModelConfig) -> set[str]:
    """Names of a model's weights where they can be had at once; none where loading will tell."""
    folder = planted_folder(model.planted) if model.kind is ModelKind.planted else None
    if model.kind is ModelKind.local:
        folder = locate(model)
    names: set[str] = set()
    for file in folder.glob("*.safetensors") if folder else ():
        with safe_open(file, framework="numpy") as tensors:
            names.update(tensors.keys())
    return names


# --- PEFT configurations ---------------------------------------------------------------------------------------------


def lora_config(adapter: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path]) -> "LoraConfig":
    """LoRA of every linear layer but the head, or of `adapter.targets`."""
    from peft import LoraConfig

    targets, rank = lora_shape(adapter, loaded.model)
    alpha: Any = ALPHA if adapter.alpha is None else adapter.alpha  # declared int; a float will do
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=sorted(targets))


def linear_layers(model: Any) -> "dict[str, list[nn.Linear]]":
    """Last part of their name -> the linear layers of a model, without its head."""
    from torch import nn

    head = model.get_output_embeddings()
    found = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name.rpartition(".")[2]].append(module)
    return dict(found)


def lora_shape(adapter: AdapterConfig, model: Any) -> tuple[list[str], int]:
    """Names of the layers that LoRA adapts, and its rank.

    `match` takes the rank, and without `targets` also the layers (all, or all of one name), that come nearest to so
    many parameters; of two equally near the one with more layers. A rank-r update of a layer has r * (in + out).

    Raises:
        ValueError: `targets` names no linear layer.
    """
    layers = linear_layers(model)
    everything = check_targets(adapter.targets, layers) if adapter.targets else list(layers)
    if adapter.match is None:
        return everything, adapter.rank or 1
    candidates = [everything] if adapter.targets else [everything, *([name] for name in layers)]
    best: tuple[int, list[str], int] | None = None
    for names in candidates:
        per_rank = sum(m.in_features + m.out_features for name in names for m in layers[name])
        rank = max(1, round(adapter.match / per_rank))
        distance = abs(rank * per_rank - adapter.match)
        if best is None or distance < best[0]:
            best = distance, names, rank
    assert best is not None
    return best[1:]


def check_targets(targets: list[str], layers: Mapping[str, Any]) -> list[str]:
    """`targets`, each of which is the name of a linear layer.

    Raises:
        ValueError: one is not, or is the head.
    """
    for name in targets:
        if name not in layers:
            raise ValueError(
                f"adapter.targets: no linear layer of this model is called {name}; there are {', '.join(layers)}"
            )
    return targets


def ia3_config(adapter: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path]) -> "IA3Config":
    """IA3 where PEFT puts it for this architecture, or at `adapter.targets`.

    Layers that PEFT knows as the MLP's second ones are scaled at their input, the hidden units; others at their output.

    Raises:
        ValueError: PEFT does not know the architecture and no targets are given, or one is no linear layer.
    """
    from peft import IA3Config
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    model = loaded.model
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type)
    if adapter.targets:
        targets = check_targets(adapter.targets, linear_layers(model))
        inputs = [name for name in targets if name in (known or [])]
        return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=inputs)
    if known is None:
        names = ", ".join(linear_layers(model))
        raise ValueError(
            f"PEFT does not say where IA3 goes in a {model.config.model_type}; name layers in adapter.targets: {names}"
        )
    return IA3Config(task_type="CAUSAL_LM")


def bias_config(adapter: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path]) -> "PeftConfig":
    """A vector at the output of every module that has a bias.

    Raises:
        ValueError: none has.
    """
    from torch import nn

    from saerl_cli.adapter import VectorConfig

    biases = {name: getattr(module, "bias", None) for name, module in loaded.model.named_modules()}
    widths = {name: bias.numel() for name, bias in biases.items() if isinstance(bias, nn.Parameter)}
    if not widths:
        raise ValueError(NO_BIASES.format(type(loaded.model).__name__))
    return VectorConfig(task_type="CAUSAL_LM", widths=widths)


def vector_config(
    adapter: AdapterConfig, loaded: "Loaded", saes: Mapping[str, Path], *, kind: str, default: list[str]
) -> "PeftConfig":
    """A vector at every site, `kind` one of `shift` and `scale`."""
    from saerl_cli.adapter import VectorConfig

    sites = resolve_sites(adapter.sites or default, loaded.model)
    return VectorConfig(task_type="CAUSAL_LM", kind=kind, widths={site.module: site.width for site in sites})
