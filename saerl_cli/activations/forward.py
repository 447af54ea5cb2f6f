"""Activations of rows of tokens at sites, from a forward pass that ends where nothing more is needed."""

from collections.abc import Callable, Sequence
from itertools import islice
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from saerl_cli.models import Site, layer_list, output_tensor
from saerl_cli.run import shards

FORWARD_TOKENS = 8192
"""Tokens a forward pass through the language model."""


def rows_at_once(context_size: int) -> int:
    """Rows of tokens in a forward pass."""
    return max(1, FORWARD_TOKENS // context_size)


class _Done(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass that has given all that was asked for."""


def capture(
    model: Any, sites: Sequence[Site], input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Activations at sites, [batch, seq, width] each by site name; layers above the last site are not computed.

    Another thread may run the same model meanwhile: its passes are neither recorded nor ended.
    """
    found: dict[str, Tensor] = {}
    thread, split = get_ident(), shards.is_split(model)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if get_ident() != thread:
                return
            found[name] = output_tensor(output).detach()
            if len(found) == len(sites) and not split:
                raise _Done

        return hook

    hooks = [model.get_submodule(site.module).register_forward_hook(keep(site.name)) for site in sites]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    try:
        with torch.no_grad():
            if split:
                run_up_to(model, sites, inputs)
            else:
                model(**inputs)
    except _Done:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def run_up_to(model: Any, sites: Sequence[Site], inputs: dict[str, Any]) -> None:
    """A pass through a model without its layers above the last of `sites`.

    A model that is split over processes must come to the end of its passes, so the layers are taken out meanwhile.
    """
    layers, above = layer_list(model), [site.layer for site in sites]
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    if layers is None or None in above:
        model(**inputs, **last)
        return
    all_layers = layers._modules
    layers._modules = dict(islice(all_layers.items(), max(layer for layer in above if layer is not None) + 1))
    try:
        model(**inputs, **last)
    finally:
        layers._modules = all_layers
