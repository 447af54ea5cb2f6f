"""What our PEFT methods share: layers around modules of the base model that change their output, and their tuner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn


@dataclass
class SiteConfig(PeftConfig):
    """The part of a configuration that says which modules are adapted.

    Args:
        target_modules: modules to adapt: a list of names or a regular expression, as in every PEFT method; all that the
            method's own fields name when left out.
        exclude_modules: modules to leave alone: a list of names or a regular expression.
        modules_to_save: further modules that are trained and saved whole, such as a value head.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in a fixed order, so that equal adapters are equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def on_activation(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a module's output, or to the first item of a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class Coefficients(nn.Module):
    """Numbers that are trained, [size], 0 at the start.

    A module and no bare parameter: its parameter's name then contains `.<adapter>.`, by which TRL copies an adapter
    into its reference `ref`.
    """

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))


class Transparent(nn.Module):
    """A module around another one, whose public attributes it lends: some models read them off their layers."""

    inner: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inner or name.startswith("_"):
                raise
            return getattr(super().__getattr__(self.inner), name)


Total = tuple[Tensor, ...] | tuple[Tensor, Tensor | None]
"""What an adapter's numbers of a site are."""


class SiteLayer(Transparent, BaseTunerLayer):
    """A module of the base model whose output the active adapters change.

    A method says what its adapters are together (`total`), what they do to the output (`change`), and what stands in
    the layer's place when they are fixed (`fixed_module`).

    Attributes:
        base_layer: the wrapped module.
        site: the name of the site, or the module's path in the base model.
    """

    inner = "base_layer"
    other_param_names = ()
    device: Any

    def __init__(self, base_layer: nn.Module, site: str):
        super().__init__()
        self.base_layer, self.site = base_layer, site
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

    def total(self, adapter_names: Sequence[str]) -> Total | None:
        """Several adapters as one; None where none of them is here."""
        raise NotImplementedError

    def change(self, h: Tensor, total: Total) -> Tensor:
        """The output with the adapters in it: [..., width] to the same."""
        raise NotImplementedError

    def fixed_module(self, total: Total) -> nn.Module:
        """A module without PEFT that gives the same output."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with the active adapters in it."""
        output = self.base_layer(*args, **kwargs)
        total = None if self.disable_adapters else self.total(self.active_adapters)
        return output if total is None else on_activation(output, lambda h: self.change(h, total))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refused: no weights of this module equal it."""
        raise NotImplementedError(
            f"{self._get_name()} cannot be merged into weights, so no vLLM; merge_and_unload() fixes it in place"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """What PEFT's `unload()` and `merge_and_unload()` put in this layer's place."""
        total = self.total(check_adapters_to_merge(self, adapter_names)) if merge else None
        if total is None:
            return self.base_layer
        if safe_merge and not all(part.isfinite().all() for part in total if part is not None):
            raise ValueError(f"coefficients of {self.site} are NaN or infinite")
        return self.fixed_module(total)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Keep what is trained in float32; PEFT would cast it to the base weights' dtype."""
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                getattr(self, name)[adapter_name].to(device or self.device, torch.float32)


class SiteTuner(BaseTuner):
    """PEFT's tuner, for modules that need not have weights and may lie inside one another."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    def insert(self, layer: SiteLayer, parent: nn.Module, name: str) -> None:
        """Put a new layer around the module that it was made for."""
        layer._active_adapter = self.active_adapters
        if isinstance(parent, SiteLayer):  # a site inside a site
            parent = parent.base_layer
        setattr(parent, name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a weight, which a site need not have

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        while any(isinstance(module, SiteLayer) for module in model.modules()):  # sites inside sites
            super()._unload_and_optionally_merge(*args, **kwargs)
        return model


def base_path(key: str, inner: str = SiteLayer.inner) -> str:
    """Path of a module in the base model, from one that goes through modules around others."""
    return ".".join(part for part in key.split(".") if part != inner)
