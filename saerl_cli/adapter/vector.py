"""One trainable vector at the output of a module: a PEFT method for the simplest baselines.

shift   h' = h + v          a steering vector; at modules with a bias, that bias (BitFit, Ben Zaken et al. 2021)
scale   h' = h * (1 + v)    a coefficient on every neuron of the output

h, h': [..., width];  v: [width], float32, 0 at the start, where both are the base model to the bit
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from saerl_cli.adapter.layer import Coefficients, Transparent, on_activation

PEFT_TYPE: Any = "ACTIVATION_VECTOR"  # as for SPARSE_COEFFS
KINDS = ("shift", "scale")


def apply_vector(h: Tensor, kind: str, vector: Tensor) -> Tensor:
    """The formulas above, in float32: [..., width] and [width] to [..., width]."""
    with torch.autocast(h.device.type, enabled=False):
        x = h.float()
        return (x + vector if kind == "shift" else x * (1 + vector)).to(h.dtype)


@dataclass
class VectorConfig(PeftConfig):
    """Configuration of `VectorModel`.

    Args:
        widths: path of a module -> size of its output.
        kind: `shift` or `scale`.
        target_modules: as in every PEFT method; all keys of `widths` when left out.
        exclude_modules: modules to leave alone: a list of names or a regular expression.
        modules_to_save: further modules that are trained and saved whole.
    """

    widths: dict[str, int] | None = field(default=None)
    kind: str = field(default="shift")
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; there are {', '.join(KINDS)}")
        if self.target_modules is None and self.widths:
            self.target_modules = sorted(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in a fixed order, so that equal adapters are equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


class VectorLayer(Transparent, BaseTunerLayer):
    """A module of the base model with a vector at its output."""

    inner = "base_layer"
    adapter_layer_names = ("activation_vector_v",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, kind: str, width: int, device: torch.device):
        super().__init__()
        self.base_layer = base_layer
        self.kind, self.width, self.device = kind, width, device
        self.activation_vector_v = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, trainable: bool) -> None:
        """Add an adapter that changes nothing yet."""
        self.activation_vector_v[adapter_name] = Coefficients(self.width, self.device).requires_grad_(trainable)

    def total(self, adapter_names: Any) -> Tensor | None:
        """Several adapters as one: shifts add, factors multiply; [width], None where none of them is here."""
        held: Any = self.activation_vector_v
        vectors = [held[name].weight for name in adapter_names if name in held]
        if not vectors:
            return None
        if self.kind == "shift":
            return functools.reduce(torch.add, vectors)
        return functools.reduce(lambda a, b: a + b + a * b, vectors)  # (1 + a)(1 + b) - 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the active adapters' vector in it."""
        output = self.base_layer(*args, **kwargs)
        total = None if self.disable_adapters else self.total(self.active_adapters)
        return output if total is None else on_activation(output, lambda h: apply_vector(h, self.kind, total))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what a module's output is worth to weights depends on the module; `saerl export` knows."""
        raise NotImplementedError("activation vectors are not merged in place; use merge_and_unload()")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """What PEFT's `unload()` and `merge_and_unload()` put in this layer's place."""
        total = self.total(check_adapters_to_merge(self, adapter_names)) if merge else None
        if total is None:
            return self.base_layer
        return FixedVector(self.base_layer, self.kind, total)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Keep vectors in float32; PEFT would cast them to the base weights' dtype."""
        if adapter_name in self.activation_vector_v:
            self.activation_vector_v[adapter_name].to(device or self.device, torch.float32)


class FixedVector(Transparent):
    """The same with a fixed vector and no trace of PEFT."""

    inner = "base"

    def __init__(self, base: nn.Module, kind: str, vector: Tensor):
        super().__init__()
        self.vector: Tensor
        self.register_buffer("vector", vector.detach().clone())
        self.base, self.kind = base, kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the vector in it."""
        return on_activation(self.base(*args, **kwargs), lambda h: apply_vector(h, self.kind, self.vector))


class VectorModel(BaseTuner):
    """A model whose only trainable parameters are vectors at the outputs of modules.

    Example:
        >>> policy = get_peft_model(model, VectorConfig(widths={"gpt_neox.layers.3": 512}))
    """

    prefix: str = "activation_vector_"
    tuner_layer_cls = VectorLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        trainable = adapter_name in self.active_adapters and not peft_config.inference_mode
        if isinstance(target, VectorLayer):
            if target.kind != peft_config.kind:
                raise ValueError(f"{current_key} already carries an adapter of kind {target.kind}")
            target.update_layer(adapter_name, trainable)
            return
        if current_key not in (peft_config.widths or {}):
            raise ValueError(f"target_modules picks {current_key!r}, whose width `widths` does not say")
        weight = next(target.parameters(), next(self.model.parameters()))
        layer = VectorLayer(target, peft_config.kind, peft_config.widths[current_key], weight.device)
        layer.update_layer(adapter_name, trainable)
        layer._active_adapter = self.active_adapters
        if isinstance(parent, VectorLayer):  # a site inside a site
            parent = parent.base_layer
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a weight, which a site need not have

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        while any(isinstance(module, VectorLayer) for module in model.modules()):  # sites inside sites
            super()._unload_and_optionally_merge(*args, **kwargs)
        return model
