"""Puts vectors into a model: PEFT's tuner for `VectorConfig`."""

from typing import Any

from torch import nn

from saerl_cli.adapter.activation_vector.layer import VectorLayer
from saerl_cli.adapter.tuner import SiteTuner, base_path


class VectorModel(SiteTuner):
    """A model whose only trainable parameters are vectors at the outputs of modules.

    Example:
        >>> policy = get_peft_model(model, VectorConfig(widths={"gpt_neox.layers.3": 512}))
    """

    prefix: str = "activation_vector_"
    tuner_layer_cls = VectorLayer

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
        width, site = peft_config.widths[current_key], base_path(current_key)
        layer = VectorLayer(target, peft_config.kind, width, site, weight.device)
        layer.update_layer(adapter_name, trainable)
        self.insert(layer, parent, target_name)
