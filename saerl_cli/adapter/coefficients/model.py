"""Puts coefficients into a model: PEFT's tuner for `SparseCoeffConfig`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.adapter.coefficients.config import SparseCoeffConfig, trained_on
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.adapter.tuner import SiteTuner, base_path
from saerl_cli.models import folder_sha256, resolve_sites
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import check_sae, load_sae, sae_sha256


class SparseCoeffModel(SiteTuner):
    """A model whose only trainable parameters are coefficients of SAE features.

    Args:
        model: the base model, which stays frozen.
        config: the `SparseCoeffConfig`.
        adapter_name: name of the adapter.

    Example:
        >>> config = sparse_coeffs(model, "runs/train-sae/…")
        >>> policy = get_peft_model(model, config)
        >>> with policy.disable_adapter():  # the base model, to the bit
        ...     reference = policy(input_ids).logits
    """

    prefix: str = "sparse_coeffs_"
    tuner_layer_cls = SparseCoeffLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the sites of an adapter, all or none.

        Raises:
            ValueError: an SAE is missing, damaged, or belongs to another site, model or adapter.
        """
        config: Any = self.peft_config[adapter_name]
        if nn.LayerNorm(1).weight.is_meta:  # a probe that draws no random number
            raise ValueError("SAEs cannot be loaded on the meta device; leave out low_cpu_mem_usage")
        # SAEs are loaded before PEFT's loop: that must not stop half-way.
        self._saes = self._bind(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._inject_nested(config, model, adapter_name)
        finally:
            self._saes = {}

    def _bind(self, config: SparseCoeffConfig, model: nn.Module) -> dict[str, SAE]:
        """Complete and verify `config` against `model`; the SAEs of sites that are not wrapped yet."""
        if not config.saes:
            raise ValueError(
                "SparseCoeffConfig has no SAEs: give saes={module path: SAE folder}, or use sparse_coeffs()"
            )
        config.saes = self._targeted(config, model)
        config.sae_sha256, config.sites = dict(config.sae_sha256 or {}), dict(config.sites or {})
        saes = {}
        for path in config.saes:
            wrapped = model.get_submodule(path)
            if isinstance(wrapped, SparseCoeffLayer):
                self._check_same(config, wrapped)
                continue
            named = hasattr(getattr(model, "config", None), "model_type")
            site = resolve_sites([path], model)[0] if named else None
            config.sites.setdefault(path, site.name if site else path)
            folder = config.find_sae(path)
            check_sae(folder, config.model_sha256, site.width if site else None)
            config.saes[path] = str(folder)
            config.sae_sha256.setdefault(path, sae_sha256(folder))
            saes[path] = load_sae(folder).to(_device(model, path))
        if config.model_sha256 is None and saes:
            config.model_sha256 = trained_on(config.saes[path] for path in saes)
        _check_model(config, model)
        return saes

    def _targeted(self, config: SparseCoeffConfig, model: nn.Module) -> dict[str, str]:
        """The SAEs of those modules that `target_modules` and `exclude_modules` pick."""
        saes = config.saes or {}
        # Not what earlier adapters added.
        names = {
            base_path(name)
            for name, module in model.named_modules()
            if not isinstance(module, SAE) and f".{self.prefix}" not in name
        }
        absent = [path for path in saes if path not in names]
        if absent:
            raise ValueError(f"the model has no module {absent[0]!r}, for which an SAE is given")
        targeted = [path for path in sorted(names) if path and self._check_target_module_exists(config, path)]
        without = [path for path in targeted if path not in saes]
        if without:
            raise ValueError(f"target_modules picks {without[0]!r}, for which `saes` has no SAE")
        return {path: saes[path] for path in targeted if path in saes}

    def _check_same(self, config: SparseCoeffConfig, layer: SparseCoeffLayer) -> None:
        """Adapters of one site share its SAE and its splice: their coefficients multiply."""
        assert config.saes is not None and config.sae_sha256 is not None and config.sites is not None
        config.sites.setdefault(layer.path, layer.site)
        sha256 = config.sae_sha256.get(layer.path) or sae_sha256(config.find_sae(layer.path))
        config.sae_sha256[layer.path] = sha256
        if sha256 != layer.sae_sha256:
            raise ValueError(
                f"{layer.site} already carries an adapter on another SAE (sha256 {layer.sae_sha256[:12]}…, not"
                f" {sha256[:12]}…); load this adapter into a model of its own"
            )
        if config.splice != layer.kind:
            raise ValueError(
                f"{layer.site} already carries an adapter with splice {layer.kind}, not {config.splice};"
                " load this adapter into a model of its own"
            )

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
        active = adapter_name in self.active_adapters
        if isinstance(target, SparseCoeffLayer):
            target.update_layer(adapter_name, active and not peft_config.inference_mode, peft_config.gates)
            return
        path = base_path(current_key)
        layer = SparseCoeffLayer(
            target, self._saes[path], peft_config.splice, path, peft_config.sites[path], peft_config.sae_sha256[path]
        )
        layer.update_layer(adapter_name, active and not peft_config.inference_mode, peft_config.gates)
        self.insert(layer, parent, target_name)

    def _inject_nested(self, config: SparseCoeffConfig, model: nn.Module, adapter_name: str) -> None:
        """Sites inside sites that were wrapped earlier, which PEFT's loop passes over."""
        for path in config.saes or {}:
            target = model.get_submodule(path)
            if not (isinstance(target, SparseCoeffLayer) and adapter_name in target.sparse_coeffs_delta):
                parent, _, name = path.rpartition(".")
                self._create_and_replace(config, adapter_name, target, name, model.get_submodule(parent), path)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The coefficients alone. PEFT takes all that is on a tuner layer, the SAE included."""
        state = super()._get_adapter_state_dict(model, config, *args, **kwargs)
        state = {key: value for key, value in state.items() if f".{cls.prefix}" in f".{key}"}
        _refuse_non_finite(state, "not saved")
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, and refusal of a file that does not fit (PEFT would warn, or load a part of it)."""
        given = {key: value for key, value in state_dict.items() if f".{cls.prefix}" in f".{key}"}
        _refuse_non_finite(given, "not loaded")
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        wanted = {
            f"{name}.{child}.{adapter_name}.weight": getattr(layer, child)[adapter_name].weight.shape
            for name, layer in model.named_modules()
            if isinstance(layer, SparseCoeffLayer)
            for child in layer.adapter_layer_names
            if adapter_name in getattr(layer, child)
        }
        ours = {key: value.shape for key, value in state.items() if f".{cls.prefix}" in f".{key}"}
        for key in sorted(wanted.keys() | ours.keys()):
            if wanted.get(key) != ours.get(key):
                has, needs = (tuple(shape) if shape else "nothing" for shape in (ours.get(key), wanted.get(key)))
                raise ValueError(f"the adapter's file does not fit this model: {key} is {has} in it, {needs} here")
        return state


def _device(model: nn.Module, path: str) -> torch.device:
    """Where a module's weights are; those of its parent when it has none, as an activation function."""
    while True:
        parameter = next(model.get_submodule(path).parameters(), None)
        if parameter is not None:
            return parameter.device
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]


def _check_model(config: SparseCoeffConfig, model: Any) -> None:
    """Refuse a base model loaded from other weights than the adapter's, where its files are known."""
    folder = Path(getattr(model, "name_or_path", None) or "")
    if config.model_sha256 is None or not any(folder.glob("*.safetensors") if folder.name else ()):
        return
    sha256 = folder_sha256(folder)
    if sha256 != config.model_sha256:
        raise ValueError(
            f"these coefficients belong to another model: the weights in {folder} have sha256 {sha256[:12]}…,"
            f" not {config.model_sha256[:12]}…"
        )


def _refuse_non_finite(state: dict[str, Tensor], consequence: str) -> None:
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} has NaN or infinite coefficients: {consequence}")
