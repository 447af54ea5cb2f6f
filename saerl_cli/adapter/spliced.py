"""Models with fixed coefficients or vectors inside, as folders that `transformers` loads.

A splice is nonlinear, so no weights of the base model equal it. The folder's model type is ours: after
`import saerl_cli.adapter`, `AutoModelForCausalLM.from_pretrained(folder)` builds the base architecture, puts the fixed
modules in and loads all weights from safetensors. No code comes with the folder, and no PEFT is needed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from saerl_cli.adapter.activation_vector.layer import FixedVector
from saerl_cli.adapter.coefficients.splice import FixedSplice
from saerl_cli.adapter.tuner import base_path
from saerl_cli.sae.autoencoder import SAE

FIXED = (FixedSplice, FixedVector)


class SplicedConfig(PretrainedConfig):
    """The base model's config and the shapes of what is put into it.

    Args:
        base: the base model's config as plain data, its `model_type` included.
        fixed: path of a module in the base model -> shape of what follows it (`shape_of`).
    """

    model_type = "saerl_spliced"

    def __init__(self, base: dict[str, Any] | None = None, fixed: dict[str, Any] | None = None, **kwargs: Any):
        self.base, self.fixed = base or {}, fixed or {}
        super().__init__(**kwargs)


class SplicedForCausalLM(PreTrainedModel):
    """The door for `AutoModelForCausalLM`: what it gives is the base model's own class with the fixed modules in it."""

    config_class = SplicedConfig

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As every model's: the folder, and what else transformers accepts."""
        config = config or SplicedConfig.from_pretrained(folder)
        base = AutoConfig.for_model(**config.base)
        return spliced_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(base)], config.fixed).from_pretrained(
            folder, *args, config=base, **kwargs
        )


def spliced_class(architecture: Any, fixed: dict[str, Any]) -> Any:
    """A subclass of a model's class with fixed modules of these shapes in it."""

    class Spliced(architecture):
        _keep_in_fp32_modules_strict = {"sae", "delta", "shift", "vector"}  # noqa: RUF012 (as transformers declares it)

        def __init__(self, config: Any):
            super().__init__(config)
            for path in sorted(fixed, key=lambda path: -path.count(".")):  # a site inside a site comes first
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, empty(self.get_submodule(path), fixed[path]))

        @classmethod
        def is_custom_code(cls) -> bool:
            """No: in files, weights have the names that the library's own class gives and expects."""
            return False

        def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(folder, *args, **kwargs)
            SplicedConfig(self.config.to_dict(), fixed).save_pretrained(folder)

    Spliced.__name__ = architecture.__name__  # by which transformers knows how weights are called in files
    return Spliced


def save_spliced(model: Any, folder: Path) -> bool:
    """Write a model as transformers does, of our model type where fixed modules are left in it, else of its own.

    Args:
        model: what PEFT's `merge_and_unload` gives.
        folder: an existing folder.

    Returns:
        Whether fixed modules are left, so that the folder needs saerl.
    """
    model.save_pretrained(folder)
    fixed = {
        base_path(name, FixedSplice.inner): shape_of(module)
        for name, module in model.named_modules()
        if isinstance(module, FIXED)
    }
    if fixed:
        SplicedConfig(model.config.to_dict(), fixed).save_pretrained(folder)
    return bool(fixed)


def shape_of(module: Any) -> dict[str, Any]:
    """What `empty` needs to know of a fixed module."""
    if isinstance(module, FixedVector):
        return {"kind": module.kind, "width": len(module.vector)}
    sae = module.sae
    sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae, "architecture": sae.architecture, "k": sae.k}
    return {"kind": module.kind, "shift": module.shift is not None, **sizes}


def empty(base: nn.Module, shape: dict[str, Any]) -> nn.Module:
    """A fixed module of a shape around `base`, to be filled from a file."""
    if "width" in shape:
        return FixedVector(base, shape["kind"], torch.zeros(shape["width"]))
    sae = SAE(shape["d_in"], shape["d_sae"], shape["architecture"], shape["k"])
    zeros = torch.zeros(shape["d_sae"])
    return FixedSplice(base, sae, shape["kind"], zeros, zeros if shape["shift"] else None)


AutoConfig.register(SplicedConfig.model_type, SplicedConfig)
AutoModelForCausalLM.register(SplicedConfig, SplicedForCausalLM)
