"""From the settings of an adapter to its PEFT configuration: the only thing in which trainers of adapters differ."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from torch import nn

from saerl_cli.adapter.config import sparse_coeffs
from saerl_cli.adapter.vector import VectorConfig
from saerl_cli.config.adapter import COEFFICIENTS, SITES, AdapterConfig, AdapterKind
from saerl_cli.models import Loaded, resolve_sites

ALPHA = 32.0
"""LoRA's scale is alpha / rank, so that one learning rate fits all ranks (Schulman et al. 2025)."""


def peft_config(adapter: AdapterConfig, loaded: Loaded, saes: Mapping[str, Path] | None = None) -> PeftConfig | None:
    """The PEFT configuration of an adapter; None for `full`, which needs none.

    Args:
        adapter: the settings.
        loaded: the model, which is only looked at.
        saes: site -> SAE folder (sparse_coeffs, random_dictionary).

    Raises:
        ValueError: a site, layer or bias that the model lacks, or SAEs that do not fit it.
    """
    kind, model = adapter.kind, loaded.model
    if kind is AdapterKind.full:
        return None
    if kind in COEFFICIENTS:
        gates = adapter.sparsity.hard_concrete is not None
        return sparse_coeffs(loaded, saes or {}, splice=adapter.splice.value, gates=gates)
    if kind is AdapterKind.lora:
        targets, rank = lora_shape(adapter, model)
        alpha = ALPHA if adapter.alpha is None else adapter.alpha
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=sorted(targets))  # pyright: ignore[reportArgumentType] (a float will do)
    if kind is AdapterKind.ia3:
        return ia3_config(adapter, model)
    if kind is AdapterKind.bias_only:
        return VectorConfig(task_type="CAUSAL_LM", widths=biased(model))
    sites = resolve_sites(adapter.sites or SITES[kind], model)
    how = "scale" if kind is AdapterKind.neuron_basis else "shift"
    return VectorConfig(task_type="CAUSAL_LM", kind=how, widths={site.module: site.width for site in sites})


def linear_layers(model: Any) -> dict[str, list[nn.Linear]]:
    """Last part of their name -> the linear layers of a model, without its head."""
    head = model.get_output_embeddings()
    found = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name.rpartition(".")[2]].append(module)
    return dict(found)


def lora_shape(adapter: AdapterConfig, model: nn.Module) -> tuple[list[str], int]:
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


def ia3_config(adapter: AdapterConfig, model: Any) -> IA3Config:
    """IA3 where PEFT puts it for this architecture, or at `adapter.targets`.

    Layers that PEFT knows as the MLP's second ones are scaled at their input, the hidden units; others at their output.

    Raises:
        ValueError: PEFT does not know the architecture and no targets are given, or one is no linear layer.
    """
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


def biased(model: Any) -> dict[str, int]:
    """Path -> width of every module that has a bias.

    Raises:
        ValueError: none has.
    """
    found = {
        name: module.bias.numel()
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    if not found:
        raise ValueError(
            f"this model ({type(model).__name__}) has no biases, so adapter=bias_only has nothing to train;"
            " adapter=steering_vector adds one vector a layer"
        )
    return found
